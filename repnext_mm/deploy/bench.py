"""Latency of artifacts in their runtimes, against plan `upstream` in the same runtime.

Every runtime has a process of its own, on the same cores with the same number of threads; only one
runs at a time, in interleaved rounds. A turn begins with one run that is not counted. Images go in
as (N, 3, H, W) float32 arrays; the time includes whatever a runtime does to take and return them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..backbones import PyramidBackbone
from ..engine.quiet import muffled
from ..network import Plan
from ..reparam import reparameterize
from ..timing import (
    Deadline,
    Floor,
    LoadWatch,
    Runner,
    Samples,
    Schedule,
    environment,
    interleave,
    paired_ratio,
    warm_up,
)
from .errors import UsageError
from .exporters import Job
from .formats import FORMATS, Format
from .parity import noise
from .report import PACKAGES, Report
from .runtimes import open_artifact

Record = dict[str, Any]

#: Turns long enough for several runs; idle threads of the process before have gone to sleep.
SCHEDULE = Schedule(rounds=30, round_s=0.05, warmup_cap_s=5.0, warmup_window=5)
CHOICE_SCHEDULE = Schedule(rounds=15, round_s=0.02, warmup_cap_s=2.0, budget_s=40.0)
PAUSE_S = 0.01
#: How PyTorch runs a network, as names of rows.
TORCH_MODES: dict[str, Record] = {
    'eager': {'layout': 'NCHW', 'compile': False},
    'eager channels_last': {'layout': 'channels_last', 'compile': False},
    'compiled': {'layout': 'channels_last', 'compile': True},
}
UPSTREAM: Plan = 'upstream'


class BenchError(UsageError):
    """Something cannot be timed; one sentence."""


# --- what is timed


@dataclass(frozen=True)
class Subject:
    """One row: a file in a runtime, or a network in PyTorch.

    Args:
        name: Unique, for people.
        worker: Process that it runs in; one per runtime.
        spec: What `open_subject` takes.
        reference: Name of the row with plan `upstream` in the same runtime and precision; of
            float32 where the artifact is int8.
        path: The artifact, relative to its folder.
    """

    name: str
    worker: str
    spec: Record
    reference: str
    facts: Record = field(default_factory=dict)


def open_subject(spec: Record) -> tuple[Callable[[], Any], Record]:
    """What a worker runs for `spec`, and what is known of it.

    `spec` has `shape` and `threads`, and `path` (with `precision` for OpenVINO) or `network`: the
    family, arch, plan, layout, and whether to compile.
    """
    torch.set_num_threads(spec['threads'])
    image = noise(spec['shape'])
    if 'path' not in spec:
        return _open_network(spec['network'], image), {'runtime': 'torch', 'precision': 'f32'}
    artifact = open_artifact(spec['path'], threads=spec['threads'], precision=spec.get('precision'))
    array = image.numpy()
    facts = {'runtime': artifact.runtime, 'precision': artifact.precision}
    return lambda: artifact.run(array), facts


def _open_network(network: Record, image: torch.Tensor) -> Callable[[], Any]:
    from .. import backbones

    family = getattr(backbones, network['family'])
    # Plan `upstream` stands for the published code, in the layout that is asked for and no other.
    model = family(
        network['arch'],
        out_indices=network['out_indices'],
        fast=network['plan'] != UPSTREAM,
        channels_last=network['layout'] == 'channels_last',
    ).eval()
    model = reparameterize(model, network['plan'], accept_inexact=True)
    layout = (
        torch.channels_last if network['layout'] == 'channels_last' else torch.contiguous_format
    )
    model = model.to(memory_format=layout)
    call: Callable[[torch.Tensor], Any] = model
    if network['compile']:
        from torch._inductor import config

        call = torch.compile(model)
        with config.patch(freezing=True), torch.no_grad():
            call(image.contiguous(memory_format=layout))

    def run() -> Any:
        with torch.no_grad():
            return call(image.contiguous(memory_format=layout))

    return run


# --- the processes


class Worker:
    """A process with the subjects of one runtime.

    Args:
        threads: That its runtime computes on; it is pinned to as many cores.
    """

    def __init__(self, threads: int) -> None:
        cores = sorted(environment.cores())[:threads]
        variables = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'repnext_mm.deploy.worker', json.dumps(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                **variables,
                'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
            },
        )

    def ask(self, request: Record) -> Record:
        """Send a request and wait for its answer.

        Raises:
            BenchError: It failed, or the process has ended.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line:
            raise BenchError(f'the process ended with code {self.process.wait()}.')
        answer = json.loads(line)
        if 'error' in answer:
            raise BenchError(answer['error'])
        return answer

    def close(self) -> None:
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@dataclass
class Remote:
    """A subject in its worker, as a runner."""

    worker: Worker
    name: str

    def run(self, n: int) -> list[float]:
        time.sleep(PAUSE_S)
        return self.worker.ask({'run': self.name, 'n': n})['seconds']


@contextlib.contextmanager
def workers(names: Iterable[str], threads: int) -> Iterator[dict[str, Worker]]:
    """One process per name; all are ended afterwards, whatever happened."""
    started: dict[str, Worker] = {}
    try:
        for name in dict.fromkeys(names):
            started[name] = Worker(threads)
        yield started
    finally:
        for worker in started.values():
            worker.close()


# --- measuring


@dataclass
class Measured:
    """What timing some subjects gave.

    Args:
        baseline: Name of the row that all are compared with besides their own reference.
        failed: Sentences by the names of rows that could not be run.
    """

    subjects: dict[str, Subject]
    samples: dict[str, Samples]
    floors: dict[str, Floor]
    opened: dict[str, Record]
    baseline: str
    failed: dict[str, str]
    load: Record
    threads: int

    def rows(self) -> list[Record]:
        """Latency rows of report.json, times in ms."""
        return [self._row(name) for name in self.samples]

    def _row(self, name: str) -> Record:
        subject, samples, opened = self.subjects[name], self.samples[name], self.opened[name]
        ratio = paired_ratio(samples, self.samples[subject.reference])
        over_all = paired_ratio(samples, self.samples[self.baseline])
        percentiles = {f'p{p}': samples.percentile(p) for p in (50, 90, 99)}
        is_reference = name == subject.reference
        return {
            'name': name,
            **subject.facts,
            'runtime': opened['runtime'],
            'precision': opened['precision'],
            'threads': self.threads,
            **{key: None if s is None else 1e3 * s for key, s in percentiles.items()},
            'n': len(samples.runs),
            'rounds': ratio.rounds,
            'noise': samples.noise,
            'settled': samples.settled,
            'reference': subject.reference,
            'ratio': ratio.value,
            'ci95': [ratio.low, ratio.high],
            'floor': self.floors[subject.reference].limit,
            'verdict': 'reference'
            if is_reference
            else self.floors[subject.reference].verdict(ratio),
            'baseline': self.baseline,
            'vs_baseline': over_all.value,
            'vs_baseline_ci95': [over_all.low, over_all.high],
            'load_s': opened['load_s'],
            'first_ms': 1e3 * opened['first_s'],
        }


def measure(
    subjects: Sequence[Subject],
    baseline: str,
    *,
    threads: int,
    schedule: Schedule = SCHEDULE,
    log: Console | None = None,
) -> Measured:
    """Time all subjects in interleaved rounds, each reference against itself first.

    A subject that cannot be run is left out, with those that are compared with it.
    """
    watch = LoadWatch()
    deadline = Deadline(schedule.budget_s)
    by_name = {subject.name: subject for subject in subjects}
    failed: dict[str, str] = {}
    opened: dict[str, Record] = {}
    with workers((s.worker for s in subjects), threads) as processes:

        def open_in(worker: str, name: str, spec: Record) -> Runner:
            start = processes[worker]
            opened[name] = start.ask({'open': name, 'spec': {**spec, 'threads': threads}})
            return Remote(start, name)

        runners: dict[str, Runner] = {}
        for subject in subjects:
            try:
                if log:
                    log.print(f'opening {subject.name}', markup=False, highlight=False)
                runners[subject.name] = open_in(subject.worker, subject.name, subject.spec)
            except BenchError as error:
                failed[subject.name] = str(error)
                if log:
                    log.print(f'{subject.name}: {error}', markup=False, highlight=False)
        for name in list(runners):
            if by_name[name].reference not in runners:
                failed[name] = f'{by_name[name].reference} could not be run to compare it with.'
                del runners[name]
        if baseline not in runners:
            raise BenchError(f'{baseline} cannot be timed: {failed.get(baseline, "not given")}')
        references = dict.fromkeys([by_name[name].reference for name in runners])
        twins = {
            f'{name} again': open_in(by_name[name].worker, f'{name} again', by_name[name].spec)
            for name in references
        }
        if log:
            most = f'{schedule.rounds} rounds'
            if schedule.budget_s is not None:
                most += f' or {schedule.budget_s:g} s'
            log.print(f'timing {len(runners)} subjects, at most {most}', highlight=False)
        warm = warm_up({**runners, **twins}, schedule, deadline)
        pairs = {n: r for name in references for n, r in
                 ((name, runners[name]), (f'{name} again', twins[f'{name} again']))}  # fmt: skip
        cost = sum(warm[name].warm_s for name in pairs)
        part = cost / (cost + sum(warm[name].warm_s for name in runners))
        twice = interleave(pairs, schedule, warm, deadline.share(part))
        samples = interleave(runners, schedule, warm, deadline)
    floors = {name: Floor(paired_ratio(twice[f'{name} again'], twice[name])) for name in references}
    return Measured(by_name, samples, floors, opened, baseline, failed, watch.report(), threads)


# --- subjects of an export


@dataclass(frozen=True)
class Network:
    """What is built where no weights are needed: latency does not depend on them."""

    family: type[PyramidBackbone]
    arch: str | dict[str, Any]
    out_indices: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Record) -> Network:
        """The network that an artifact with this metadata was made from."""
        from .. import backbones

        family = getattr(backbones, metadata['family'])
        return cls(family, metadata['arch'], tuple(metadata['out_indices']))

    def fused(self, plan: Plan) -> PyramidBackbone:
        """With weights as initialised."""
        model = self.family(self.arch, out_indices=self.out_indices).eval()
        return reparameterize(model, plan, accept_inexact=True)

    def spec(self, plan: Plan, **options: Any) -> Record:
        """As `open_subject` takes it."""
        return {
            'family': self.family.__name__,
            'arch': self.arch,
            'out_indices': self.out_indices,
            'plan': plan,
            **options,
        }


def torch_subjects(
    network: Network,
    shape: Sequence[int],
    plans: Iterable[Plan] = ('full',),
    modes: Iterable[str] = tuple(TORCH_MODES),
) -> list[Subject]:
    """PyTorch in its modes, `upstream` first in each."""
    subjects = []
    for mode in modes:
        options = TORCH_MODES[mode]
        for plan in dict.fromkeys([UPSTREAM, *plans]):
            subjects.append(
                Subject(
                    f'torch {mode}, {plan}',
                    f'torch {mode}',
                    {'shape': list(shape), 'network': network.spec(plan, **options)},
                    f'torch {mode}, {UPSTREAM}',
                    {'format': 'torch', 'plan': plan, 'path': None, 'mode': mode},
                )
            )
    return subjects


BASELINE = f'torch eager, {UPSTREAM}'


def artifact_subject(
    row: Format, path: Path, shape: Sequence[int], plan: str, dtype: str, precision: str | None
) -> Subject:
    """The row of one artifact, compared with that of plan `upstream`."""
    computed = precision or dtype
    base = precision or float_dtype(dtype)
    spec: Record = {'shape': list(shape), 'path': str(row.file(path).resolve())}
    if precision:
        spec['precision'] = precision
    return Subject(
        _row_name(row, plan, computed),
        row.name,
        spec,
        _row_name(row, UPSTREAM, base),
        {'format': row.name, 'plan': plan, 'path': path.name, 'dtype': dtype, 'mode': None},
    )


def _row_name(row: Format, plan: str, numbers: str) -> str:
    return f'{row.name} {numbers}, {plan}'


def bench_artifacts(
    artifacts: Sequence[Record],
    folder: Path,
    network: Network,
    *,
    threads: int | None = None,
    schedule: Schedule = SCHEDULE,
    compiled: bool = True,
    reduced: Sequence[str] = ('bf16',),
    log: Console | None = None,
) -> Measured:
    """Time artifacts of a report, all of one size, and what they are compared with.

    Args:
        artifacts: Their records in report.json, all of one size and batch.
        folder: Where they are.
        network: What they were made from; `upstream` artifacts are made from it for the time of
            the measurement where there are none.
        threads: Threads and cores; all that this process may use when None.
        schedule: How long.
        compiled: Whether to add PyTorch compiled, which takes a minute or more to compile.
        reduced: OpenVINO's other precisions, where the CPU computes in them.
        log: For progress.
    """
    shape = (artifacts[0]['metadata']['batch'], 3, *artifacts[0]['size'])
    plans = list(dict.fromkeys(a['metadata']['plan'] for a in artifacts))
    modes = [mode for mode, options in TORCH_MODES.items() if compiled or not options['compile']]
    rows = torch_subjects(network, shape, plans, modes)
    with tempfile.TemporaryDirectory() as scratch:
        for record in artifacts:
            row = FORMATS[record['format']]
            if row.runtime is None or record['status'] != 'ok' or row.runtime == 'torch':
                continue
            base = _upstream_of(record, artifacts, folder, network, shape, Path(scratch))
            rows += _artifact_rows(row, record, folder, base, shape, reduced)
        unique = {row.name: row for row in rows}
        return measure(
            list(unique.values()),
            BASELINE,
            threads=threads or len(environment.cores()),
            schedule=schedule,
            log=log,
        )


def _upstream_of(
    record: Record,
    artifacts: Sequence[Record],
    folder: Path,
    network: Network,
    shape: Sequence[int],
    scratch: Path,
) -> Path:
    """The `upstream` artifact to compare with, in float where `record` is int8; made if need be."""
    row, dtype = FORMATS[record['format']], float_dtype(record['dtype'])
    for other in artifacts:
        same = (other['format'], other['dtype']) == (row.name, dtype)
        if same and other['metadata']['plan'] == UPSTREAM:
            return folder / other['path']
    path = scratch / f'{UPSTREAM}_{dtype}{row.suffix}'
    if not path.exists():
        export(row, network.fused(UPSTREAM), shape, path, dtype, opset=record.get('opset'))
    return path


def _artifact_rows(
    row: Format,
    record: Record,
    folder: Path,
    base: Path,
    shape: Sequence[int],
    reduced: Sequence[str],
) -> Iterator[Subject]:
    """An artifact and the `upstream` artifact it is compared with, both in every precision."""
    plan, dtype = record['metadata']['plan'], record['dtype']
    precisions: list[str | None] = [None]
    if row.name == 'openvino' and dtype == 'fp32':
        precisions += [name for name in reduced if openvino_takes(name)]
    for precision in precisions:
        yield artifact_subject(row, base, shape, UPSTREAM, float_dtype(dtype), precision)
        subject = artifact_subject(row, folder / record['path'], shape, plan, dtype, precision)
        yield replace(subject, facts={**subject.facts, 'path': record['path']})


def float_dtype(dtype: str) -> str:
    """What an artifact is compared with: int8 with float32, all others with their own."""
    return 'fp32' if dtype == 'int8' else dtype


def openvino_takes(precision: str) -> bool:
    """Whether this CPU computes in it, rather than converting to float32 and back."""
    flags = {'bf16': ('avx512_bf16', 'amx_bf16', 'bf16'), 'f16': ('avx512_fp16', 'fphp')}
    return any(flag in environment.isa_flags() for flag in flags[precision])


def export(
    row: Format,
    model: PyramidBackbone,
    shape: Sequence[int],
    path: Path,
    dtype: str = 'fp32',
    opset: int | None = None,
) -> None:
    """Write an artifact to be timed and thrown away."""
    batch, _, height, width = shape
    names = tuple(f'stage{i}' for i in model.out_indices)
    metadata = {
        'family': type(model).__name__,
        'arch': model.arch if model.arch in model.arch_zoo else model.settings,
        'plan': model.plan,
        'out_indices': list(model.out_indices),
        'dtype': dtype,
        'size': [height, width],
        'batch': batch,
    }
    job = Job(model, (height, width), names, metadata, batch=batch, dtype=dtype)
    if opset is not None:
        job = replace(job, opset=opset)
    with muffled():
        row.export(job, path)


def bench_report(
    report: Report,
    *,
    threads: int | None = None,
    compiled: bool = True,
    schedule: Schedule = SCHEDULE,
    log: Console | None = None,
) -> list[Measured]:
    """Time the artifacts of a report, put the figures into it, and draw them beside it.

    One measurement per size and batch; artifacts that failed or cannot run here are left out.

    Raises:
        BenchError: None can be timed.
    """
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in report.data['artifacts']:
        if FORMATS[record['format']].runtime is not None and record['status'] == 'ok':
            key = (record['metadata']['batch'], *record['size'])
            groups.setdefault(key, []).append(record)
    if not groups:
        raise BenchError(f'{report.folder} holds no artifact that can be run here.')
    results = []
    report.data['latency'], report.data['bench'] = [], []
    for key, artifacts in groups.items():
        network = Network.of(artifacts[0]['metadata'])
        measured = bench_artifacts(
            artifacts,
            report.folder,
            network,
            threads=threads,
            compiled=compiled,
            schedule=schedule,
            log=log,
        )
        batch, height, width = key
        title = f'{report.data["model"]["name"]}, {batch}x3x{height}x{width}'
        picture = f'latency_{height}x{width}_b{batch}.png'
        draw(measured, title, report.folder / picture)
        shape = {'batch': batch, 'size': [height, width]}
        report.data['latency'] += [{**row, **shape} for row in measured.rows()]
        report.data['bench'].append(
            {
                **shape,
                'picture': picture,
                'threads': measured.threads,
                'load': measured.load,
                'failed': measured.failed,
                'env': environment.describe(PACKAGES),
            }
        )
        results.append(measured)
    report.save()
    return results


def latency_table(measured: Measured) -> Table:
    """For people: one line per row, the fastest first."""
    table = Table(box=SIMPLE)
    for header in (
        '',
        'precision',
        'ms',
        'p90',
        'time / upstream',
        'time / baseline',
        '',
        'load s',
    ):
        table.add_column(header, justify='left' if header in ('', 'precision') else 'right')
    for row in sorted(measured.rows(), key=lambda r: r['vs_baseline']):
        notes = [row['verdict']] + [f'{row["noise"]}'] * (row['noise'] != 'ok')
        table.add_row(
            row['name'],
            row['precision'],
            f'{row["p50"]:.1f}',
            '-' if row['p90'] is None else f'{row["p90"]:.1f}',
            _with_interval(row['ratio'], row['ci95']),
            _with_interval(row['vs_baseline'], row['vs_baseline_ci95']),
            ', '.join(notes),
            f'{row["load_s"]:.1f}',
        )
    return table


def _with_interval(ratio: float, interval: Sequence[float]) -> str:
    return f'{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]'


def show(measured: Measured, console: Console) -> None:
    """Print the table and what a reader must know of it."""
    console.print(latency_table(measured))
    console.print(
        f'Time / upstream is against plan upstream in the same runtime and precision (int8: in '
        f'float32), time / baseline against {measured.baseline}; p90 needs 64 runs.',
        highlight=False,
    )
    for name, reason in measured.failed.items():
        console.print(f'Not timed: {name}: {reason}', highlight=False, markup=False)
    if not measured.load['headline']:
        console.print(f'Not for headlines: {measured.load["reason"]}.', highlight=False)


def draw(measured: Measured, title: str, path: Path) -> None:
    """Bars of the time in units of the baseline's, with intervals of 95 %."""
    from matplotlib.figure import Figure

    rows = sorted(measured.rows(), key=lambda r: -r['vs_baseline'])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout='constrained')
    axes = figure.subplots()
    runtimes = list(dict.fromkeys(row['runtime'] for row in measured.rows()))
    for i, row in enumerate(rows):
        low, high = row['vs_baseline_ci95']
        value = row['vs_baseline']
        colour = f'C{runtimes.index(row["runtime"])}'
        plan = row['plan']
        axes.barh(i, value, color=colour, alpha=0.45 if plan == UPSTREAM else 0.9)
        axes.errorbar(
            value, i, xerr=[[value - low], [high - value]], color='black', capsize=3, linewidth=1
        )
        axes.annotate(
            f'{row["p50"]:.1f} ms',
            (max(value, high), i),
            xytext=(6, 0),
            textcoords='offset points',
            va='center',
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), [row['name'] for row in rows])
    limit = measured.floors[measured.baseline].limit
    axes.axvspan(1 / limit, limit, color='grey', alpha=0.2, linewidth=0)
    axes.axvline(1, color='grey', linewidth=1)
    axes.set_xlim(0, 1.15 * max(row['vs_baseline_ci95'][1] for row in rows))
    axes.set_xlabel(f'time / {measured.baseline} (grey: noise of that), {measured.threads} threads')
    axes.set_title(f'{title}: lower is faster', loc='left')
    axes.spines[['top', 'right']].set_visible(False)
    part = path.with_name(f'.partial-{os.getpid()}-{path.name}')
    figure.savefig(part, dpi=150, format='png')
    os.replace(part, path)


# --- choosing a plan


@dataclass(frozen=True)
class Choice:
    """A plan, why, and the times of all that were tried (in units of `full`)."""

    plan: Plan
    why: str
    ratios: Mapping[str, float] = field(default_factory=dict)


def exact_plans(model: PyramidBackbone) -> list[Plan]:
    """Plans that leave this model's function as it is, `full` first."""
    plans: list[Plan] = ['full', 'upstream']
    with contextlib.suppress(ValueError):
        reparameterize(model, 'single')
        plans.append('single')
    return plans


def choose_plan(
    model: PyramidBackbone,
    row: Format,
    shape: Sequence[int],
    *,
    dtype: str = 'fp32',
    threads: int | None = None,
    schedule: Schedule = CHOICE_SCHEDULE,
) -> Choice:
    """The fastest plan for a format among those exact for this model, by measuring them here.

    `full` is kept unless another is faster beyond noise.
    """
    if row.runtime is None:
        return Choice('full', f'{row.name} cannot be run on this system to measure plans')
    if model.plan is not None:
        return Choice(model.plan, 'the weights are already fused with it')
    plans = exact_plans(model)
    with tempfile.TemporaryDirectory() as scratch:
        subjects = []
        for plan in plans:
            path = Path(scratch, f'{plan}{row.suffix}')
            export(row, reparameterize(model, plan), shape, path, dtype)
            subject = artifact_subject(row, path, shape, plan, dtype, None)
            subjects.append(Subject(plan, row.name, subject.spec, 'full', {'plan': plan}))
        measured = measure(
            subjects, 'full', threads=threads or len(environment.cores()), schedule=schedule
        )
    ratios = {r['name']: r['ratio'] for r in measured.rows()}
    faster = [r for r in measured.rows() if r['verdict'] == 'faster']
    if not faster:
        others = ', '.join(
            f'{name} {ratio:.2f}' for name, ratio in ratios.items() if name != 'full'
        )
        return Choice(
            'full',
            f'no other exact plan is faster in {row.runtime} (time / full: {others})',
            ratios,
        )
    best = min(faster, key=lambda r: r['ratio'])
    return Choice(
        best['name'], f'{best["ratio"]:.2f} of the time of exact in {row.runtime}, measured', ratios
    )

"""Latency of exported artifacts and of networks in PyTorch, each against a reference of its own.

Every runtime has a process of its own, on the same cores with the same number of threads; only one
runs at a time, in interleaved rounds. A turn begins with one run that is not counted. The input is
a (N, 3, H, W) float32 array; the time includes whatever a runtime does to read and return arrays.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import backbones
from ..backbones import PyramidBackbone
from ..engine.errors import UserError
from ..files import replacing
from ..network import Plan
from ..reparam import reparameterize
from ..reparam.verify import noise
from ..runtimes import open_artifact
from . import environment, tables
from .rounds import Comparison, Deadline, Runner, Schedule, compare
from .tables import Record

#: Turns long enough for several runs; idle threads of the process before have gone to sleep.
SCHEDULE = Schedule(rounds=30, round_s=0.05, warmup_cap_s=5.0, warmup_window=5)
PAUSE_S = 0.01
#: How PyTorch runs a network, as names of rows.
TORCH_MODES: dict[str, Record] = {
    'eager': {'layout': 'NCHW', 'compile': False},
    'eager channels_last': {'layout': 'channels_last', 'compile': False},
    'compiled': {'layout': 'channels_last', 'compile': True},
}
UPSTREAM: Plan = 'upstream'
BASELINE = f'torch eager, {UPSTREAM}'


class BenchError(UserError):
    """Something cannot be timed; one sentence."""

    exit_code = 2


# --- what is timed


@dataclass(frozen=True)
class Subject:
    """One row: a file in a runtime, or a network in PyTorch.

    Args:
        name: Unique, for people.
        worker: Process that it runs in; one per runtime.
        spec: The argument of `open_subject`.
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

    `spec` has `threads`, and one of: `opener`, a function as `module:name`; `path` and `shape`,
    with `precision` for OpenVINO and `trust` for a file that is code; `network` and `shape`: the
    family, arch, plan, layout, and whether to compile.
    """
    torch.set_num_threads(spec['threads'])
    if 'opener' in spec:  # of a package above this one
        module, _, name = spec['opener'].partition(':')
        return getattr(import_module(module), name)(spec)
    image = noise(spec['shape'])
    if 'path' not in spec:
        return _open_network(spec['network'], image), {'runtime': 'torch', 'precision': 'f32'}
    artifact = open_artifact(
        spec['path'],
        threads=spec['threads'],
        precision=spec.get('precision'),
        trust=spec.get('trust', False),
    )
    inputs = artifact.example(spec['shape'])
    facts = {'runtime': artifact.runtime, 'precision': artifact.precision}
    return lambda: artifact.run_named(inputs), facts


def _open_network(network: Record, image: torch.Tensor) -> Callable[[], Any]:
    family = getattr(backbones, network['family'])
    # Plan `upstream` is measured as the published code computes it: that code is the reference.
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


@dataclass(frozen=True)
class Network:
    """What is built where no weights are needed: latency does not depend on them."""

    family: type[PyramidBackbone]
    arch: str | dict[str, Any]
    out_indices: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Record) -> Network:
        """The network that an artifact with this metadata was made from."""
        family = getattr(backbones, metadata['family'])
        return cls(family, metadata['arch'], tuple(metadata['out_indices']))

    def fused(self, plan: Plan) -> PyramidBackbone:
        """With weights as initialised."""
        model = self.family(self.arch, out_indices=self.out_indices).eval()
        return reparameterize(model, plan, accept_inexact=True)

    def spec(self, plan: Plan, **options: Any) -> Record:
        """The argument of `open_subject`."""
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


# --- the processes


class Worker:
    """A process with the subjects of one runtime.

    Args:
        threads: That its runtime computes on; it is pinned to as many cores.
        variables: Of its environment, besides those of this process.
    """

    def __init__(self, threads: int, variables: Mapping[str, str] | None = None) -> None:
        cores = sorted(environment.cores())[:threads]
        counts = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'repnext_mm.measure.worker', json.dumps(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                **counts,
                **(variables or {}),
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
def workers(
    names: Iterable[str], threads: int, variables: Mapping[str, Mapping[str, str]] | None = None
) -> Iterator[dict[str, Worker]]:
    """One process per name, with these environment variables; all are ended afterwards."""
    started: dict[str, Worker] = {}
    try:
        for name in dict.fromkeys(names):
            started[name] = Worker(threads, (variables or {}).get(name))
        yield started
    finally:
        for worker in started.values():
            worker.close()


# --- measuring


@dataclass
class Measured:
    """What timing some subjects found.

    Args:
        comparison: Of all that could be run.
        opened: What each worker reported when it opened a subject.
        baseline: Name of the row that all are compared with besides their own reference.
        failed: Sentences by the names of rows that could not be run.
    """

    subjects: dict[str, Subject]
    comparison: Comparison
    opened: dict[str, Record]
    baseline: str
    failed: dict[str, str]
    load: Record
    threads: int

    def rows(self) -> list[Record]:
        """Latency rows of report.json, times in ms."""
        return [self._row(name) for name in self.comparison.samples]

    def _row(self, name: str) -> Record:
        opened, timed = self.opened[name], tables.row(self.comparison, name)
        over_all = tables.interval(self.comparison.ratio(name, self.baseline))
        return {
            'name': name,
            **self.subjects[name].facts,
            'runtime': opened['runtime'],
            'precision': opened['precision'],
            'threads': self.threads,
            **{key: timed[f'{key}_ms'] for key in ('p50', 'p90', 'p99')},
            'n': timed['runs'],
            **{key: timed[key] for key in ('rounds', 'noise', 'settled')},
            'reference': self.comparison.references[name],
            'ratio': timed['ratio'],
            'ci95': timed['interval'],
            'floor': self.comparison.floor(name).limit,
            'verdict': timed['verdict'],
            'baseline': self.baseline,
            'vs_baseline': over_all['ratio'],
            'vs_baseline_ci95': over_all['interval'],
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
    watch = environment.LoadWatch()
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
        references = {name: by_name[name].reference for name in runners}
        twins = {
            name: open_in(by_name[name].worker, f'{name} again', by_name[name].spec)
            for name in dict.fromkeys(references.values())
        }
        if log:
            most = f'{schedule.rounds} rounds'
            if schedule.budget_s is not None:
                most += f' or {schedule.budget_s:g} s'
            log.print(f'timing {len(runners)} subjects, at most {most}', highlight=False)
        comparison = compare(runners, twins, references, schedule, deadline)
    return Measured(by_name, comparison, opened, baseline, failed, watch.report(), threads)


# --- for people


def latency_table(measured: Measured) -> Table:
    """For people: one line per row, the fastest first."""
    rows = sorted(measured.rows(), key=lambda r: r['vs_baseline'])
    notes = [[r['verdict']] + [r['noise']] * (r['noise'] != 'ok') for r in rows]
    alone = len({r['reference'] for r in rows}) == 1  # the same column twice
    columns = [
        ('', [r['name'] for r in rows]),
        ('precision', [r['precision'] for r in rows]),
        ('ms', [f'{r["p50"]:.1f}' for r in rows]),
        ('p90', ['-' if r['p90'] is None else f'{r["p90"]:.1f}' for r in rows]),
        ('time / upstream', [_with_interval(r['ratio'], r['ci95']) for r in rows]),
        (
            'time / baseline',
            [_with_interval(r['vs_baseline'], r['vs_baseline_ci95']) for r in rows],
        ),
        ('', [', '.join(each) for each in notes]),
        ('load s', [f'{r["load_s"]:.1f}' for r in rows]),
    ]
    return tables.timing_table([c for c in columns if not (alone and c[0] == 'time / upstream')])


def _with_interval(ratio: float, interval: Sequence[float]) -> str:
    return f'{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]'


def show(measured: Measured, console: Console) -> None:
    """Print the table and what a reader must know of it."""
    console.print(latency_table(measured))
    text = f'Time / baseline is against {measured.baseline}; p90 needs 64 runs.'
    if any(r['reference'] != measured.baseline for r in measured.rows()):
        text = (
            'Time / upstream is against plan upstream in the same runtime and precision (int8: in '
            f'float32). {text}'
        )
    console.print(text, highlight=False)
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
    limit = measured.comparison.floors[measured.baseline].limit
    axes.axvspan(1 / limit, limit, color='grey', alpha=0.2, linewidth=0)
    axes.axvline(1, color='grey', linewidth=1)
    axes.set_xlim(0, 1.15 * max(row['vs_baseline_ci95'][1] for row in rows))
    axes.set_xlabel(f'time / {measured.baseline} (grey: noise of that), {measured.threads} threads')
    axes.set_title(f'{title}: lower is faster', loc='left')
    axes.spines[['top', 'right']].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format='png')

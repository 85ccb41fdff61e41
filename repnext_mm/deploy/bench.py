"""Timing the artifacts of an export: which of them, against which, and the fastest plan."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..backbones import PyramidBackbone
from ..engine.quiet import muffled
from ..measure import Schedule, environment
from ..measure.artifacts import (
    BASELINE,
    SCHEDULE,
    TORCH_MODES,
    UPSTREAM,
    BenchError,
    Measured,
    Network,
    Subject,
    draw,
    measure,
    torch_subjects,
)
from ..measure.tables import Record
from ..network import Plan, check_plan
from ..reparam import reparameterize
from ..runtimes import open_artifact
from ..runtimes.artifact import PRECISIONS
from ..runtimes.predictor import Model
from .folders import make_folder
from .formats import FORMATS, Format
from .fusing import fused_model
from .job import Job
from .parity import Golden, predict_as_mm
from .report import PACKAGES, ArtifactRecord, Report
from .source import load_source
from .targets import BackboneTarget, Preprocess

CHOICE_SCHEDULE = Schedule(rounds=15, round_s=0.02, warmup_cap_s=2.0, budget_s=40.0)


def artifact_subject(
    row: Format,
    path: Path,
    shape: Sequence[int],
    plan: str,
    dtype: str,
    precision: str | None,
    trust: bool = True,
) -> Subject:
    """The row of one artifact, compared with that of plan `upstream`."""
    computed = precision or dtype
    base = precision or float_dtype(dtype)
    spec: Record = {
        'shape': list(shape),
        'path': str(row.file(path).resolve()),
        'trust': trust,
    }
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
    artifacts: Sequence[ArtifactRecord],
    folder: Path,
    network: Network,
    *,
    threads: int | None = None,
    schedule: Schedule = SCHEDULE,
    compiled: bool = True,
    reduced: Sequence[str] = ('bf16',),
    trust: bool = True,
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
        compiled: Whether to add PyTorch compiled, which needs a minute or more to compile.
        reduced: OpenVINO's other precisions, where the CPU computes in them.
        trust: Run files that are code, as those of this process's own export.
        log: For progress.
    """
    shape = (artifacts[0].batch, 3, *artifacts[0].size)
    plans = [check_plan(plan) for plan in dict.fromkeys(a.plan for a in artifacts)]
    modes = [mode for mode, options in TORCH_MODES.items() if compiled or not options['compile']]
    rows = torch_subjects(network, shape, plans, modes)
    with tempfile.TemporaryDirectory() as scratch:
        for record in artifacts:
            row = FORMATS[record.format]
            if row.runtime is None or record.status != 'ok' or row.runtime == 'torch':
                continue
            base = _upstream_of(record, artifacts, folder, network, shape, Path(scratch))
            rows += _artifact_rows(row, record, folder, base, shape, reduced, trust)
        unique = {row.name: row for row in rows}
        return measure(
            list(unique.values()),
            BASELINE,
            threads=threads or len(environment.cores()),
            schedule=schedule,
            log=log,
        )


# --- complete models

#: The row that all files of a complete model are compared with.
PREDICT = 'mm predict, trained'


def bench_models(
    report: Report,
    artifacts: Sequence[ArtifactRecord],
    *,
    threads: int | None = None,
    schedule: Schedule = SCHEDULE,
    reduced: Sequence[str] = ('bf16',),
    trust: bool = True,
    log: Console | None = None,
) -> Measured:
    """Time files of a complete model against mm's `predict`, all on the golden image.

    Each file is timed twice: alone, from prepared pixels to its outputs, and `with pixels`, from an
    image as it was loaded to boxes and masks in that image. mm's `predict` includes its own
    data preprocessor, scaling back and pasting. No row reads a file or resizes an image.
    """
    model, first = report.model, artifacts[0]
    golden = str((report.folder / first.golden).resolve())
    common = {'golden': golden, 'config': model.config, 'checkpoint': model.checkpoint}
    here = f'{__name__}:'
    rows = [
        Subject(
            name,
            'torch mm',
            {**common, 'opener': f'{here}open_predict', 'plan': plan},
            PREDICT,
            {'format': 'torch', 'plan': plan or 'none', 'path': None, 'mode': 'mm'},
        )
        for name, plan in ((PREDICT, None), ('mm predict, fused', first.plan))
    ]
    described = (report.folder / 'model.json').exists()
    for record in artifacts:
        row = FORMATS[record.format]
        precisions: list[str | None] = [None]
        if row.name == 'openvino' and record.dtype == 'fp32':
            precisions += [name for name in reduced if openvino_takes(name)]
        for precision in precisions:
            label = f'{row.name} {precision or record.dtype}'
            path = report.folder / record.path
            spec = {
                **common,
                'path': str(path.resolve()),
                'trust': trust,
                'precision': precision,
                'dtype': record.dtype,
            }
            facts = {'format': row.name, 'plan': record.plan, 'path': record.path, 'mode': None}
            openers = {label: 'open_file'}
            if described and row.name in ('onnx', 'openvino'):
                openers[f'{label}, with pixels'] = 'open_predictor'
            rows += [
                Subject(
                    name,
                    row.name,
                    {**spec, 'opener': f'{here}{opener}'},
                    PREDICT,
                    {**facts, 'dtype': record.dtype},
                )
                for name, opener in openers.items()
            ]
    return measure(
        rows, PREDICT, threads=threads or len(environment.cores()), schedule=schedule, log=log
    )


def open_predict(spec: Record) -> tuple[Callable[[], Any], Record]:
    """mm's own `predict`, of the trained model or, with a plan, of the fused one."""
    with muffled():
        source = load_source(spec['config'], spec['checkpoint'], scope='model')
    model = source.model if spec['plan'] is None else fused_model(source, spec['plan'])
    preprocess = Preprocess.of(source.preprocessor)
    inputs = Golden.load(Path(spec['golden'])).inputs
    facts = {'runtime': 'torch', 'precision': 'f32'}
    return lambda: predict_as_mm(model, preprocess, inputs), facts


def open_file(spec: Record) -> tuple[Callable[[], Any], Record]:
    """A file alone, from prepared pixels."""
    artifact = open_artifact(
        spec['path'], threads=spec['threads'], precision=spec['precision'], trust=spec['trust']
    )
    given = Golden.load(Path(spec['golden'])).inputs
    inputs = {name: given[name] for name in artifact.input_names}
    facts = {'runtime': artifact.runtime, 'precision': artifact.precision}
    return lambda: artifact.run_named(inputs), facts


def open_predictor(spec: Record) -> tuple[Callable[[], Any], Record]:
    """The predictor that is shipped, from an image as it was loaded."""
    model = Model(spec['path'], spec['threads'], spec['precision'])
    image = Golden.load(Path(spec['golden'])).inputs['image'][0]
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))
    model.settings = {**model.settings, 'steps': []}  # of the same size as in every other row
    runtime = 'onnxruntime' if spec['path'].endswith('.onnx') else 'openvino'
    computed = spec['precision'] or PRECISIONS[spec['dtype']]
    return lambda: model(pixels), {'runtime': runtime, 'precision': computed}


# --- backbones


def _upstream_of(
    record: ArtifactRecord,
    artifacts: Sequence[ArtifactRecord],
    folder: Path,
    network: Network,
    shape: Sequence[int],
    scratch: Path,
) -> Path:
    """The `upstream` artifact to compare with, in float where `record` is int8; made if need be."""
    row, dtype = FORMATS[record.format], float_dtype(record.dtype)
    for other in artifacts:
        same = (other.format, other.dtype) == (row.name, dtype)
        if same and other.plan == UPSTREAM:
            return folder / other.path
    path = scratch / f'{UPSTREAM}_{dtype}{row.suffix}'
    if not path.exists():
        export(row, network.fused(UPSTREAM), shape, path, dtype, opset=record.opset)
    return path


def _artifact_rows(
    row: Format,
    record: ArtifactRecord,
    folder: Path,
    base: Path,
    shape: Sequence[int],
    reduced: Sequence[str],
    trust: bool,
) -> Iterator[Subject]:
    """An artifact and the `upstream` artifact it is compared with, both in every precision."""
    plan, dtype = record.plan, record.dtype
    precisions: list[str | None] = [None]
    if row.name == 'openvino' and dtype == 'fp32':
        precisions += [name for name in reduced if openvino_takes(name)]
    for precision in precisions:
        yield artifact_subject(row, base, shape, UPSTREAM, float_dtype(dtype), precision)
        path = folder / record.path
        subject = artifact_subject(row, path, shape, plan, dtype, precision, trust)
        yield replace(subject, facts={**subject.facts, 'path': record.path})


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
    metadata = {
        'family': type(model).__name__,
        'arch': model.arch if model.arch in model.arch_zoo else model.settings,
        'plan': model.plan,
        'out_indices': list(model.out_indices),
        'dtype': dtype,
        'size': [height, width],
        'batch': batch,
    }
    job = Job(BackboneTarget(model), (height, width), metadata, batch=batch, dtype=dtype)
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
    trust: bool = False,
    log: Console | None = None,
) -> list[Measured]:
    """Time the artifacts of a report, put the figures into it, and draw them beside it.

    One measurement per size and batch; artifacts that failed or cannot run here are left out.

    Raises:
        BenchError: None can be timed.
    """
    make_folder(report.folder)  # or what is measured would be lost
    groups: dict[tuple[int, ...], list[ArtifactRecord]] = {}
    for record in report.artifacts:
        if FORMATS[record.format].runtime is not None and record.status == 'ok':
            key = (record.batch, *record.size)
            groups.setdefault(key, []).append(record)
    if not groups:
        raise BenchError(f'{report.folder} holds no artifact that can be run here.')
    results = []
    report.latency, report.bench = [], []
    for key, artifacts in groups.items():
        common: Any = {'threads': threads, 'schedule': schedule, 'trust': trust, 'log': log}
        if report.model.scope == 'model':
            measured = bench_models(report, artifacts, **common)
        else:
            network = Network.of(artifacts[0].metadata)
            measured = bench_artifacts(
                artifacts, report.folder, network, compiled=compiled, **common
            )
        batch, height, width = key
        title = f'{report.model.name}, {batch}x3x{height}x{width}'
        picture = f'latency_{height}x{width}_b{batch}.png'
        draw(measured, title, report.folder / picture)
        shape = {'batch': batch, 'size': [height, width]}
        report.latency += [{**row, **shape} for row in measured.rows()]
        report.bench.append(
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

"""From a model to proven artifacts in a folder: fuse, export, inspect, compare, report."""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..engine.errors import UserError
from ..engine.quiet import muffled
from ..network import Network
from ..reparam import equalize
from ..runtimes import ArtifactError, open_artifact
from ..runtimes.predictor import digest
from .calibration import check_pictures
from .errors import (
    DependencyError,
    ExportError,
    ModelError,
    ParityError,
    SomeFailedError,
    UsageError,
)
from .folders import disk_errors, make_folder, owned, partial_folder, place, remove, shown
from .formats import Format, batch_norms, convolutions
from .images import calibrated_on, compared_on
from .job import Job
from .notes import Notes
from .options import Options
from .parity import PARITIES, Golden, ParityRow, check_artifact
from .prepare import Pair, prepare
from .quantize import HELD_OUT, TaskMetric, quantize
from .records import count_norms, model_record, plan_record
from .report import JSON_NAME, ArtifactRecord, ParityRecord, Record, Report, size_of
from .shipping import ship
from .source import Source

REJECTED = 'rejected'
RANDOM_WEIGHTS = 'random weights: fine for latency, meaningless for accuracy'
UNVERIFIED, INTERRUPTED = 'unverified', 'interrupted'
#: Images that ranges of channels are made equal on, for int8.
EQUALIZE_IMAGES = 32


@dataclass
class Compared:
    """What comparing one file found.

    Args:
        rows: One per output; none where nothing here runs the file.
        status: 'ok', 'FAILED' or 'unverified'.
        runtime: What ran the file.
        precision: What that computed in.
    """

    rows: list[ParityRow]
    status: str
    runtime: str | None = None
    precision: str | None = None


class Export:
    """One run: everything that can be refused is refused before the first artifact is written.

    Args:
        source: The model.
        options: What is asked for.
        folder: Where to.
        log: Where progress is printed.
    """

    def __init__(self, source: Source, options: Options, folder: Path, log: Console) -> None:
        self.folder, self.options, self.notes = folder, options, Notes(log)
        self.prepared = prepare(source, options, self.notes)
        self.pairs = [*self.prepared.pairs]
        self.model = model_record(self.prepared)
        self.report = Report(folder, self.model)
        self.earlier: Report | None = None
        self.failed: list[tuple[str, Exception]] = []
        self.equalized: dict[Any, Job] = {}
        if options.dtype == 'int8':  # refused before there is a folder
            check_pictures(calibrated_on(self.prepared, self.prepared.sizes[0])[:HELD_OUT])
        make_folder(folder)
        self._check_nothing_is_lost()

    def _check_nothing_is_lost(self) -> None:
        """Refuse to replace artifacts, or to mix those of several models, unless forced."""
        self.earlier = None
        if (self.folder / JSON_NAME).exists():
            with contextlib.suppress(UsageError):
                self.earlier = Report.load(self.folder)
        same = self.earlier is not None and self.model.same_as(self.earlier.model)
        if self.earlier is not None and same and self.earlier.status == INTERRUPTED:
            finished = {self.folder / record.path for record in self.earlier.artifacts}
            done = [p for p in self.pairs if (own := self.path_of(p)) in finished and own.exists()]
            if done and len(done) < len(self.pairs) and not self.options.force:
                self.notes.say(
                    f'going on after {len(done)} artifacts of the run that was interrupted'
                )
                self.pairs = [pair for pair in self.pairs if pair not in done]
        there = [path for pair in self.pairs if (path := self.path_of(pair)).exists()]
        if there and not self.options.force:
            raise UsageError(f'{there[0]} exists already; add --force to replace it.')
        if self.earlier is not None and not same:
            if not self.options.force:
                raise UsageError(
                    f'{self.folder} holds artifacts of another model or other weights; give '
                    'another --work-dir, or add --force to report on the new ones alone.'
                )
            self.earlier = None

    def path_of(self, pair: Pair) -> Path:
        """Where an artifact goes."""
        return self.folder / self.prepared.path_of(pair)

    # --- the work

    def run(self) -> Report:
        """Write every artifact that can be written, and the report.

        Raises:
            ExportError, ParityError, SomeFailedError: After the report is written.
            UsageError: Another process writes into the folder.
        """
        try:
            with owned(self.folder):
                self._check_nothing_is_lost()  # by a run that ended since
                return self._export_all()
        finally:
            with contextlib.suppress(OSError):  # what was refused leaves no empty folder
                self.folder.rmdir()

    def _export_all(self) -> Report:
        report = self.report
        report.plans = [plan_record(self.prepared, plan) for plan in self.prepared.fused]
        if self.prepared.source.weights == 'random':
            self.notes.warn(RANDOM_WEIGHTS)
        with self._saved_if_interrupted(), partial_folder(self.folder) as partial:
            goldens: dict[str, list[Golden]] = {}
            for n, (row, job) in enumerate(self.pairs, 1):
                name = f'{job.metadata["golden"]} {job.dynamic}'
                if name not in goldens:
                    goldens[name] = self._goldens(job, partial)
                self.notes.say(f'[{n}/{len(self.pairs)}] {row.name}')
                try:
                    with disk_errors(self.folder):
                        self._one(row, job, goldens[name], partial)
                except (ExportError, ParityError, DependencyError) as error:
                    # Without its traceback, which keeps files open that fill the disk.
                    self.failed.append((row.name, type(error)(str(error))))
                    self.notes.say(f'      FAILED: {error}')
                    for left in partial.iterdir():
                        remove(left)
        report.failures = [{'format': name, 'reason': str(error)} for name, error in self.failed]
        with disk_errors(self.folder):
            self._finish('failed' if self.failed else 'ok')
        return report

    @contextlib.contextmanager
    def _saved_if_interrupted(self) -> Iterator[None]:
        """Report what was finished before Ctrl-C, so that the next run goes on from there."""
        try:
            yield
        except KeyboardInterrupt:
            if self.report.artifacts:
                self._finish(INTERRUPTED)
            raise

    def _finish(self, status: str) -> None:
        """Write the report, and what ships beside complete artifacts."""
        report = self.report
        report.status = status
        report.warnings, report.skipped = self.notes.warnings, self.notes.skipped
        if self.earlier is not None:
            report.keep(self.earlier)
        if self.prepared.settings is not None and report.artifacts and status != INTERRUPTED:
            ship(self.folder, self.prepared.settings, report.artifacts)
        report.save()

    def raise_failures(self) -> None:
        """Raise what stopped a format, if anything did."""
        if not self.failed:
            return
        error = self.failed[0][1]
        if len(self.failed) == len(self.pairs) and len({type(e) for _, e in self.failed}) == 1:
            raise error
        raise SomeFailedError(
            f'{len(self.failed)} of {len(self.pairs)} artifacts failed: '
            + '; '.join(f'{name}: {error}' for name, error in self.failed)
        )

    # --- what is expected

    def _goldens(self, job: Job, partial: Path) -> list[Golden]:
        """What the model itself makes of the images to compare on; the first is kept."""
        items: list[Golden] = []
        name = self.prepared.source.name
        for inputs in compared_on(self.prepared, job):
            shape = tuple(inputs['image'].shape)
            try:
                items.append(self._golden(job, inputs))
            except (ValueError, RuntimeError) as error:
                text = ' '.join(str(error).split())
                if shape == job.shape:
                    raise ModelError(f'{name} cannot compute {shape}: {text}') from error
                raise UsageError(
                    f'--dynamic {job.dynamic} is not possible for {name}: {text} '
                    'Export one artifact per size: --size 512,800x1344.'
                ) from error
        file = job.metadata['golden']
        with disk_errors(self.folder):
            items[0].save(partial / file)
            place(partial / file, self.folder / file)
        return items

    def _golden(self, job: Job, inputs: dict[str, Tensor]) -> Golden:
        fused = self.prepared.fused[job.metadata['plan']]
        with muffled():
            parity = PARITIES[job.target.task]
            return parity.golden(job.target, self.prepared.reference, fused, inputs)

    # --- one artifact

    def _one(self, row: Format, job: Job, goldens: list[Golden], partial: Path) -> None:
        """Export, inspect and compare one artifact, and move it to where it belongs."""
        target = self.path_of((row, job))
        written = partial / target.name
        start = time.perf_counter()
        try:
            quantization = self._write(row, job, written)
        except (OSError, UserError):
            raise
        except Exception as error:
            with disk_errors(self.folder):
                raise ExportError(f'{row.name} could not be exported: {_short(error)}') from error
        seconds = time.perf_counter() - start
        with muffled():
            operations = row.operations(row.file(written))
        self._check_norms(row, job, operations)
        compared = self._compare(row, job, written, goldens)
        metric = self._metric(row, job, written) if compared.status == 'ok' else None
        if metric and metric['value'] < metric['reference'] - metric['max_drop']:
            compared.status = 'FAILED'
        if compared.status == 'FAILED':
            rejected = self.folder / REJECTED
            rejected.mkdir(exist_ok=True)
            target = rejected / target.name
        place(written, target)
        for name in row.companions:
            shutil.copy(Path(__file__).with_name(name), self.folder)
        self._record(row, job, target, operations, compared, quantization, metric, seconds)
        if compared.status == 'FAILED':
            self._raise_parity(row, job, compared.rows, metric, target)
        self.notes.say(
            f'      {compared.status}: {shown(target)} '
            f'({size_of(target) / 1e6:.1f} MB, {seconds:.1f} s)'
        )

    def _record(
        self,
        row: Format,
        job: Job,
        target: Path,
        operations: Counter[str],
        compared: Compared,
        quantization: Record | None,
        metric: Record | None,
        seconds: float,
    ) -> None:
        path = str(target.relative_to(self.folder))
        self.report.parity += [
            ParityRecord(
                path,
                row.name,
                compared.runtime,
                compared.precision,
                r.output,
                r.passed,
                r.text,
                dict(r.measures),
            )
            for r in compared.rows
        ]
        self.report.artifacts.append(
            ArtifactRecord(
                format=row.name,
                path=path,
                golden=job.metadata['golden'],
                status=compared.status,
                sha256=digest(target),
                bytes=size_of(target),
                opset=job.opset if 'opset' in row.options else None,
                dtype=job.dtype,
                plan=job.metadata['plan'],
                why=self.prepared.why[row.name],
                size=list(job.size),
                batch=job.batch,
                dynamic=job.dynamic,
                inputs=job.input_names,
                outputs=list(job.target.output_names),
                operations=dict(operations.most_common()),
                bn_left=batch_norms(operations),
                convs=convolutions(operations),
                metadata=job.metadata,
                quantization=quantization,
                metric=metric,
                tolerance=asdict(self.options.tolerance(job.dtype)),
                seconds=round(seconds, 2),
            )
        )

    def _check_norms(self, row: Format, job: Job, operations: Counter[str]) -> None:
        """Refuse norms that fusing should have removed."""
        left = batch_norms(operations)
        expected = count_norms(self.prepared.fused[job.metadata['plan']])
        if job.metadata['plan'] != 'upstream' and left > expected:
            raise ExportError(
                f'{row.name} holds {left} BatchNorm, though plan {job.metadata["plan"]} leaves '
                f'{expected or "none"}; please report this.'
            )

    def _raise_parity(
        self,
        row: Format,
        job: Job,
        rows: Sequence[ParityRow],
        metric: Record | None,
        target: Path,
    ) -> None:
        worst = next((r for r in rows if not r.passed), None)
        if worst is None and metric is not None:
            raise ParityError(
                '{name} is {value:.2f} with {label}, {reference:.2f} with PyTorch, which is more '
                'than --max-drop {max_drop:g} points less; it was moved to {target}.'.format(
                    **metric, label=row.name, target=target
                )
            )
        assert worst is not None
        raise ParityError(
            f'{row.name} differs from the network in {worst.output}: {worst.text} (allowed: '
            f'{self.options.tolerance(job.dtype).text(job.target.task)}); it was moved to {target}.'
        )

    def _write(self, row: Format, job: Job, written: Path) -> Record | None:
        """Export to `written`; int8 from the float32 artifact, with a record of what was done."""
        if job.dtype != 'int8':
            with muffled():
                row.export(job, written)
            return None
        full = written.with_name(f'fp32{row.suffix}')
        with muffled():
            row.export(self._equalized(job).for_format(row.name), full)
        report = quantize(
            full,
            written,
            calibrated_on(self.prepared, job.size),
            gate_db=self.options.gate(job.target.task),
            metric=None if self.options.max_drop is None else self._task_metric(),
            say=lambda text: self.notes.say(f'      {text}'),
        )
        return report.as_record()

    def _equalized(self, job: Job) -> Job:
        """The job in float32, with equal ranges where a convolution reads; traced once as well."""
        prepared, key = self.prepared, (job.size, job.metadata['plan'], job.dynamic)
        if key not in self.equalized:
            model = copy.deepcopy(prepared.fused[job.metadata['plan']])
            target = prepared.target_of(model).eval()
            pictures = calibrated_on(prepared, job.size)[HELD_OUT : HELD_OUT + EQUALIZE_IMAGES]
            images = [target.prepared(torch.from_numpy(picture)) for picture in pictures]
            networks = [module for module in model.modules() if isinstance(module, Network)]
            layers = [name for network in networks for name in equalize(network, images)]
            metadata = job.metadata | {'dtype': 'fp32', 'equalized': len(layers)}
            self.equalized[key] = job.of(target, dtype='fp32', metadata=metadata)
        return self.equalized[key]

    def _task_metric(self) -> TaskMetric:
        source, max_drop = self.prepared.source, self.options.max_drop
        assert source.config and source.checkpoint and max_drop is not None, 'refused before'
        return TaskMetric(source.config, source.checkpoint, max_drop=max_drop, scope=source.scope)

    def _metric(self, row: Format, job: Job, written: Path) -> Record | None:
        """The task metric of an artifact beside PyTorch's, where it is asked for."""
        if self.options.max_drop is None or job.dtype == 'int8' or row.runtime is None:
            return None
        metric = self._task_metric()
        self.notes.say('      evaluating PyTorch and the artifact')
        name, reference = metric(None)
        value = metric(row.file(written))[1]
        self.notes.say(f'      {name} {value:.2f}, {reference:.2f} in PyTorch')
        return {
            'name': name,
            'value': value,
            'reference': reference,
            'max_drop': metric.max_drop,
        }

    def _compare(self, row: Format, job: Job, written: Path, goldens: list[Golden]) -> Compared:
        """Run a file on the images to compare on, where anything here runs it."""
        if row.runtime is None or self.options.parity == 'off':
            return Compared([], UNVERIFIED)
        tolerance = self.options.tolerance(job.dtype)
        try:
            with open_artifact(row.file(written), trust=True) as artifact:
                rows = check_artifact(artifact, goldens, tolerance)
                passed = bool(rows) and all(each.passed for each in rows)
                status = 'ok' if passed else 'FAILED'
                return Compared(rows, status, artifact.runtime, artifact.precision)
        except ArtifactError as error:
            raise ExportError(
                f'{row.name} was written, but its runtime does not accept it: {error}'
            ) from error


def _short(error: Exception, limit: int = 300) -> str:
    """An error of another package, in one line of bearable length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f'{text[:limit]} ...'

"""From a model to proven artifacts in a folder: fuse, export, inspect, compare, report."""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones.classifier import Classifier
from ..classification import TimmClassifier
from ..complexity import count_macs, count_parameters
from ..engine.errors import UserError
from ..engine.quiet import muffled
from ..network import Network, Plan
from ..reparam import equalize, prove, reparameterize
from ..reparam.fusion import INEXACT
from ..reparam.verify import noise
from ..runtimes import ArtifactError, open_artifact, unpadded
from ..runtimes.predictor import digest
from ..version import __version__
from .bench import choose_plan
from .calibration import (
    ENOUGH_IMAGES,
    IMAGENET,
    MIN_IMAGES,
    RAW,
    calibration_images,
    check_pictures,
    cover,
    load_picture,
)
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
from .fusing import fused_model, inexact_kinds
from .job import Job
from .options import Options
from .parity import PARITIES, Golden, ParityRow, check_artifact, other_shapes
from .quantize import HELD_OUT, TaskMetric, quantize
from .report import (
    JSON_NAME,
    ArtifactRecord,
    ModelRecord,
    ParityRecord,
    PlanRecord,
    Record,
    Report,
    size_of,
)
from .shipping import Unshippable, settings_of, ship
from .source import Source
from .targets import (
    IMAGE_SIZE,
    INPUT,
    OUT_SIZE,
    BackboneTarget,
    ClassifierTarget,
    DetectorTarget,
    Preprocess,
    SegmentorTarget,
    Target,
)

REJECTED = 'rejected'
RANDOM_WEIGHTS = 'random weights: fine for latency, meaningless for accuracy'
UNVERIFIED, INTERRUPTED = 'unverified', 'interrupted'
#: Why each plan, where it was not measured.
WHY: dict[Plan, str] = {
    'full': 'no BatchNorm left, and the same function at every size',
    'upstream': 'as the published code fuses; each block keeps a BatchNorm',
    'single': 'one depthwise convolution per token mixer',
}
#: Images that ranges of channels are made equal on, for int8.
EQUALIZE_IMAGES = 32
#: The open dimensions that a complete model is given where none are named, the most first.
MOST_OPEN = ('batch-hw', 'hw', 'batch', 'none')


class Export:
    """One run: everything that can be refused is refused before the first artifact is written.

    Args:
        source: The model.
        options: What is asked for.
        folder: Where to.
        log: Where progress is printed.
    """

    def __init__(self, source: Source, options: Options, folder: Path, log: Console) -> None:
        self.source, self.options, self.folder, self.log = source, options, folder, log
        self.report = Report(folder, _empty_record())
        self.failed: list[tuple[str, Exception]] = []
        self.equalized: dict[Any, Job] = {}
        self.complete = source.scope == 'model'
        self.sizes = options.sizes or [source.size]
        self._check_combinations()
        parity_input = options.parity_input
        self.picture = load_picture(parity_input, source.loader) if parity_input else None
        self.preprocess = self._preprocess()
        self.target = self._target(source.model)
        self.formats = self._usable_formats()
        for size in self.sizes:
            self._check_size(size)
        self.plans = {row.name: self._plan(row) for row in self.formats}
        self.fused = {plan: self._fuse(plan) for plan, _ in self.plans.values()}
        # What is inexact was asked for by name: it is reported, and what is exported is compared.
        inexact = [model for model in self.fused.values() if inexact_kinds(model)]
        self.reference: Any = inexact[0] if inexact else source.model
        self.settings = self._settings()
        self.jobs = [(row, job) for size in self.sizes for row, job in self._jobs(size)]
        if options.dtype == 'int8':  # refused before there is a folder
            check_pictures(self._calibration(self.jobs[0][1], self.sizes[0])[:HELD_OUT])
        make_folder(folder)
        self._check_nothing_is_lost()

    # --- before anything is written

    def _check_combinations(self) -> None:
        source, options = self.source, self.options
        if options.dtype == 'int8' and options.calib is None:
            raise UsageError(
                '--dtype int8 needs --calib, a folder of images like those it will see, or a '
                'config whose data set has some.'
            )
        if options.dtype == 'int8' and options.calib_images + HELD_OUT < MIN_IMAGES:
            raise UsageError(
                f'--calib-images {options.calib_images} is too few to know the ranges of values; '
                f'give {MIN_IMAGES - HELD_OUT} at least, better {ENOUGH_IMAGES}.'
            )
        if options.max_drop is not None and not (source.config and source.checkpoint):
            raise UsageError('--max-drop needs a config as MODEL and its CHECKPOINT to evaluate.')
        if self.complete and options.plan == 'auto':
            raise UsageError('--plan auto is for --scope backbone; name a plan.')
        if not self.complete and (options.nms, options.output) != ('graph', 'classes'):
            raise UsageError('--nms and --output are for --scope model, and this is a backbone.')

    def _target(self, model: nn.Module) -> Target:
        """What is exported, over a form of the model."""
        if not self.complete:
            return BackboneTarget(model, self.preprocess)  # type: ignore[arg-type]
        if isinstance(model, TimmClassifier):
            if (self.options.nms, self.options.output) != ('graph', 'classes'):
                raise UsageError('--nms and --output are not for classifiers, and this is one.')
            return ClassifierTarget(model, self.preprocess)
        if hasattr(model, 'decode_head'):
            if self.options.nms != 'graph':
                raise UsageError('--nms is for detectors, and this is a segmentor.')
            return SegmentorTarget(model, self.preprocess, output=self.options.output)
        if self.options.output != 'classes':
            raise UsageError('--output is for segmentors, and this is a detector.')
        return DetectorTarget(model, self.preprocess, nms=self.options.nms)

    def _usable_formats(self) -> list[Format]:
        """The formats that can be written; a named one that cannot stops the run."""
        usable = []
        for row, named in self.options.formats:
            try:
                row.check_installed(self.options.dtype)
                self._check_options(row)
                for warning in row.warnings():
                    self.warn(f'{row.name}: {warning}')
                    if self.options.strict:
                        raise DependencyError(f'--strict: {row.name}: {warning}.')
            except (DependencyError, UsageError) as error:
                if named:
                    raise
                self.skip(row, error)
            else:
                usable.append(row)
        if not usable:
            raise DependencyError(
                'none of the formats can be written here: '
                + '; '.join(f'{s["format"]}: {s["reason"]}' for s in self.report.skipped)
            )
        return usable

    def _check_options(self, row: Format) -> None:
        options = self.options
        if options.dtype and options.dtype not in row.dtypes:
            raise UsageError(
                f'--dtype {options.dtype} is not possible for {row.name}; it has '
                f'{", ".join(row.dtypes)}.'
            )
        if reason := row.refuse_target(self.target) or self.target.refuse(row.name, 'none'):
            raise UsageError(f'--format {row.name} is not possible for this model: {reason}.')
        dynamic = self._dynamic(row)
        if reason := row.refuse_dynamic(dynamic) or self.target.refuse(row.name, dynamic):
            raise UsageError(f'--dynamic {dynamic} is not possible for {row.name}: {reason}.')
        if options.preprocess == 'embed' and not row.has_operations:
            raise UsageError(
                f'--preprocess embed is not possible for {row.name}: it holds weights alone, and '
                'the data_preprocessor of the config they are loaded in normalises the images.'
            )
        if 'opset' in row.options and (options.opset or 0) > self.target.most_opset:
            raise UsageError(
                f'--opset {options.opset} is not possible for two-stage detectors: ONNX Runtime '
                f'has no RoiAlign of it; give --opset {self.target.most_opset} or lower.'
            )
        for name in options.others:
            if not any(name in other.options for other, _ in options.formats):
                raise UsageError(
                    f'--{name.replace("_", "-")} is not an option of {row.name}; leave it out.'
                )

    def _dynamic(self, row: Format) -> str:
        """The open dimensions of a format: those asked for, or of a complete model all it can."""
        if self.options.dynamic is not None:
            return self.options.dynamic
        if not self.complete:
            return 'none'
        return next(
            d for d in MOST_OPEN if not (row.refuse_dynamic(d) or self.target.refuse(row.name, d))
        )

    def _check_size(self, size: tuple[int, int]) -> None:
        stride = self.target.step
        for side in size:
            left = side % stride
            if left and not self.options.allow_odd:
                below = [f'{side - left}'] if side > stride else []
                either = ' or '.join([*below, f'{side - left + stride}'])
                raise UsageError(
                    f'--size {side}: stride {stride} leaves {left} px; use {either}, or '
                    '--allow-odd to export and compare at this very size.'
                )

    def _preprocess(self) -> Preprocess | None:
        """What is built into the artifacts."""
        asked = self.options.preprocess
        if asked == 'none' or (asked is None and not self.complete):
            return None
        preprocess = Preprocess.of(self.source.preprocessor)
        if preprocess is None and asked == 'embed':
            raise UsageError(
                '--preprocess embed needs a config whose data_preprocessor has mean and std; '
                f'{self.source.config or self.source.name} has none.'
            )
        return preprocess

    def _plan(self, row: Format) -> tuple[Plan, str]:
        """The plan for a format, and why."""
        options = self.options
        if options.plan != 'auto':
            plan: Any = options.plan
            return plan, WHY[plan]
        self.say(f'measuring plans for {row.name}')
        shape = (options.batch, 3, *self.sizes[0])
        dtype = options.dtype or row.dtypes[0]
        choice = choose_plan(
            self.source.model, row, shape, dtype='fp32' if dtype == 'int8' else dtype
        )
        self.say(f'      {choice.plan}: {choice.why}')
        return choice.plan, choice.why

    def _fuse(self, plan: Plan) -> nn.Module:
        model = fused_model(self.source, plan)
        for kind in sorted(inexact_kinds(model)):
            self.warn(
                f'plan {plan} is not exact ({INEXACT[kind]}): artifacts are compared with the '
                'fused network, and proof_float64 in report.json says how far that is off'
            )
        return model

    def _jobs(self, size: tuple[int, int]) -> list[tuple[Format, Job]]:
        """One job per dtype, plan and open dimensions, shared by formats: each is traced once."""
        jobs: dict[tuple[str, Plan, str], Job] = {}
        pairs = []
        for row in self.formats:
            dtype = self.options.dtype or row.dtypes[0]
            key = dtype, self.plans[row.name][0], self._dynamic(row)
            if key not in jobs:
                jobs[key] = self._job(size, *key)
            job = jobs[key]
            pairs.append((row, job.for_format(row.name)))
        return pairs

    def _job(self, size: tuple[int, int], dtype: str, plan: Plan, dynamic: str) -> Job:
        source, options = self.source, self.options
        target = self._target(self.fused[plan]).eval()
        others = options.others
        job = Job(target, size, {}, batch=options.batch, dynamic=dynamic, dtype=dtype, **others)
        job.settings = self.settings or {}
        job.metadata = {
            'version': __version__,
            'title': f'{source.name}, {source.family}, fused with plan {plan}',
            'task': target.task,
            'family': source.family,
            'arch': source.arch,
            'plan': plan,
            **target.description(),
            'inputs': job.input_names,
            'outputs': list(target.output_names),
            'size': list(size),
            'batch': options.batch,
            'dynamic': dynamic,
            'least_side': target.least_side,
            'dtype': dtype,
            'weights': source.weights,
            'checkpoint_sha256': source.checkpoint_sha256,
            'layout': 'NCHW',
            'device': others.get('device', 'cpu'),
            'preprocess': asdict(self.preprocess) if self.preprocess else None,
            'golden': golden_name(size, options.batch, dtype, self.preprocess, target),
        }
        return job

    def _settings(self) -> Record | None:
        """What goes into model.json; None for a backbone, or where no predictor is written."""
        if not self.complete:
            return None
        try:
            return settings_of(self.source, self.target)
        except Unshippable as error:
            if any(row.name == 'web' for row in self.formats):
                raise UsageError(
                    f'--format web is not possible for this config: {error}.'
                ) from error
            self.warn(f'no model.json and no predict.py is written: {error}')
            return None

    def _check_nothing_is_lost(self) -> None:
        """Refuse to replace artifacts, or to mix those of several models, unless forced."""
        self.earlier = None
        if (self.folder / JSON_NAME).exists():
            with contextlib.suppress(UsageError):
                self.earlier = Report.load(self.folder)
        same = self.earlier is not None and self._model_record().same_as(self.earlier.model)
        if self.earlier is not None and same and self.earlier.status == INTERRUPTED:
            finished = {self.folder / record.path for record in self.earlier.artifacts}
            done = [p for p in self.jobs if (own := self.path_of(p)) in finished and own.exists()]
            if done and len(done) < len(self.jobs) and not self.options.force:
                self.say(f'going on after {len(done)} artifacts of the run that was interrupted')
                self.jobs = [pair for pair in self.jobs if pair not in done]
        there = [path for pair in self.jobs if (path := self.path_of(pair)).exists()]
        if there and not self.options.force:
            raise UsageError(f'{there[0]} exists already; add --force to replace it.')
        if self.earlier is not None and not same:
            if not self.options.force:
                raise UsageError(
                    f'{self.folder} holds artifacts of another model or other weights; give '
                    'another --work-dir, or add --force to report on the new ones alone.'
                )
            self.earlier = None

    def path_of(self, pair: tuple[Format, Job]) -> Path:
        """Where an artifact goes: `NAME_512x512_b1_PLAN_DTYPE`, and what is open in it."""
        row, job = pair
        height, width = job.size
        parts = [
            self.source.name,
            f'{height}x{width}',
            f'b{job.batch}',
            job.metadata['plan'],
            job.dtype,
        ]
        parts += [job.dynamic] if job.dynamic != 'none' else []
        if self.preprocess and not self.complete:
            parts += ['raw']
        if self.complete and not self.preprocess and Preprocess.of(self.source.preprocessor):
            parts += ['normalized']
        parts += ['host'] if self.options.nms == 'host' else []
        parts += ['logits'] if self.options.output == 'logits' else []
        parts += [job.device] if job.device != 'cpu' and 'device' in row.options else []
        return self.folder / ('_'.join(parts) + row.suffix)

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
        report.model = self._model_record()
        report.plans = [self._plan_record(plan) for plan in self.fused]
        if self.source.weights == 'random':
            self.warn(RANDOM_WEIGHTS)
        with self._saved_if_interrupted(), partial_folder(self.folder) as partial:
            goldens: dict[str, list[Golden]] = {}
            for n, (row, job) in enumerate(self.jobs, 1):
                name = f'{job.metadata["golden"]} {job.dynamic}'
                if name not in goldens:
                    goldens[name] = self._goldens(job, partial)
                self.say(f'[{n}/{len(self.jobs)}] {row.name}')
                try:
                    with disk_errors(self.folder):
                        self._one(row, job, goldens[name], partial)
                except (ExportError, ParityError, DependencyError) as error:
                    # Without its traceback, which keeps files open that fill the disk.
                    self.failed.append((row.name, type(error)(str(error))))
                    self.say(f'      FAILED: {error}')
                    for left in partial.iterdir():
                        remove(left)
        if self.earlier is not None:
            report.keep(self.earlier)
        report.failures = [{'format': name, 'reason': str(error)} for name, error in self.failed]
        report.status = 'failed' if self.failed else 'ok'
        with disk_errors(self.folder):
            if self.settings is not None and report.artifacts:
                ship(self.folder, self.settings, report.artifacts)
            report.save()
        return report

    @contextlib.contextmanager
    def _saved_if_interrupted(self) -> Iterator[None]:
        """Report what was finished before Ctrl-C, so that the next run goes on from there."""
        try:
            yield
        except KeyboardInterrupt:
            if self.report.artifacts:
                if self.earlier is not None:
                    self.report.keep(self.earlier)
                self.report.status = INTERRUPTED
                self.report.save()
            raise

    def raise_failures(self) -> None:
        """Raise what stopped a format, if anything did."""
        if not self.failed:
            return
        error = self.failed[0][1]
        if len(self.failed) == len(self.jobs) and len({type(e) for _, e in self.failed}) == 1:
            raise error
        raise SomeFailedError(
            f'{len(self.failed)} of {len(self.jobs)} artifacts failed: '
            + '; '.join(f'{name}: {error}' for name, error in self.failed)
        )

    def _goldens(self, job: Job, partial: Path) -> list[Golden]:
        """What the model itself makes of the images to compare on; the first is kept."""
        items: list[Golden] = []
        for inputs in self._inputs(job):
            shape = tuple(inputs['image'].shape)
            try:
                items.append(self._golden(job, inputs))
            except (ValueError, RuntimeError) as error:
                text = ' '.join(str(error).split())
                if shape == job.shape:
                    raise ModelError(
                        f'{self.source.name} cannot compute {shape}: {text}'
                    ) from error
                raise UsageError(
                    f'--dynamic {job.dynamic} is not possible for {self.source.name}: {text} '
                    'Export one artifact per size: --size 512,800x1344.'
                ) from error
        name = job.metadata['golden']
        with disk_errors(self.folder):
            items[0].save(partial / name)
            place(partial / name, self.folder / name)
        return items

    def _golden(self, job: Job, inputs: dict[str, Tensor]) -> Golden:
        fused = self.fused[job.metadata['plan']]
        with muffled():
            return PARITIES[job.target.task].golden(job.target, self.reference, fused, inputs)

    def _inputs(self, job: Job) -> list[dict[str, Tensor]]:
        """The images to compare on: as exported, blank for a complete model, of other shapes."""
        shapes: list[tuple[int, int, int, int]] = [job.shape]
        stride = self.target.step if not self.complete else 32
        shapes += other_shapes(job.shape, job.dynamic, stride)
        images = [self._image(job, shape) for shape in shapes]
        # int8 is calibrated for no blank image, whose logits would have to be right.
        calibrated = job.dtype == 'int8' and self.target.task == 'classification'
        images += [torch.zeros(job.shape)] if self.complete and not calibrated else []
        found = []
        for number, image in enumerate(images):
            arrays = unpadded([INPUT, *self.target.extras], image.numpy())
            inputs = {name: torch.from_numpy(value) for name, value in arrays.items()}
            if IMAGE_SIZE in inputs and number == 1:  # padded on the right and below
                height, width = image.shape[2:]
                inputs[IMAGE_SIZE] -= torch.tensor([height // 5, width // 7])
                self._clear(image, inputs[IMAGE_SIZE])
            elif OUT_SIZE in inputs and number:
                inputs[OUT_SIZE] = inputs[OUT_SIZE] * 5 // 4 + 3
            found.append(inputs)
        return found

    @staticmethod
    def _clear(image: Tensor, sizes: Tensor) -> None:
        """Write zeros outside of the sizes, in place."""
        for own, (height, width) in zip(image, sizes.int().tolist()):
            own[:, height:], own[:, :, width:] = 0, 0

    def _image(self, job: Job, shape: tuple[int, int, int, int]) -> Tensor:
        if job.dtype == 'int8':
            picture = torch.from_numpy(self._calibration(job, shape[2:])[0])
        elif self.picture is not None:
            picture = self._applied().apply(cover(self.picture[None], shape[2:]))
        else:
            image = noise(shape, self.options.seed)
            picture = self.preprocess.undo(image) if self.preprocess else image
        if self.complete and self.preprocess:  # as images are loaded
            picture = picture.round().clamp(0, 255)
        return picture.expand(shape).contiguous()

    def _applied(self) -> Preprocess:
        """What is done to an image as loaded, before it is given to an artifact."""
        return RAW if self.preprocess else Preprocess.of(self.source.preprocessor) or IMAGENET

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
        rows, status, runtime, precision = self._compare(row, job, written, goldens)
        metric = self._metric(row, job, written) if status == 'ok' else None
        if metric and metric['value'] < metric['reference'] - metric['max_drop']:
            status = 'FAILED'
        if status == 'FAILED':
            rejected = self.folder / REJECTED
            rejected.mkdir(exist_ok=True)
            target = rejected / target.name
        place(written, target)
        for name in row.companions:
            shutil.copy(Path(__file__).with_name(name), self.folder)
        path = str(target.relative_to(self.folder))
        self.report.parity += [
            ParityRecord(
                path, row.name, runtime, precision, r.output, r.passed, r.text, dict(r.measures)
            )
            for r in rows
        ]
        tolerance = self.options.tolerance(job.dtype)
        self.report.artifacts.append(
            ArtifactRecord(
                format=row.name,
                path=path,
                golden=job.metadata['golden'],
                status=status,
                sha256=digest(target),
                bytes=size_of(target),
                opset=job.opset if 'opset' in row.options else None,
                dtype=job.dtype,
                plan=job.metadata['plan'],
                why=self.plans[row.name][1],
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
                tolerance=asdict(tolerance),
                seconds=round(seconds, 2),
            )
        )
        if status == 'FAILED':
            self._raise_parity(row, job, rows, metric, target)
        self.say(
            f'      {status}: {shown(target)} ({size_of(target) / 1e6:.1f} MB, {seconds:.1f} s)'
        )

    def _check_norms(self, row: Format, job: Job, operations: Counter[str]) -> None:
        """Refuse norms that fusing should have removed."""
        left = batch_norms(operations)
        model = self.fused[job.metadata['plan']]
        expected = sum(isinstance(module, _BatchNorm) for module in model.modules())
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
        metric = None
        if self.options.max_drop is not None:
            metric = self._task_metric()
        report = quantize(
            full,
            written,
            self._calibration(job, job.size),
            gate_db=self.options.gate(job.target.task),
            metric=metric,
            say=lambda text: self.say(f'      {text}'),
        )
        return report.as_record()

    def _equalized(self, job: Job) -> Job:
        """The job in float32, with equal ranges where a convolution reads; traced once as well."""
        key = job.size, job.metadata['plan'], job.dynamic
        if key not in self.equalized:
            model = copy.deepcopy(self.fused[job.metadata['plan']])
            target = self._target(model).eval()
            pictures = self._calibration(job, job.size)[HELD_OUT : HELD_OUT + EQUALIZE_IMAGES]
            images = [target.prepared(torch.from_numpy(picture)) for picture in pictures]
            networks = [module for module in model.modules() if isinstance(module, Network)]
            layers = [name for network in networks for name in equalize(network, images)]
            metadata = job.metadata | {'dtype': 'fp32', 'equalized': len(layers)}
            self.equalized[key] = job.of(target, dtype='fp32', metadata=metadata)
        return self.equalized[key]

    def _task_metric(self) -> TaskMetric:
        config, checkpoint = self.source.config, self.source.checkpoint
        assert config and checkpoint and self.options.max_drop is not None, 'refused before'
        return TaskMetric(
            config,
            checkpoint,
            max_drop=self.options.max_drop,
            scope='model' if self.complete else 'backbone',
        )

    def _metric(self, row: Format, job: Job, written: Path) -> Record | None:
        """The task metric of an artifact beside PyTorch's, where it is asked for."""
        if self.options.max_drop is None or job.dtype == 'int8' or row.runtime is None:
            return None
        metric = self._task_metric()
        self.say('      evaluating PyTorch and the artifact')
        name, reference = metric(None)
        value = metric(row.file(written))[1]
        self.say(f'      {name} {value:.2f}, {reference:.2f} in PyTorch')
        return {
            'name': name,
            'value': value,
            'reference': reference,
            'max_drop': metric.max_drop,
        }

    def _calibration(self, job: Job, size: tuple[int, int]) -> Sequence[np.ndarray]:
        """Images as the artifact requires them; the first `HELD_OUT` are not calibrated on."""
        assert self.options.calib is not None, 'refused before'
        return calibration_images(
            self.options.calib,
            size,
            RAW if self.preprocess else Preprocess.of(self.source.preprocessor),
            limit=self.options.calib_images + HELD_OUT,
            loader=self.source.loader,
        )

    def _compare(
        self, row: Format, job: Job, written: Path, goldens: list[Golden]
    ) -> tuple[list[ParityRow], str, str | None, str | None]:
        """Parity rows, status, and what ran the artifact in which precision."""
        if row.runtime is None or self.options.parity == 'off':
            return [], UNVERIFIED, None, None
        tolerance = self.options.tolerance(job.dtype)
        try:
            with open_artifact(row.file(written), trust=True) as artifact:
                results = check_artifact(artifact, goldens, tolerance)
                runtime, precision = artifact.runtime, artifact.precision
        except ArtifactError as error:
            raise ExportError(
                f'{row.name} was written, but its runtime does not accept it: {error}'
            ) from error
        status = 'ok' if results and all(result.passed for result in results) else 'FAILED'
        return results, status, runtime, precision

    # --- records

    def _model_record(self) -> ModelRecord:
        source, size = self.source, self.sizes[0]
        fused = next(iter(self.fused.values()))
        counted: Any = _Features(fused) if self.complete else fused
        if isinstance(fused, TimmClassifier):  # its heads are of a fixed cost
            counted = fused.network
        return ModelRecord(
            name=source.name,
            task=self.target.task,
            scope=source.scope,
            family=source.family,
            arch=source.arch,
            config=source.config,
            checkpoint=source.checkpoint,
            checkpoint_sha256=source.checkpoint_sha256,
            container=source.container,
            weights_source=source.weights,
            seed=self.options.seed,
            params=count_parameters(fused),
            macs=count_macs(counted, size),
            size=list(size),
            details=self.target.description(),
        )

    def _plan_record(self, plan: Plan) -> PlanRecord:
        source, size = self.source, self.sizes[0]
        fused = self.fused[plan]
        own = [module for module in source.model.modules() if isinstance(module, Network)]
        proof: list[Record] = []
        if own:
            # Fused in float64, so that the difference is the rewrites' own and no rounding of
            # weights.
            exact = copy.deepcopy(own[0]).double()
            stages = prove(exact, reparameterize(exact, plan, accept_inexact=True), size)
            proof = [
                {'output': output, 'max_abs': stage.max_abs, 'max_rel': stage.max_rel}
                for output, stage in zip(self._outputs(own[0]), stages, strict=True)
            ]
        reports = [m.fusion_report for m in fused.modules() if isinstance(m, Network)]
        return PlanRecord(
            name=plan,
            steps=[asdict(step) for report in reports if report for step in report.rewrites],
            proof_float64=proof,
            bn_left=sum(isinstance(module, _BatchNorm) for module in fused.modules()),
            convs_before=_count_convolutions(source.model),
            convs_after=_count_convolutions(fused),
        )

    @staticmethod
    def _outputs(network: Any) -> list[str]:
        """Names of what a network returns."""
        if isinstance(network, Classifier):
            return ['logits']
        return [f'stage{i}' for i in network.out_indices]

    def warn(self, text: str) -> None:
        self.report.warnings.append(text)
        self.say(f'warning: {text}')

    def skip(self, row: Format, error: Exception) -> None:
        reason, _, fix = str(error).partition('; ')
        self.report.skipped.append({'format': row.name, 'reason': reason, 'fix': fix})
        self.say(f'skipped {row.name}: {error}')

    def say(self, text: str) -> None:
        self.log.print(text, highlight=False, markup=False, soft_wrap=True)


class _Features(nn.Module):
    """Backbone and neck of a complete model, whose operations are counted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model.extract_feat(image)


def _empty_record() -> ModelRecord:
    """Until the model is fused."""
    return ModelRecord('', '', '', '', '', None, None, None, '', '', 0, 0, 0, [0, 0], {})


def golden_name(
    size: tuple[int, int], batch: int, dtype: str, preprocess: Preprocess | None, target: Target
) -> str:
    """Artifacts for the same images share what they are compared with."""
    # int8 is compared on an image of its own: it has no range for noise.
    kind = '_int8' if dtype == 'int8' else ''
    raw = '_raw' if preprocess else ''
    task = '' if target.task == 'backbone' else f'_{target.task}'
    task += '_logits' if target.output_names == ('logits',) else ''
    return f'golden_{size[0]}x{size[1]}_b{batch}{kind}{raw}{task}.npz'


def _short(error: Exception, limit: int = 300) -> str:
    """An error of another package, in one line of bearable length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f'{text[:limit]} ...'


def _count_convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())

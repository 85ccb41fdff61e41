"""From a model to proven artifacts in a folder: fuse, export, inspect, compare, report."""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ..backbones import PyramidBackbone
from ..complexity import count_macs, count_parameters
from ..engine.errors import UserError
from ..engine.quiet import muffled
from ..network import FusionReport, Plan
from ..reparam import prove, reparameterize
from ..reparam.fusion import INEXACT
from ..reparam.verify import noise
from ..runtimes import ArtifactError, open_artifact
from ..version import __version__
from .bench import choose_plan
from .calibration import (
    ENOUGH_IMAGES,
    IMAGENET,
    RAW,
    calibration_images,
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
from .exporters import Job, Preprocess
from .folders import disk_errors, make_folder, owned, partial_folder, place, remove, shown
from .formats import Format
from .inspection import batch_norms, convolutions
from .parity import (
    TOLERANCES,
    Golden,
    Tolerance,
    check_artifact,
    golden,
    other_shapes,
)
from .quantize import GATE_DB, HELD_OUT, TaskMetric, quantize
from .report import JSON_NAME, Record, Report, digest, size_of
from .source import Source

REJECTED = 'rejected'
RANDOM_WEIGHTS = 'random weights: fine for latency, meaningless for accuracy'
UNVERIFIED = 'unverified'
#: Why each plan, where it was not measured.
WHY: dict[Plan, str] = {
    'full': 'no BatchNorm left, and the same function at every size',
    'upstream': 'as the published code fuses; each block keeps a BatchNorm',
    'single': 'one depthwise convolution per token mixer',
}


@dataclass(frozen=True)
class Options:
    """What an export is asked for, apart from the model.

    Args:
        formats: With whether each was named, rather than implied by `all`.
        sizes: Heights and widths; one set of artifacts for each.
        plan: How far to fuse; 'auto' measures, for each format, which exact plan is fastest.
        dtype: One for all formats; each format's own default where None.
        preprocess: Whether artifacts require images as they were loaded.
        parity: Whether to run what was written.
        parity_input: An image to compare on, instead of noise.
        calib: Folder of images or config that int8 is calibrated on.
        calib_images: At most so many of them.
        gate_db: Signal-to-noise ratio that every stage keeps in int8.
        max_drop: Points of AP or mIoU that int8 may lose; not measured where None.
        others: Options of single formats that were given.
    """

    formats: Sequence[tuple[Format, bool]]
    sizes: Sequence[tuple[int, int]] = ((512, 512),)
    batch: int = 1
    plan: Plan | Literal['auto'] = 'full'
    dtype: str | None = None
    dynamic: str = 'none'
    preprocess: bool = False
    parity: bool = True
    parity_input: Path | None = None
    allow_odd: bool = False
    force: bool = False
    strict: bool = False
    seed: int = 0
    calib: Path | None = None
    calib_images: int = ENOUGH_IMAGES
    gate_db: float = GATE_DB
    max_drop: float | None = None
    others: tuple[tuple[str, Any], ...] = ()

    def tolerance(self, dtype: str) -> Tolerance:
        """What artifacts of this dtype must keep to."""
        if dtype == 'int8':
            # The gate holds on average; the one image that is kept may be lower.
            return Tolerance(sqnr_db=self.gate_db - 5)
        return TOLERANCES[dtype]


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
        self.warnings: list[str] = []
        self.skipped: list[Record] = []
        self.failures: list[tuple[str, Exception]] = []
        if options.dtype == 'int8' and options.calib is None:
            raise UsageError(
                '--dtype int8 needs --calib, a folder of images like those it will see, or a '
                'config whose data set has some.'
            )
        if options.max_drop is not None and not (source.config and source.checkpoint):
            raise UsageError('--max-drop needs a config as MODEL and its CHECKPOINT to evaluate.')
        parity_input = options.parity_input
        self.picture = load_picture(parity_input, source.loader) if parity_input else None
        self.formats = self._usable_formats()
        for size in options.sizes:
            self._check_size(size)
        self.preprocess = self._preprocess()
        self.plans = {row.name: self._plan(row) for row in self.formats}
        self.fused = {plan: self._fuse(plan) for plan, _ in self.plans.values()}
        # What is inexact was asked for by name: it is reported, and what is exported is compared.
        inexact = [model for model in self.fused.values() if report_of(model).inexact]
        self.reference = inexact[0] if inexact else source.model
        self.jobs = [(row, job) for size in options.sizes for row, job in self._jobs(size)]
        make_folder(folder)
        self._check_nothing_is_lost()

    # --- before anything is written

    def _usable_formats(self) -> list[Format]:
        """The formats that can be written; a named one that cannot stops the run."""
        usable = []
        for row, named in self.options.formats:
            try:
                row.check_installed(self.options.dtype)
                self._check_options(row)
                for warning in row.check():
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
                + '; '.join(f'{s["format"]}: {s["reason"]}' for s in self.skipped)
            )
        return usable

    def _check_options(self, row: Format) -> None:
        options = self.options
        if options.dtype and options.dtype not in row.dtypes:
            raise UsageError(
                f'--dtype {options.dtype} is not possible for {row.name}; it has '
                f'{", ".join(row.dtypes)}.'
            )
        if reason := row.dynamic[options.dynamic]:
            raise UsageError(
                f'--dynamic {options.dynamic} is not possible for {row.name}: {reason}.'
            )
        if options.preprocess and not row.has_operations:
            raise UsageError(
                f'--preprocess embed is not possible for {row.name}: it holds weights alone, and '
                'the data_preprocessor of the config they are loaded in normalises the images.'
            )
        for name, _ in options.others:
            if not any(name in other.options for other, _ in options.formats):
                raise UsageError(
                    f'--{name.replace("_", "-")} is not an option of {row.name}; leave it out.'
                )

    def _check_size(self, size: tuple[int, int]) -> None:
        model, options = self.source.model, self.options
        stride = model.strides[model.out_indices[-1]]
        for side in size:
            left = side % stride
            if left and not options.allow_odd:
                below = [f'{side - left}'] if side > stride else []
                either = ' or '.join([*below, f'{side - left + stride}'])
                raise UsageError(
                    f'--size {side}: stride {stride} leaves {left} px; use {either}, or '
                    '--allow-odd to export and compare at this very size.'
                )

    def _preprocess(self) -> Preprocess | None:
        """What is built into the artifacts."""
        if not self.options.preprocess:
            return None
        if (preprocess := Preprocess.of(self.source.preprocessor)) is None:
            raise UsageError(
                '--preprocess embed needs a config whose data_preprocessor has mean and std; '
                f'{self.source.config or self.source.name} has none.'
            )
        return preprocess

    def _plan(self, row: Format) -> tuple[Plan, str]:
        """The plan for a format, and why."""
        options = self.options
        if options.plan != 'auto':
            return options.plan, WHY[options.plan]
        self.say(f'measuring plans for {row.name}')
        shape = (options.batch, 3, *options.sizes[0])
        dtype = options.dtype or row.dtypes[0]
        choice = choose_plan(
            self.source.model, row, shape, dtype='fp32' if dtype == 'int8' else dtype
        )
        self.say(f'      {choice.plan}: {choice.why}')
        return choice.plan, choice.why

    def _fuse(self, plan: Plan) -> PyramidBackbone:
        try:
            # Whoever asks for a plan by its name has chosen it.
            model = reparameterize(self.source.model, plan, accept_inexact=True)
        except ValueError as error:
            raise ModelError(f'{error} Or pass --plan {self.source.model.plan}.') from error
        for kind in sorted({rewrite.exactness for rewrite in report_of(model).inexact}):
            self.warn(
                f'plan {plan} is not exact ({INEXACT[kind]}): artifacts are compared with the '
                'fused network, and proof_float64 in report.json says how far that is off'
            )
        return model

    def _jobs(self, size: tuple[int, int]) -> list[tuple[Format, Job]]:
        """One job per dtype and plan, shared by formats, so that each is traced once."""
        jobs: dict[tuple[str, Plan], Job] = {}
        pairs = []
        for row in self.formats:
            key = self.options.dtype or row.dtypes[0], self.plans[row.name][0]
            if key not in jobs:
                jobs[key] = self._job(size, *key)
            pairs.append((row, jobs[key]))
        return pairs

    def _job(self, size: tuple[int, int], dtype: str, plan: Plan) -> Job:
        source, options, model = self.source, self.options, self.fused[plan]
        others = dict(options.others)
        metadata = {
            'version': __version__,
            'family': type(model).__name__,
            'arch': source.arch,
            'plan': plan,
            'out_indices': list(model.out_indices),
            'out_channels': list(model.out_channels),
            'out_strides': list(model.out_strides),
            'size': list(size),
            'batch': options.batch,
            'dynamic': options.dynamic,
            'least_side': model.least_side,
            'dtype': dtype,
            'weights': source.weights,
            'checkpoint_sha256': source.checkpoint_sha256,
            'layout': 'NCHW',
            'device': others.get('device', 'cpu'),
            'preprocess': asdict(self.preprocess) if self.preprocess else None,
            'golden': golden_name(size, options.batch, dtype, self.preprocess),
        }
        names = tuple(f'stage{i}' for i in model.out_indices)
        return Job(
            model,
            size,
            names,
            metadata,
            batch=options.batch,
            dynamic=options.dynamic,
            dtype=dtype,
            preprocess=self.preprocess,
            **others,
        )

    def _check_nothing_is_lost(self) -> None:
        there = [path for path in map(self.target, self.jobs) if path.exists()]
        if there and not self.options.force:
            raise UsageError(f'{there[0]} exists already; add --force to replace it.')
        self.earlier = None
        if (self.folder / JSON_NAME).exists():
            with contextlib.suppress(UsageError):
                self.earlier = Report.load(self.folder)
        if self.earlier is None:
            return
        mine, other = self._model_record(), self.earlier.data['model']
        same = ['arch', 'checkpoint_sha256', 'out_strides']
        same += ['seed'] if self.source.weights == 'random' else []
        if any(mine[key] != other.get(key) for key in same):
            if not self.options.force:
                raise UsageError(
                    f'{self.folder} holds artifacts of another model or other weights; give '
                    'another --work-dir, or add --force to report on the new ones alone.'
                )
            self.earlier = None

    def target(self, pair: tuple[Format, Job]) -> Path:
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
        parts += ['raw'] if job.preprocess else []
        parts += [job.device] if job.device != 'cpu' and 'device' in row.options else []
        return self.folder / ('_'.join(parts) + row.suffix)

    # --- the work

    def run(self) -> Report:
        """Write every artifact that can be written, and the report.

        Raises:
            ExportError, ParityError, SomeFailedError: After the report is written.
            UsageError: Another process writes into the folder.
        """
        with owned(self.folder):
            self._check_nothing_is_lost()  # by a run that ended since
            return self._export_all()

    def _export_all(self) -> Report:
        report = Report.start(
            self.folder, self._model_record(), [self._plan_record(plan) for plan in self.fused]
        )
        if self.source.weights == 'random':
            self.warn(RANDOM_WEIGHTS)
        with partial_folder(self.folder) as partial:
            goldens: dict[str, list[Golden]] = {}
            for n, (row, job) in enumerate(self.jobs, 1):
                name = job.metadata['golden']
                if name not in goldens:
                    goldens[name] = self._goldens(job, partial)
                self.say(f'[{n}/{len(self.jobs)}] {row.name}')
                try:
                    with disk_errors(self.folder):
                        self._one(row, job, goldens[name], partial, report)
                except (ExportError, ParityError, DependencyError) as error:
                    # Without its traceback, which keeps files open that fill the disk.
                    self.failures.append((row.name, type(error)(str(error))))
                    self.say(f'      FAILED: {error}')
                    for left in partial.iterdir():
                        remove(left)
        data = report.data
        if self.earlier is not None:
            report.keep(self.earlier)
        data['warnings'], data['skipped'] = self.warnings, self.skipped
        data['failures'] = [{'format': name, 'reason': str(error)} for name, error in self.failures]
        data['status'] = 'failed' if self.failures else 'ok'
        with disk_errors(self.folder):
            report.save()
        return report

    def raise_failures(self) -> None:
        """Raise what stopped a format, if anything did."""
        if not self.failures:
            return
        error = self.failures[0][1]
        if len(self.failures) == len(self.jobs) and len({type(e) for _, e in self.failures}) == 1:
            raise error
        raise SomeFailedError(
            f'{len(self.failures)} of {len(self.jobs)} artifacts failed: '
            + '; '.join(f'{name}: {error}' for name, error in self.failures)
        )

    def _goldens(self, job: Job, partial: Path) -> list[Golden]:
        """What the network itself makes of the images to compare on; the first is kept."""
        model = self.source.model
        reference = job.with_preprocess(self.reference)
        stride = model.strides[model.out_indices[-1]]
        shapes = [job.shape, *other_shapes(job.shape, job.dynamic, stride)]
        items = []
        for shape in shapes:
            image = self._image(job, shape)
            try:
                items.append(golden(reference, image, job.output_names))
            except (ValueError, RuntimeError) as error:
                text = ' '.join(str(error).split())
                if shape is job.shape:
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

    def _image(self, job: Job, shape: tuple[int, int, int, int]) -> torch.Tensor:
        if job.dtype == 'int8':
            picture = torch.from_numpy(self._calibration(job, shape[2:])[0])
        elif self.picture is not None:
            picture = self._applied(job).apply(cover(self.picture[None], shape[2:]))
        else:
            image = noise(shape, self.options.seed)
            return job.preprocess.undo(image) if job.preprocess else image
        return picture.expand(shape).contiguous()

    def _applied(self, job: Job) -> Preprocess:
        """What is done to an image as loaded, before it is given to an artifact."""
        return RAW if job.preprocess else Preprocess.of(self.source.preprocessor) or IMAGENET

    def _one(
        self, row: Format, job: Job, goldens: list[Golden], partial: Path, report: Report
    ) -> None:
        """Export, inspect and compare one artifact, and move it to where it belongs."""
        target = self.target((row, job))
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
        if job.metadata['plan'] != 'upstream' and (left := batch_norms(operations)):
            raise ExportError(
                f'{row.name} holds {left} BatchNorm, though plan {job.metadata["plan"]} leaves '
                'none; please report this.'
            )
        rows, status, runtime, precision = self._compare(row, job, written, goldens)
        if status == 'FAILED':
            rejected = self.folder / REJECTED
            rejected.mkdir(exist_ok=True)
            target = rejected / target.name
        place(written, target)
        for name in row.companions:
            shutil.copy(Path(__file__).with_name(name), self.folder)
        path = str(target.relative_to(self.folder))
        report.data['parity'] += [
            {'path': path, 'format': row.name, 'runtime': runtime, 'precision': precision, **r}
            for r in rows
        ]
        report.data['artifacts'].append(
            {
                'format': row.name,
                'path': path,
                'golden': job.metadata['golden'],
                'status': status,
                'sha256': digest(target),
                'bytes': size_of(target),
                'opset': job.opset if 'opset' in row.options else None,
                'dtype': job.dtype,
                'plan': job.metadata['plan'],
                'why': self.plans[row.name][1],
                'size': list(job.size),
                'dynamic': job.dynamic,
                'inputs': ['image'],
                'outputs': list(job.output_names),
                'operations': dict(operations.most_common()),
                'bn_left': batch_norms(operations),
                'convs': convolutions(operations),
                'metadata': job.metadata,
                'quantization': quantization,
                'tolerance': asdict(self.options.tolerance(job.dtype)),
                'seconds': round(seconds, 2),
            }
        )
        if status == 'FAILED':
            worst = max(rows, key=lambda r: r['max_rel'])
            raise ParityError(
                f'{row.name} differs from the network by {worst["max_rel"]:.2e} of '
                f"{worst['output']}'s std (SQNR {worst['sqnr_db']:.0f} dB; allowed: "
                f'{self.options.tolerance(job.dtype)}); it was moved to {target}.'
            )
        self.say(
            f'      {status}: {shown(target)} ({size_of(target) / 1e6:.1f} MB, {seconds:.1f} s)'
        )

    def _write(self, row: Format, job: Job, written: Path) -> Record | None:
        """Export to `written`; int8 from the float32 artifact, with a record of what was done."""
        if job.dtype != 'int8':
            with muffled():
                row.export(job, written)
            return None
        metadata = job.metadata | {'dtype': 'fp32'}
        full = written.with_name(f'fp32{row.suffix}')
        with muffled():
            row.export(replace(job, dtype='fp32', metadata=metadata), full)
        metric = None
        if self.options.max_drop is not None:
            config, checkpoint = self.source.config, self.source.checkpoint
            assert config and checkpoint, 'refused before'
            metric = TaskMetric(config, checkpoint, max_drop=self.options.max_drop)
        report = quantize(
            full,
            written,
            self._calibration(job, job.size),
            gate_db=self.options.gate_db,
            metric=metric,
            say=lambda text: self.say(f'      {text}'),
        )
        return report.as_record()

    def _calibration(self, job: Job, size: tuple[int, int]) -> Sequence[np.ndarray]:
        """Images as the artifact requires them; the first `HELD_OUT` are not calibrated on."""
        assert self.options.calib is not None, 'refused before'
        return calibration_images(
            self.options.calib,
            size,
            RAW if job.preprocess else Preprocess.of(self.source.preprocessor),
            limit=self.options.calib_images + HELD_OUT,
            loader=self.source.loader,
        )

    def _compare(
        self, row: Format, job: Job, written: Path, goldens: list[Golden]
    ) -> tuple[list[Record], str, str | None, str | None]:
        """Parity records, status, and what ran the artifact in which precision."""
        if row.runtime is None or not self.options.parity:
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
        status = 'ok' if all(result.passed for result in results) else 'FAILED'
        return [result.as_record() for result in results], status, runtime, precision

    # --- records

    def _model_record(self) -> Record:
        source, size = self.source, self.options.sizes[0]
        fused = next(iter(self.fused.values()))
        return {
            'name': source.name,
            'family': type(source.model).__name__,
            'arch': source.arch,
            'config': source.config,
            'checkpoint': source.checkpoint,
            'checkpoint_sha256': source.checkpoint_sha256,
            'weights_source': source.weights,
            'seed': self.options.seed,
            'params': count_parameters(fused),
            'macs': count_macs(fused, size),
            'size': list(size),
            'out_channels': list(fused.out_channels),
            'out_strides': list(fused.out_strides),
        }

    def _plan_record(self, plan: Plan) -> Record:
        model, size = self.source.model, self.options.sizes[0]
        fused = self.fused[plan]
        fusion = report_of(fused)
        # Fused in float64, so that the difference is the rewrites' own and no rounding of weights.
        exact = copy.deepcopy(model).double()
        proof = prove(exact, reparameterize(exact, plan, accept_inexact=True), size)
        return {
            'name': plan,
            'steps': [asdict(step) for step in fusion.rewrites],
            'proof_float64': [
                {'output': f'stage{i}', 'max_abs': stage.max_abs, 'max_rel': stage.max_rel}
                for i, stage in zip(model.out_indices, proof, strict=True)
            ],
            'bn_left': len(fusion.norms_left),
            'convs_before': _count_convolutions(model),
            'convs_after': _count_convolutions(fused),
        }

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.say(f'warning: {text}')

    def skip(self, row: Format, error: Exception) -> None:
        reason, _, fix = str(error).partition('; ')
        self.skipped.append({'format': row.name, 'reason': reason, 'fix': fix})
        self.say(f'skipped {row.name}: {error}')

    def say(self, text: str) -> None:
        self.log.print(text, highlight=False, markup=False, soft_wrap=True)


def report_of(model: PyramidBackbone) -> FusionReport:
    """What fusing this network did."""
    assert model.fusion_report is not None, 'only fused networks are exported'
    return model.fusion_report


def golden_name(
    size: tuple[int, int], batch: int, dtype: str, preprocess: Preprocess | None
) -> str:
    """Artifacts for the same images share what they are compared with."""
    # int8 is compared on an image of its own: it has no range for noise.
    kind = '_int8' if dtype == 'int8' else ''
    return f'golden_{size[0]}x{size[1]}_b{batch}{kind}{"_raw" if preprocess else ""}.npz'


def _short(error: Exception, limit: int = 300) -> str:
    """An error of another package, in one line of bearable length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f'{text[:limit]} ...'


def _count_convolutions(model: PyramidBackbone) -> int:
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())

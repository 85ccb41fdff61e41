"""From a model to proven artifacts in a folder: fuse, export, inspect, compare, report."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..backbones.pyramid import PyramidBackbone
from ..complexity import count_macs, count_parameters
from ..reparam import Plan, reparameterize
from ..reparam.plans import INEXACT
from ..version import __version__
from .errors import (
    DependencyError,
    ExportError,
    ModelError,
    ParityError,
    SomeFailedError,
    UsageError,
)
from .exporters import Job, Preprocess, quiet
from .folders import disk_errors, make_folder, partial_folder, place, shown
from .formats import Format
from .inspection import batch_norms, convolutions
from .parity import (
    TOLERANCES,
    Golden,
    check_artifact,
    compare,
    golden,
    noise,
    other_shapes,
)
from .report import JSON_NAME, Record, Report, digest, size_of
from .runtimes import ArtifactError, open_artifact
from .source import Source

REJECTED = 'rejected'
RANDOM_WEIGHTS = 'random weights: fine for latency, meaningless for accuracy'
UNVERIFIED = 'unverified'
#: Of images with values from 0 to 255, as in mm's configs.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Options:
    """What an export is asked for, apart from the model.

    Args:
        formats: With whether each was named, rather than implied by `all`.
        sizes: Heights and widths; one set of artifacts for each.
        plan: How far to fuse.
        dtype: One for all formats; each format's own default where None.
        preprocess: Whether artifacts take images as they were loaded.
        parity: Whether to run what was written.
        parity_input: An image to compare on, instead of noise.
        others: Options of single formats that were given.
    """

    formats: Sequence[tuple[Format, bool]]
    sizes: Sequence[tuple[int, int]] = ((512, 512),)
    batch: int = 1
    plan: Plan = 'exact'
    why: str = 'no BatchNorm left, and equal at every size'
    dtype: str | None = None
    dynamic: str = 'none'
    preprocess: bool = False
    parity: bool = True
    parity_input: Path | None = None
    allow_odd: bool = False
    force: bool = False
    strict: bool = False
    seed: int = 0
    others: tuple[tuple[str, Any], ...] = ()


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
        self.formats = self._usable_formats()
        for size in options.sizes:
            self._check_size(size)
        try:
            # Whoever asks for a plan by its name has chosen it.
            self.fused = reparameterize(source.model, options.plan, accept_inexact=tuple(INEXACT))
        except ValueError as error:
            raise ModelError(f'{error} Or pass --plan {source.model.plan}.') from error
        self.preprocess = self._preprocess()
        self.jobs = [(row, job) for size in options.sizes for row, job in self._jobs(size)]
        make_folder(folder)
        self._check_nothing_is_lost()

    # --- before anything is written

    def _usable_formats(self) -> list[Format]:
        """The formats that can be written; a named one that cannot stops the run."""
        usable = []
        for row, named in self.options.formats:
            try:
                row.check_installed()
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
                f'--dtype {options.dtype} is not possible for {row.name}; it takes '
                f'{", ".join(row.dtypes)}.'
            )
        if reason := row.dynamic[options.dynamic]:
            raise UsageError(
                f'--dynamic {options.dynamic} is not possible for {row.name}: {reason}.'
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
        if not self.options.preprocess:
            return None
        settings = self.source.preprocessor
        if not settings or settings.get('mean') is None:
            raise UsageError(
                '--preprocess embed needs a config whose data_preprocessor has mean and std; '
                f'{self.source.config or self.source.name} has none.'
            )
        return Preprocess(
            tuple(settings['mean']),
            tuple(settings['std']),
            bool(settings.get('bgr_to_rgb') or settings.get('rgb_to_bgr')),
        )

    def _jobs(self, size: tuple[int, int]) -> list[tuple[Format, Job]]:
        """One job per dtype, shared by the formats that have it, so that each is traced once."""
        jobs: dict[str, Job] = {}
        pairs = []
        for row in self.formats:
            dtype = self.options.dtype or row.dtypes[0]
            if dtype not in jobs:
                jobs[dtype] = self._job(size, dtype)
            pairs.append((row, jobs[dtype]))
        return pairs

    def _job(self, size: tuple[int, int], dtype: str) -> Job:
        source, options, model = self.source, self.options, self.fused
        others = dict(options.others)
        metadata = {
            'version': __version__,
            'family': type(model).__name__,
            'arch': source.arch,
            'plan': model.plan,
            'out_indices': list(model.out_indices),
            'out_channels': list(model.out_channels),
            'out_strides': list(model.out_strides),
            'size': list(size),
            'batch': options.batch,
            'dynamic': options.dynamic,
            'dtype': dtype,
            'weights': source.weights,
            'checkpoint_sha256': source.checkpoint_sha256,
            'layout': 'NCHW',
            'device': others.get('device', 'cpu'),
            'preprocess': asdict(self.preprocess) if self.preprocess else None,
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
        """
        report = Report.start(self.folder, self._model_record(), self._plan_record())
        if self.source.weights == 'random':
            self.warn(RANDOM_WEIGHTS)
        with partial_folder(self.folder) as partial:
            goldens: dict[tuple[int, int], list[Golden]] = {}
            for n, (row, job) in enumerate(self.jobs, 1):
                if job.size not in goldens:
                    goldens[job.size] = self._goldens(job, partial)
                self.say(f'[{n}/{len(self.jobs)}] {row.name}')
                try:
                    with disk_errors(self.folder):
                        self._one(row, job, goldens[job.size], partial, report)
                except (ExportError, ParityError) as error:
                    self.failures.append((row.name, error))
                    self.say(f'      FAILED: {error}')
        data = report.data
        if self.earlier is not None:
            report.keep(self.earlier)
        data['warnings'], data['skipped'] = self.warnings, self.skipped
        data['failures'] = [{'format': name, 'reason': str(error)} for name, error in self.failures]
        data['status'] = 'failed' if self.failures else 'ok'
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
        reference = job.with_preprocess(model)
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
                    raise ModelError(f'{self.source.name} cannot take {shape}: {text}') from error
                raise UsageError(
                    f'--dynamic {job.dynamic} is not possible for {self.source.name}: {text} '
                    'Export one artifact per size: --size 512,800x1344.'
                ) from error
        name = golden_name(job)
        with disk_errors(self.folder):
            items[0].save(partial / name)
            os.replace(partial / name, self.folder / name)
        return items

    def _image(self, job: Job, shape: tuple[int, int, int, int]) -> torch.Tensor:
        image = noise(shape, self.options.seed)
        if self.options.parity_input is not None:
            image = load_image(self.options.parity_input, shape)
        return job.preprocess.undo(image) if job.preprocess else image

    def _one(
        self, row: Format, job: Job, goldens: list[Golden], partial: Path, report: Report
    ) -> None:
        """Export, inspect and compare one artifact, and move it to where it belongs."""
        target = self.target((row, job))
        written = partial / target.name
        start = time.perf_counter()
        try:
            with quiet():
                row.export(job, written)
        except OSError:
            raise
        except Exception as error:
            with disk_errors(self.folder):
                raise ExportError(f'{row.name} could not be exported: {_short(error)}') from error
        seconds = time.perf_counter() - start
        with quiet():
            operations = row.operations(row.file(written))
        if job.metadata['plan'] != 'branches' and (left := batch_norms(operations)):
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
        path = str(target.relative_to(self.folder))
        report.data['parity'] += [
            {'path': path, 'format': row.name, 'runtime': runtime, 'precision': precision, **r}
            for r in rows
        ]
        report.data['artifacts'].append(
            {
                'format': row.name,
                'path': path,
                'golden': golden_name(job),
                'status': status,
                'sha256': digest(target),
                'bytes': size_of(target),
                'opset': job.opset if 'opset' in row.options else None,
                'dtype': job.dtype,
                'size': list(job.size),
                'dynamic': job.dynamic,
                'inputs': ['image'],
                'outputs': list(job.output_names),
                'operations': dict(operations.most_common()),
                'bn_left': batch_norms(operations),
                'convs': convolutions(operations),
                'metadata': job.metadata,
                'seconds': round(seconds, 2),
            }
        )
        if status == 'FAILED':
            worst = max(rows, key=lambda r: r['max_rel'])
            raise ParityError(
                f'{row.name} differs from the network by {worst["max_rel"]:.2e} of '
                f"{worst['output']}'s std (SQNR {worst['sqnr_db']:.0f} dB; allowed: "
                f'{TOLERANCES[job.dtype]}); it was moved to {target}.'
            )
        self.say(
            f'      {status}: {shown(target)} ({size_of(target) / 1e6:.1f} MB, {seconds:.1f} s)'
        )

    def _compare(
        self, row: Format, job: Job, written: Path, goldens: list[Golden]
    ) -> tuple[list[Record], str, str | None, str | None]:
        """Parity records, status, and what ran the artifact in which precision."""
        if row.runtime is None or not self.options.parity:
            return [], UNVERIFIED, None, None
        try:
            with open_artifact(row.file(written)) as artifact:
                results = check_artifact(artifact, goldens, TOLERANCES[job.dtype])
                runtime, precision = artifact.runtime, artifact.precision
        except ArtifactError as error:
            raise ExportError(
                f'{row.name} was written, but its runtime does not take it: {error}'
            ) from error
        status = 'ok' if all(result.passed for result in results) else 'FAILED'
        return [result.as_record() for result in results], status, runtime, precision

    # --- records

    def _model_record(self) -> Record:
        source, size = self.source, self.options.sizes[0]
        return {
            'name': source.name,
            'family': type(source.model).__name__,
            'arch': source.arch,
            'config': source.config,
            'checkpoint': source.checkpoint,
            'checkpoint_sha256': source.checkpoint_sha256,
            'weights_source': source.weights,
            'seed': self.options.seed,
            'params': count_parameters(self.fused),
            'macs': count_macs(self.fused, size),
            'size': list(size),
            'out_channels': list(self.fused.out_channels),
            'out_strides': list(self.fused.out_strides),
        }

    def _plan_record(self) -> Record:
        model, size = self.source.model, self.options.sizes[0]
        fusion = self.fused.fusion_report
        assert fusion is not None
        names = [f'stage{i}' for i in model.out_indices]
        expected = golden(model, noise((1, 3, *size)), names)
        actual = golden(self.fused, noise((1, 3, *size)), names)
        proof = compare([*actual.outputs.values()], expected, TOLERANCES['fp32'])
        return {
            'name': self.fused.plan,
            'why': self.options.why,
            'steps': [asdict(step) for step in fusion.rewrites],
            'proof_float64': [
                {'output': r.output, 'max_abs': r.max_abs, 'max_rel': r.max_rel} for r in proof
            ],
            'bn_left': len(fusion.norms_left),
            'convs_before': _count_convolutions(model),
            'convs_after': _count_convolutions(self.fused),
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


def golden_name(job: Job) -> str:
    """Artifacts of one size share the images and outputs to compare with."""
    height, width = job.size
    return f'golden_{height}x{width}_b{job.batch}{"_raw" if job.preprocess else ""}.npz'


def _short(error: Exception, limit: int = 300) -> str:
    """An error of another package, in one line of bearable length."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f'{text[:limit]} ...'


def _count_convolutions(model: PyramidBackbone) -> int:
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())


def load_image(path: Path, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """An image file as a normalised batch of `shape`, by the statistics of ImageNet.

    Raises:
        UsageError: It cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    batch, _, height, width = shape
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert('RGB').resize((width, height)), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f'--parity-input {path} is no readable image: {error}.') from error
    normal = (pixels - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return torch.from_numpy(normal.transpose(2, 0, 1)).expand(batch, -1, -1, -1).contiguous()

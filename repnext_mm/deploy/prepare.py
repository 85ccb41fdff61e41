"""All that is decided about an export, and all that can be refused, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..classification import TimmClassifier
from ..engine.quiet import muffled
from ..network import Plan
from ..reparam.fusion import INEXACT
from ..runtimes import unpadded
from ..version import __version__
from .bench import choose_plan
from .calibration import ENOUGH_IMAGES, MIN_IMAGES, load_picture
from .errors import DependencyError, UsageError
from .formats import Format
from .fusing import fused_model, inexact_kinds
from .job import TRACED_SIDE, Job
from .notes import Notes
from .options import Options
from .quantize import HELD_OUT
from .report import Record
from .shipping import Unshippable, settings_of
from .source import Source
from .targets import (
    INPUT,
    BackboneTarget,
    ClassifierTarget,
    DetectorTarget,
    Preprocess,
    SegmentorTarget,
    Target,
)

Size = tuple[int, int]
#: What is exported to one file.
Pair = tuple[Format, Job]

#: Why each plan, where it was not measured.
WHY: dict[Plan, str] = {
    'full': 'no BatchNorm left, and the same function at every size',
    'upstream': 'as the published code fuses; each block keeps a BatchNorm',
    'single': 'one depthwise convolution per token mixer',
}
#: What the sides of images are divisible by in networks that do not take any size.
DIVISORS = (1, 32, 64, 128)
#: The open dimensions that a complete model is given where none are named, the most first.
MOST_OPEN = ('batch-hw', 'hw', 'batch', 'none')


@dataclass(frozen=True)
class Prepared:
    """An export that nothing speaks against.

    Args:
        source: The model.
        options: What is asked for.
        sizes: Of the images; each is exported on its own.
        picture: To compare on `(3, h, w)`, as mm loads it; None for noise.
        preprocess: What is built into the artifacts.
        target: What is exported, over the model as it is.
        divisor: What height and width must be divisible by in a complete model.
        why: Why each format has the plan that it has.
        fused: The model by plan.
        reference: What artifacts are compared with.
        settings: What goes into model.json; None where no predictor is written.
        pairs: Every file to write: its format, and what is exported to it.
    """

    source: Source
    options: Options
    sizes: list[Size]
    picture: Tensor | None
    preprocess: Preprocess | None
    target: Target
    divisor: int
    why: dict[str, str]
    fused: dict[Plan, nn.Module]
    reference: Any
    settings: Record | None
    pairs: list[Pair]

    @property
    def complete(self) -> bool:
        """Whether all of a model is exported, and not its backbone alone."""
        return self.source.scope == 'model'

    def target_of(self, model: nn.Module) -> Target:
        """What is exported, over another form of the model."""
        return target_of(self.source, self.options, self.preprocess, model)

    def path_of(self, pair: Pair) -> Path:
        """Where a file goes in its folder: `NAME_512x512_b1_PLAN_DTYPE`, and what is open in it."""
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
        return Path('_'.join(parts) + row.suffix)


def prepare(source: Source, options: Options, notes: Notes) -> Prepared:
    """Decide what an export consists of.

    Raises:
        UsageError: The options do not fit the model, or each other.
        DependencyError: A package is missing.
        ModelError: The model cannot be fused as it is asked for.
    """
    _check_combinations(source, options)
    sizes = [*(options.sizes or [source.size])]
    picture = None
    if options.parity_input:
        picture = load_picture(options.parity_input, source.loader)
    preprocess = _preprocess(source, options)
    target = target_of(source, options, preprocess, source.model)
    formats = _usable_formats(source, options, target, notes)
    divisor = _divisor(source, target) if source.scope == 'model' else 1
    for size in sizes:
        _check_size(size, max(target.step, divisor), options.allow_odd)
    plans = {row.name: _plan(source, options, row, sizes[0], notes) for row in formats}
    fused = {plan: _fuse(source, plan, notes) for plan, _ in plans.values()}
    # What is inexact was asked for by name: it is reported, and what is exported is compared.
    inexact = [model for model in fused.values() if inexact_kinds(model)]
    settings = _settings(source, target, divisor, formats, notes)
    prepared = Prepared(
        source=source,
        options=options,
        sizes=sizes,
        picture=picture,
        preprocess=preprocess,
        target=target,
        divisor=divisor,
        why={name: why for name, (_, why) in plans.items()},
        fused=fused,
        reference=inexact[0] if inexact else source.model,
        settings=settings,
        pairs=[],
    )
    for size in sizes:
        prepared.pairs.extend(_pairs(prepared, formats, plans, size))
    return prepared


def target_of(
    source: Source, options: Options, preprocess: Preprocess | None, model: nn.Module
) -> Target:
    """What is exported, over a form of the model of a source.

    Raises:
        UsageError: An option is for models of another task.
    """
    if source.scope != 'model':
        return BackboneTarget(model, preprocess)  # type: ignore[arg-type]
    if isinstance(model, TimmClassifier):
        if (options.nms, options.output) != ('graph', 'classes'):
            raise UsageError('--nms and --output are not for classifiers, and this is one.')
        return ClassifierTarget(model, preprocess)
    if hasattr(model, 'decode_head'):
        if options.nms != 'graph':
            raise UsageError('--nms is for detectors, and this is a segmentor.')
        return SegmentorTarget(model, preprocess, output=options.output)
    if options.output != 'classes':
        raise UsageError('--output is for segmentors, and this is a detector.')
    return DetectorTarget(model, preprocess, nms=options.nms)


# --- what is refused


def _check_combinations(source: Source, options: Options) -> None:
    complete = source.scope == 'model'
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
    if complete and options.plan == 'auto':
        raise UsageError('--plan auto is for --scope backbone; name a plan.')
    if not complete and (options.nms, options.output) != ('graph', 'classes'):
        raise UsageError('--nms and --output are for --scope model, and this is a backbone.')


def _check_size(size: Size, stride: int, allow_odd: bool) -> None:
    for side in size:
        left = side % stride
        if left and not allow_odd:
            below = [f'{side - left}'] if side > stride else []
            either = ' or '.join([*below, f'{side - left + stride}'])
            raise UsageError(
                f'--size {side}: stride {stride} leaves {left} px; use {either}, or '
                '--allow-odd to export and compare at this very size.'
            )


def _usable_formats(source: Source, options: Options, target: Target, notes: Notes) -> list[Format]:
    """The formats that can be written; a named one that cannot stops the run."""
    usable = []
    for row, named in options.formats:
        try:
            row.check_installed(options.dtype)
            _check_options(source, options, target, row)
            for warning in row.warnings():
                notes.warn(f'{row.name}: {warning}')
                if options.strict:
                    raise DependencyError(f'--strict: {row.name}: {warning}.')
        except (DependencyError, UsageError) as error:
            if named:
                raise
            notes.skip(row.name, error)
        else:
            usable.append(row)
    if not usable:
        raise DependencyError(
            'none of the formats can be written here: '
            + '; '.join(f'{s["format"]}: {s["reason"]}' for s in notes.skipped)
        )
    return usable


def _check_options(source: Source, options: Options, target: Target, row: Format) -> None:
    if options.dtype and options.dtype not in row.dtypes:
        raise UsageError(
            f'--dtype {options.dtype} is not possible for {row.name}; it has '
            f'{", ".join(row.dtypes)}.'
        )
    if reason := row.refuse_target(target) or target.refuse(row.name, 'none'):
        raise UsageError(f'--format {row.name} is not possible for this model: {reason}.')
    dynamic = _dynamic(source, options, target, row)
    if reason := row.refuse_dynamic(dynamic) or target.refuse(row.name, dynamic):
        raise UsageError(f'--dynamic {dynamic} is not possible for {row.name}: {reason}.')
    if options.preprocess == 'embed' and not row.has_operations:
        raise UsageError(
            f'--preprocess embed is not possible for {row.name}: it holds weights alone, and '
            'the data_preprocessor of the config they are loaded in normalises the images.'
        )
    if 'opset' in row.options and (options.opset or 0) > target.most_opset:
        raise UsageError(
            f'--opset {options.opset} is not possible for two-stage detectors: ONNX Runtime '
            f'has no RoiAlign of it; give --opset {target.most_opset} or lower.'
        )
    for name in options.others:
        if not any(name in other.options for other, _ in options.formats):
            raise UsageError(
                f'--{name.replace("_", "-")} is not an option of {row.name}; leave it out.'
            )


# --- what is decided


def _divisor(source: Source, target: Target) -> int:
    """What the height and width of a complete model must be divisible by; 1 for any.

    A neck that adds a feature map to one of twice its stride, doubled, cannot compute other sizes,
    and the model's own preprocessor or pipeline pads images accordingly.
    """
    own = int((source.preprocessor or {}).get('pad_size_divisor') or 1)
    for divisor in sorted({1, own, *DIVISORS}):
        # Odd multiples, so that they are divisible by no larger power of two.
        times = -(-TRACED_SIDE // divisor) | 1
        image = np.zeros((1, 3, times * divisor, (times + 2) * divisor), np.float32)
        inputs = unpadded([INPUT, *target.extras], image)
        try:
            with torch.no_grad(), muffled():
                target(*map(torch.from_numpy, inputs.values()))
        except (RuntimeError, ValueError):
            continue
        return divisor
    return 1  # what it is that cannot be computed is said when it is compared


def _dynamic(source: Source, options: Options, target: Target, row: Format) -> str:
    """The open dimensions of a format: those asked for, or of a complete model all it can."""
    if options.dynamic is not None:
        return options.dynamic
    if source.scope != 'model':
        return 'none'
    return next(d for d in MOST_OPEN if not (row.refuse_dynamic(d) or target.refuse(row.name, d)))


def _preprocess(source: Source, options: Options) -> Preprocess | None:
    """What is built into the artifacts."""
    asked = options.preprocess
    if asked == 'none' or (asked is None and source.scope != 'model'):
        return None
    preprocess = Preprocess.of(source.preprocessor)
    if preprocess is None and asked == 'embed':
        raise UsageError(
            '--preprocess embed needs a config whose data_preprocessor has mean and std; '
            f'{source.config or source.name} has none.'
        )
    return preprocess


def _plan(
    source: Source, options: Options, row: Format, size: Size, notes: Notes
) -> tuple[Plan, str]:
    """The plan for a format, and why."""
    if options.plan != 'auto':
        plan: Any = options.plan
        return plan, WHY[plan]
    notes.say(f'measuring plans for {row.name}')
    dtype = options.dtype or row.dtypes[0]
    choice = choose_plan(
        source.model,
        row,
        (options.batch, 3, *size),
        dtype='fp32' if dtype == 'int8' else dtype,
    )
    notes.say(f'      {choice.plan}: {choice.why}')
    return choice.plan, choice.why


def _fuse(source: Source, plan: Plan, notes: Notes) -> nn.Module:
    model = fused_model(source, plan)
    for kind in sorted(inexact_kinds(model)):
        notes.warn(
            f'plan {plan} is not exact ({INEXACT[kind]}): artifacts are compared with the '
            'fused network, and proof_float64 in report.json says how far that is off'
        )
    return model


def _settings(
    source: Source, target: Target, divisor: int, formats: Sequence[Format], notes: Notes
) -> Record | None:
    """What goes into model.json; None for a backbone, or where no predictor is written."""
    if source.scope != 'model':
        return None
    try:
        return settings_of(source, target, divisor)
    except Unshippable as error:
        if any(row.name == 'web' for row in formats):
            raise UsageError(f'--format web is not possible for this config: {error}.') from error
        notes.warn(f'no model.json and no predict.py is written: {error}')
        return None


def _pairs(
    prepared: Prepared, formats: Sequence[Format], plans: dict[str, tuple[Plan, str]], size: Size
) -> list[Pair]:
    """One job per dtype, plan and open dimensions, shared by formats: each is traced once."""
    source, options = prepared.source, prepared.options
    jobs: dict[tuple[str, Plan, str], Job] = {}
    pairs = []
    for row in formats:
        dtype = options.dtype or row.dtypes[0]
        key = dtype, plans[row.name][0], _dynamic(source, options, prepared.target, row)
        if key not in jobs:
            jobs[key] = _job(prepared, size, *key)
        pairs.append((row, jobs[key].for_format(row.name)))
    return pairs


def _job(prepared: Prepared, size: Size, dtype: str, plan: Plan, dynamic: str) -> Job:
    source, options, preprocess = prepared.source, prepared.options, prepared.preprocess
    target = prepared.target_of(prepared.fused[plan]).eval()
    others = options.others
    job = Job(
        target,
        size,
        {},
        batch=options.batch,
        dynamic=dynamic,
        divisor=prepared.divisor if 'hw' in dynamic else 1,
        dtype=dtype,
        **others,
    )
    job.settings = prepared.settings or {}
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
        'divisor': job.divisor,
        'dtype': dtype,
        'weights': source.weights,
        'checkpoint_sha256': source.checkpoint_sha256,
        'layout': 'NCHW',
        'device': others.get('device', 'cpu'),
        'preprocess': asdict(preprocess) if preprocess else None,
        'golden': golden_name(size, options.batch, dtype, preprocess, target),
    }
    return job


def golden_name(
    size: Size, batch: int, dtype: str, preprocess: Preprocess | None, target: Target
) -> str:
    """Artifacts for the same images share what they are compared with."""
    # int8 is compared on an image of its own: it has no range for noise.
    kind = '_int8' if dtype == 'int8' else ''
    raw = '_raw' if preprocess else ''
    task = '' if target.task == 'backbone' else f'_{target.task}'
    task += '_logits' if target.output_names == ('logits',) else ''
    return f'golden_{size[0]}x{size[1]}_b{batch}{kind}{raw}{task}.npz'

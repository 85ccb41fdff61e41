"""The options of an export, each declared once: for Python and for the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..network import PLANS
from ..text import parse_size
from .calibration import ENOUGH_IMAGES
from .formats import DYNAMIC, FORMATS, Format, choose_formats
from .job import IOS_TARGETS, OPSET, OPSETS
from .parity import TOLERANCES, Tolerance

#: Signal-to-noise ratio in dB that every stage keeps in int8.
GATE_DB = 20.0
#: The same by task; of complete models, a tenth of the pixels, and a third of the detections.
GATES_DB = {'backbone': GATE_DB, 'classification': GATE_DB, 'segmentation': 10.0, 'detection': 5.0}
#: Every dtype of any format.
DTYPES = tuple(dict.fromkeys(dtype for row in FORMATS.values() for dtype in row.dtypes))


def sizes(text: str) -> list[tuple[int, int]]:
    """'512', 'HxW', or several with commas."""
    try:
        return [parse_size(part) for part in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a size; give 512, HxW as 800x1344, or several with commas'
        ) from None


def stages(text: str) -> tuple[int, ...]:
    """'0,1,2,3' or fewer."""
    if not all(part.strip().isdigit() for part in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of stages; give 0,1,2,3 or fewer')
    return tuple(int(part) for part in text.split(','))


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)


def _option(default: Any, help: str, **arguments: Any) -> Any:
    """A field that is an option; `arguments` are argparse's."""
    return field(default=default, metadata={'help': help, **arguments})


@dataclass(frozen=True)
class Options:
    """What an export is asked for, apart from the model and its checkpoint."""

    format: str = _option('onnx', f'comma list of {", ".join(FORMATS)}; or all')
    scope: str | None = _option(
        None,
        'what ships (None: model for a config with the checkpoint of a complete model)',
        choices=('backbone', 'model'),
    )
    sizes: Sequence[tuple[int, int]] | None = _option(
        None,
        '512 or HxW; a comma list exports one each (None: 512, and for a classifier the size that '
        'it is tested at)',
        name='size',
        type=sizes,
    )
    batch: int = _option(1, 'number of images', type=positive)
    out_indices: tuple[int, ...] | None = _option(
        None, "stages of a backbone to return, such as 1,2,3 (None: the config's)", type=stages
    )
    plan: str = _option(
        'full',
        'how far to fuse; auto measures which exact plan is fastest',
        choices=('auto', *PLANS),
    )
    dtype: str | None = _option(
        None, 'to compute in (None: fp16 in coreml, else fp32)', choices=DTYPES
    )
    dynamic: str | None = _option(
        None,
        'leave batch, or height and width, open (None: none for a backbone; for a complete model '
        'all that the format can)',
        choices=DYNAMIC,
    )
    preprocess: str | None = _option(
        None,
        "build the config's data_preprocessor into the artifact (None: embed for a complete model)",
        choices=('none', 'embed'),
    )
    nms: str = _option(
        'graph',
        'where a detector drops boxes that overlap: host leaves it to the predictor',
        choices=('graph', 'host'),
    )
    output: str = _option(
        'classes', 'of a segmentor: the class of each pixel, or logits',
        choices=('classes', 'logits'),
    )  # fmt: skip
    calib: Path | None = _option(
        None, 'images that int8 is calibrated on', type=Path, metavar='DIR_OR_CONFIG'
    )
    calib_images: int = _option(ENOUGH_IMAGES, 'at most so many of them', type=positive)
    gate_db: float | None = _option(
        None,
        'what int8 keeps: SQNR of every stage (None: 20); of a complete model, the share of pixels '
        'or detections that it loses, in dB (None: 10 and 5)',
        type=float,
    )
    max_drop: float | None = _option(
        None,
        'points of AP, mIoU or top-1 that the artifact may lose, measured on the test data of the '
        'config (None: not measured)',
        type=float,
        metavar='POINTS',
    )
    opset: int | None = _option(
        None,
        f'of ONNX (None: {OPSET}; 18 and 19 are for older runtimes, and slower)',
        type=int,
        choices=OPSETS,
    )
    ios_target: int | None = _option(
        None, f'oldest iOS (None: {IOS_TARGETS[0]})', type=int, choices=IOS_TARGETS
    )
    device: str | None = _option(
        None, 'what aoti compiles for (None: cpu)', choices=('cpu', 'cuda')
    )
    parity: str = _option('on', 'run and compare every artifact', choices=('on', 'off'))
    parity_input: Path | None = _option(
        None, 'compare on this image, not on noise', type=Path, metavar='IMG'
    )
    allow_odd: bool = _option(False, 'accept sizes that the strides do not divide')
    allow_partial: bool = _option(False, 'accept checkpoints that match in part')
    work_dir: Path | None = _option(None, 'output folder (None: work_dirs/deploy/MODEL)', type=Path)
    force: bool = _option(False, 'replace artifacts that are there')
    strict: bool = _option(False, 'stop at a warning about a package')
    seed: int = _option(0, 'of random weights and of the images to compare on', type=int)

    @property
    def formats(self) -> list[tuple[Format, bool]]:
        """The formats, and whether each was named rather than implied by `all`."""
        named = self.format.split(',')
        return [(row, row.name in named) for row in choose_formats(self.format)]

    @property
    def others(self) -> dict[str, Any]:
        """Options of single formats that were given."""
        values = {name: getattr(self, name) for name in ('opset', 'ios_target', 'device')}
        return {name: value for name, value in values.items() if value is not None}

    def gate(self, task: str) -> float:
        """What int8 keeps, in dB."""
        return GATES_DB[task] if self.gate_db is None else self.gate_db

    def tolerance(self, dtype: str) -> Tolerance:
        """What artifacts of this dtype must keep to."""
        if dtype != 'int8':
            return TOLERANCES[dtype]
        # The gate holds on average; the one image that is kept may be lower.
        least = TOLERANCES['int8']
        lost = 0.0 if self.gate_db is None else 10 ** (-self.gate_db / 10)
        return Tolerance(
            sqnr_db=self.gate('backbone') - 5,
            pixels=max(least.pixels, lost),
            found=min(least.found, 1 - lost),
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare every option of `Options`."""
    for each in fields(Options):
        arguments = dict(each.metadata)
        name = arguments.pop('name', each.name)
        if each.default is False:
            arguments['action'] = 'store_true'
        else:
            arguments['default'] = each.default
        parser.add_argument(f'--{name.replace("_", "-")}', dest=each.name, **arguments)


def parsed(args: argparse.Namespace) -> Options:
    """The options of a command line that `add_options` declared."""
    return Options(**{each.name: getattr(args, each.name) for each in fields(Options)})

"""The main job on the sample data set: generate it, train, evaluate, and show what was learned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch.utils.data import DataLoader

from .datasets import shapes
from .engine.cli import train_main
from .engine.config_file import find_config
from .engine.errors import UserError, run_tool
from .engine.run_folder import next_folder
from .program import program
from .reparam import reparameterize

PICTURED = 8  # images of val, the first ones: nothing is picked


@dataclass(frozen=True)
class Task:
    """What differs between the demos; ``table`` maps a row to the prefix of its metrics."""

    config: str
    sample: str  # folder of the sample data set that the config's data_root names
    table: dict[str, str]
    columns: dict[str, str]
    goal: str  # the column that has to reach the bar, in every row
    scale: int  # logged values are this many times the fraction
    bar: float
    quick: dict


DETECTION = Task(
    config='mask_rcnn_repnext_m0_shapes.py',
    sample='coco',
    table={'box': 'coco/bbox_', 'mask': 'coco/segm_'},
    columns={
        'AP': 'mAP',
        'AP50': 'mAP_50',
        'AP75': 'mAP_75',
        'AP small': 'mAP_s',
        'AP medium': 'mAP_m',
        'AP large': 'mAP_l',
    },
    goal='AP',
    scale=1,
    bar=0.40,
    quick={'train_cfg.max_epochs': 2},
)
SEGMENTATION = Task(
    config='semantic_fpn_repnext_m0_shapes.py',
    sample='ade',
    table={'all classes': ''},
    columns={'mIoU': 'mIoU', 'mean accuracy': 'mAcc', 'pixel accuracy': 'aAcc'},
    goal='mIoU',
    scale=100,
    bar=0.60,
    quick={'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2},
)
CLASSIFICATION = Task(
    config='repnext_m0_shapes.py',
    sample='imagenet',
    table={'trained': 'accuracy/'},
    columns={'top-1': 'top1'},
    goal='top-1',
    scale=100,
    bar=0.75,
    quick={'train_cfg.max_epochs': 2},
)
QUICK_SPEC = shapes.Spec(train=16, val=4)


def demo_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm demo`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('demo'),
        description='Train RepNeXt-M0 from scratch on the generated sample data set, and show it.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        '--seg', action='store_true', help='Semantic FPN and mIoU instead of Mask R-CNN and AP'
    )
    task.add_argument('--cls', action='store_true', help='a classifier and its top-1 instead')
    parser.add_argument('--data-root', help='folder of the sample data set (None: data/shapes)')
    parser.add_argument('--work-dir', help='folder for everything (None: work_dirs/demo[_TASK])')
    parser.add_argument(
        '--min-ap',
        '--min-miou',
        '--min-top1',
        dest='bar',
        type=_fraction,
        help=f'fail below this box AP and mask AP, or mIoU, or top-1 (None: {DETECTION.bar}, '
        f'{SEGMENTATION.bar} with --seg, {CLASSIFICATION.bar} with --cls)',
    )
    parser.add_argument(
        '--quick', action='store_true', help='a few iterations that learn nothing, to see it run'
    )
    args = parser.parse_args(argv)
    return run_tool(lambda: _demo(args))


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be from 0 to 1, not {text}')
    return value


def _demo(args: argparse.Namespace) -> None:
    from rich.progress import track

    from .visualization import plot_curves, read_scalars
    from .visualization.trained import draw_pictures, load_trained

    task = SEGMENTATION if args.seg else CLASSIFICATION if args.cls else DETECTION
    suffix = '_quick' if args.quick else ''
    data_root = args.data_root or f'data/shapes{suffix}'
    asked = args.work_dir or f'work_dirs/demo{"_seg" * args.seg}{"_cls" * args.cls}{suffix}'
    work_dir = Path(next_folder(asked, {}))
    bar = args.bar if args.bar is not None else 0.0 if args.quick else task.bar

    shapes.ensure(data_root, QUICK_SPEC if args.quick else shapes.Spec(), track)
    checkpoint, cfg = _train(task, data_root, work_dir, args.quick)

    _, metrics = read_scalars(work_dir).val[-1]
    table = {
        # A detector that found nothing at all has no metrics.
        row: {n: metrics.get(prefix + key, 0.0) / task.scale for n, key in task.columns.items()}
        for row, prefix in task.table.items()
    }
    dataset, model = load_trained(checkpoint, cfg)
    if args.cls:
        table['fused'] = {task.goal: _top1(reparameterize(model.eval()), dataset)}
    path = work_dir / 'predictions.png'
    pictures = draw_pictures(model, dataset, path, PICTURED, answers=args.cls)
    curves = plot_curves(work_dir, work_dir / 'curves.png')

    _print_table(table)
    print(f'Predictions beside ground truth: {pictures}')
    print(f'Loss and {task.goal} over the iterations: {curves}')
    print(f'Checkpoint: {checkpoint}')
    missed = {row: values[task.goal] for row, values in table.items() if values[task.goal] < bar}
    if missed:
        found = ', '.join(f'{task.goal} of {row} is {value:.3f}' for row, value in missed.items())
        raise UserError(f'{found}, below the {bar:.2f} asked for.')


def _train(task: Task, data_root: str, work_dir: Path, quick: bool) -> tuple[Path, Config]:
    """Train as `repnext-mm train` does; returns the last checkpoint and the config."""
    options = {
        'data_root': f'{data_root}/{task.sample}',
        'sample_data_root': data_root,
        **(task.quick if quick else {}),
    }
    code = train_main(
        [
            str(find_config(task.config)),
            f'--work-dir={work_dir}',
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        ]
    )
    if code:
        raise SystemExit(code)  # train_main has said why
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    return checkpoint, Config.fromfile(work_dir / task.config)


def _top1(model: BaseModel, dataset: Any) -> float:
    """The share of a data set that a classifier gets right."""
    right = 0
    for batch in DataLoader(dataset, 32):
        with torch.no_grad():
            right += sum(int(logits.argmax() == label) for logits, label in model.test_step(batch))
    return right / len(dataset)


def _print_table(table: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(table.values())))
    shown = Table('', *columns)
    for row, values in table.items():
        # COCO's -1: val has no object of that size.
        shown.add_row(row, *('-' if v < 0 else f'{v:.3f}' for v in values.values()))
    Console().print(shown)

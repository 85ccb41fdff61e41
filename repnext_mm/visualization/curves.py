"""Curves of a training run, from the scalars that MMEngine's LocalVisBackend writes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Key in the log, name in the picture, and what the logged value is divided by: mmseg logs percent.
METRICS = (
    ('coco/bbox_mAP', 'box AP', 1),
    ('coco/segm_mAP', 'mask AP', 1),
    ('mIoU', 'mIoU', 100),
    ('mAcc', 'class accuracy', 100),
    ('aAcc', 'pixel accuracy', 100),
    ('accuracy/top1', 'top-1', 100),
    ('accuracy/top5', 'top-5', 100),
)


@dataclass
class Scalars:
    """Logged values of a run: (iteration, values) in ascending order of iterations."""

    train: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    val: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def read_scalars(work_dir: str | os.PathLike) -> Scalars:
    """Read every ``*/vis_data/scalars.json`` of a work dir as one run.

    A run that was resumed, or started anew in the same folder, replaces what had been logged from
    its first iteration on. Raises FileNotFoundError if nothing was logged.
    """
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(
            f'no */vis_data/scalars.json in {work_dir}; give the work dir of a training run.'
        )
    scalars = Scalars()
    for file in files:
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a run that was killed may leave half a line
            _add(scalars, record)
    return scalars


def _add(scalars: Scalars, record: dict[str, Any]) -> None:
    if any('loss' in key for key in record):
        series, iteration = scalars.train, record['step']
        scalars.val[:] = [entry for entry in scalars.val if entry[0] < iteration]
    else:
        series, iteration = scalars.val, _val_iteration(scalars, record['step'])
    while series and series[-1][0] >= iteration:
        series.pop()
    series.append((iteration, record))


def _val_iteration(scalars: Scalars, step: int) -> int:
    """Iteration of an evaluation, whose step counts epochs in runs that train by epochs."""
    if not scalars.train or 'epoch' not in scalars.train[-1][1]:
        return step
    return max((i for i, record in scalars.train if record['epoch'] <= step), default=step)


def plot_curves(work_dir: str | os.PathLike, out_file: str | os.PathLike) -> Path:
    """Draw the losses and the metrics of a run over its iterations; returns ``out_file``.

    Raises FileNotFoundError if ``work_dir`` holds no log.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scalars = read_scalars(work_dir)
    figure = Figure(figsize=(10, 4.8), layout='constrained')
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2)

    keys = dict.fromkeys(key for _, record in scalars.train for key in record if 'loss' in key)
    for key in sorted(keys, key=lambda key: key != 'loss'):
        points = [(i, record[key]) for i, record in scalars.train if key in record]
        total = key == 'loss'
        loss_axes.plot(
            *zip(*points, strict=True),
            label='total' if total else key,
            color='black' if total else None,
            linewidth=2 if total else 1,
        )
    loss_axes.set(title='Training loss', xlabel='iteration', yscale='log')

    for key, name, unit in METRICS:
        points = [(i, record[key] / unit) for i, record in scalars.val if key in record]
        if points:
            label = f'{name}, last {points[-1][1]:.3f}'
            metric_axes.plot(*zip(*points, strict=True), marker='o', label=label)
    metric_axes.set(title='Validation', xlabel='iteration', ylim=(0, 1))
    metric_axes.set_xlim(left=0)
    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return save_figure(figure, out_file)


def save_figure(figure: Any, out_file: str | os.PathLike) -> Path:
    """Write a figure under a temporary name and rename it."""
    out_file = Path(out_file)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    scratch = out_file.with_name(f'.{out_file.stem}-{os.getpid()}{out_file.suffix}')
    try:
        figure.savefig(scratch, dpi=120)
        scratch.replace(out_file)
    finally:
        scratch.unlink(missing_ok=True)
    return out_file

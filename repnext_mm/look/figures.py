"""The charts of the page, as figures of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..visualization.colors import apart
from ..visualization.curves import METRICS, Scalars
from .data import Statistics
from .detection import KINDS, RECALLS, Evaluation

#: Classes that a chart names; of more, those with the most objects.
NAMED = 20
BLUE, ORANGE = '#2f6fb2', '#d9822b'


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a window, and its axes as an array `(rows, columns)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def curves(scalars: Scalars) -> Any:
    """Parts of the loss, the learning rate, and the metrics of the evaluations."""
    figure, grid = new_figure(11, 3.2, 1, 3)
    losses, rate, metrics = grid[0]
    keys = dict.fromkeys(k for _, record in scalars.train for k in record if 'loss' in k)
    for key in sorted(keys, key=lambda k: k != 'loss'):
        points = [(i, record[key]) for i, record in scalars.train if key in record]
        width, color = (2, 'black') if key == 'loss' else (1, None)
        losses.plot(*zip(*points, strict=True), label=key, linewidth=width, color=color)
    losses.set(title='training loss', xlabel='iteration', yscale='log')
    points = [(i, record['lr']) for i, record in scalars.train if 'lr' in record]
    if points:
        rate.plot(*zip(*points, strict=True), color=BLUE)
    rate.set(title='learning rate', xlabel='iteration', ylim=(0, None))
    for key, name, unit in METRICS:
        points = [(i, record[key] / unit) for i, record in scalars.val if key in record]
        if points:
            metrics.plot(*zip(*points, strict=True), marker='.', label=name)
    metrics.set(title='validation', xlabel='iteration', ylim=(0, 1))
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize='small', frameon=False)
    return figure


def precision_recall(evaluation: Evaluation) -> Any:
    """Precision over recall at an IoU of 0.5: the classes with the most objects, and all."""
    figure, grid = new_figure(6.5, 4)
    axes = grid[0, 0]
    order = np.argsort(-np.array(evaluation.objects), kind='stable')[:10]
    colors = apart(len(evaluation.classes))
    for i in order:
        if evaluation.objects[i]:
            label = f'{evaluation.classes[i]} {evaluation.rows[i]["AP50"]:.2f}'
            color = tuple(value / 255 for value in colors[i])
            axes.plot(RECALLS, evaluation.precisions[i].clip(0), label=label, color=color)
    present = evaluation.precisions[np.array(evaluation.objects) > 0].clip(0)
    if len(present):
        label = f'all classes {evaluation.summary["AP50"]:.2f}'
        axes.plot(RECALLS, present.mean(0), color='black', linewidth=2.5, label=label)
    axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small', frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def confusion(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """A confusion matrix, in parts of each row; of many classes, those that occur most."""
    if len(rows) > NAMED + 1:
        weight = table.sum(1)[: len(rows)] + table.sum(0)[: len(rows)]
        kept = np.sort(np.argsort(-weight, kind='stable')[: NAMED + 1])
        table, rows = table[np.ix_(kept, kept)], [rows[i] for i in kept]
        columns = [columns[i] for i in kept]
    side = 2.4 + 0.36 * len(rows)
    figure, grid = new_figure(side + 1, side)
    axes = grid[0, 0]
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha='right', fontsize='small')
    axes.set_yticks(range(len(rows)), rows, fontsize='small')
    axes.set(xlabel='predicted', ylabel='true')
    for (i, j), value in np.ndenumerate(table):
        if value:
            text = f'{value}' if value < 10000 else f'{shares[i, j]:.0%}'
            color = 'white' if shares[i, j] > 0.6 else 'black'
            axes.text(j, i, text, ha='center', va='center', fontsize=7, color=color)
    return figure


def error_kinds(evaluation: Evaluation) -> Any:
    """What AP50 would gain without the errors of each kind."""
    figure, grid = new_figure(6.5, 2.8)
    axes = grid[0, 0]
    names = list(KINDS)
    values = [100 * max(evaluation.gains[name], 0) for name in names]
    bars = axes.barh([KINDS[name].partition(':')[0] for name in names], values, color=BLUE)
    axes.bar_label(bars, fmt='%.1f', padding=3, fontsize='small')
    axes.invert_yaxis()
    axes.set(xlabel='AP50 that would be gained, in points', xlim=(0, max(*values, 1) * 1.15))
    return figure


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> Any:
    """A bar per class and series; of many classes, those with the most."""
    total = np.sum([list(values) for values in series.values()], 0)
    order = np.argsort(-total, kind='stable')[: 2 * NAMED]
    figure, grid = new_figure(6.5, 1 + 0.24 * len(order) * max(1, len(series) / 2))
    axes = grid[0, 0]
    height = 0.8 / len(series)
    for k, ((name, values), color) in enumerate(zip(series.items(), (BLUE, ORANGE, 'gray'))):
        places = np.arange(len(order)) + (k - (len(series) - 1) / 2) * height
        axes.barh(places, np.asarray(values)[order], height, label=name, color=color)
    axes.set_yticks(range(len(order)), [names[i] for i in order], fontsize='small')
    axes.invert_yaxis()
    axes.set(xlabel=label)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def boxes(statistics: Statistics) -> Any:
    """Sizes, aspect ratios and places of boxes."""
    figure, grid = new_figure(11, 3.2, 1, 3)
    sizes, aspects, places = grid[0]
    edges = np.geomspace(max(min(statistics.sides), 1), max(*statistics.sides, 2), 25)
    sizes.hist(statistics.sides, bins=edges, color=BLUE)
    for limit in (32, 96):
        sizes.axvline(limit, color='gray', linestyle=':')
    sizes.set(xscale='log', xlabel='square root of the area (pixels)', title='sizes of boxes')
    ratios = np.log2(statistics.aspects)
    aspects.hist(ratios, bins=25, color=BLUE)
    ticks = np.arange(np.floor(ratios.min()), np.ceil(ratios.max()) + 1)
    labels = [f'{2.0**t:g}' if t >= 0 else f'1/{2.0**-t:g}' for t in ticks]
    aspects.set_xticks(ticks, labels)
    aspects.set(xlabel='width / height', title='aspect ratios')
    places.imshow(statistics.places, cmap='magma')
    places.set(title='where boxes are', xticks=[], yticks=[])
    return figure


def branch_grid(image: np.ndarray, maps: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """The image, then a row per stage with the map of each branch; `image (H, W, 3)` RGB."""
    columns = max(len(row) for row in maps.values())
    figure, grid = new_figure(2.2 * (columns + 1), 2.0 * len(maps), len(maps), columns + 1)
    for axes in grid.flat:
        axes.axis('off')
    for row, (stage, parts) in zip(grid, maps.items(), strict=True):
        row[0].imshow(image)
        row[0].set_title(stage, fontsize='small')
        for axes, (name, values) in zip(row[1:], parts.items(), strict=False):
            axes.imshow(values, cmap='viridis')
            axes.set_title(f'{name}, {values.shape[0]}x{values.shape[1]}', fontsize='small')
    return figure


def overlays(pictures: Sequence[tuple[np.ndarray, Sequence[tuple[str, np.ndarray]]]]) -> Any:
    """A row per picture `(H, W, 3)`: itself, and heat maps of any size over it, with titles."""
    from PIL import Image

    columns = 1 + max(len(maps) for _, maps in pictures)
    figure, grid = new_figure(3.0 * columns, 2.4 * len(pictures), len(pictures), columns)
    for axes in grid.flat:
        axes.axis('off')
    for row, (picture, maps) in zip(grid, pictures, strict=True):
        row[0].imshow(picture)
        for axes, (title, values) in zip(row[1:], maps, strict=False):
            size = picture.shape[1], picture.shape[0]
            heat = Image.fromarray(np.float32(values)).resize(size, Image.Resampling.BILINEAR)
            axes.imshow(picture)
            axes.imshow(np.asarray(heat), cmap='jet', alpha=0.45, vmin=0, vmax=1)
            axes.set_title(title, fontsize='small')
    return figure


def fields(
    rows: Mapping[str, Mapping[str, np.ndarray]], sides: Mapping[str, Mapping[str, str]]
) -> Any:
    """Receptive fields: a row per network and a column per stage, in the same scale of colors."""
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    figure, grid = new_figure(2.4 * len(stages), 2.7 * len(rows), len(rows), len(stages))
    for axes in grid.flat:
        axes.axis('off')
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        for axes, stage in zip(line, stages, strict=True):
            if stage not in row:
                continue
            values = row[stage] / max(row[stage].max(), 1e-300)
            axes.imshow(values**0.25, cmap='inferno')  # faint places are seen
            axes.set_title(f'{name}\n{stage}: {sides[name][stage]}', fontsize='x-small')
    return figure

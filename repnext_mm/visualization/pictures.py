"""Predictions beside ground truth: detections and label maps both become coloured regions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel

from ..datasets.images import read_image
from .curves import save_figure

COLUMNS = ('image', 'ground truth', 'prediction')


@dataclass
class Region:
    """Pixels of one class: ``mask`` (H, W); an instance has a ``box`` (x1, y1, x2, y2) in pixels,
    a detected one a ``score`` too.
    """

    label: int
    mask: np.ndarray
    box: np.ndarray | None = None
    score: float | None = None


@dataclass
class Comparison:
    """An RGB ``image`` (H, W, 3) with its true and its predicted regions."""

    image: np.ndarray
    truth: list[Region]
    prediction: list[Region]


def compare(
    model: BaseModel, dataset: Any, indices: Iterable[int], score_thr: float = 0.5
) -> list[Comparison]:
    """Run a detector or a segmentor on images of an annotated mmdet or mmseg test data set.

    Instances that score below ``score_thr`` are left out.
    """
    model.eval()
    comparisons = []
    for index in indices:
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0]
        pixels = read_image(sample.img_path)[..., ::-1]
        if 'pred_sem_seg' in sample:
            sides = (_class_regions(sample.gt_sem_seg), _class_regions(sample.pred_sem_seg))
        else:
            found = sample.pred_instances
            found = found[found.scores >= score_thr]
            shape = pixels.shape[:2]
            sides = (
                _instance_regions(sample.gt_instances, shape),
                _instance_regions(found, shape),
            )
        comparisons.append(Comparison(pixels, *sides))
    return comparisons


def _class_regions(label_map: Any, ignore_index: int = 255) -> list[Region]:
    labels = label_map.data.squeeze(0).cpu().numpy()
    return [Region(int(i), labels == i) for i in np.unique(labels) if i != ignore_index]


def _instance_regions(instances: Any, shape: tuple[int, ...]) -> list[Region]:
    boxes = instances.bboxes
    boxes = getattr(boxes, 'tensor', boxes).cpu().numpy()
    if 'masks' in instances:
        masks = instances.masks
        masks = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks.to_ndarray()
    else:
        masks = np.zeros((len(boxes), *shape), bool)
    scores = instances.scores.tolist() if 'scores' in instances else [None] * len(boxes)
    rows = zip(instances.labels.tolist(), masks.astype(bool), boxes, scores, strict=True)
    return [Region(*row) for row in rows]


def draw_comparisons(
    comparisons: Sequence[Comparison],
    classes: Sequence[str],
    out_file: str | os.PathLike,
    per_row: int = 2,
) -> Path:
    """Draw image, ground truth and prediction side by side, ``per_row`` images a row."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = colormaps['tab10' if len(classes) <= 10 else 'turbo']
    # tab10 is a list of colours, turbo a range of them.
    at = np.arange(len(classes)) if len(classes) <= 10 else np.linspace(0, 1, len(classes))
    colours = np.asarray(palette(at))
    rows = -(-len(comparisons) // per_row)
    width = len(COLUMNS) * per_row
    figure = Figure(figsize=(2.1 * width, 2.1 * rows + 0.5), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, width, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for column, axes in enumerate(grid[0]):
        axes.set_title(COLUMNS[column % len(COLUMNS)], fontsize='medium')
    seen = set()
    for number, comparison in enumerate(comparisons):
        first = len(COLUMNS) * (number % per_row)
        three = grid[number // per_row, first : first + len(COLUMNS)]
        for axes, regions in zip(three, ([], comparison.truth, comparison.prediction), strict=True):
            _draw(axes, comparison.image, regions, colours)
            seen |= {region.label for region in regions}
    figure.legend(
        handles=[
            Patch(color=tuple(colours[label]), label=classes[label]) for label in sorted(seen)
        ],
        loc='outside lower center',
        ncols=min(len(seen), 10) or 1,
        frameon=False,
    )
    return save_figure(figure, out_file)


def _draw(axes: Any, image: np.ndarray, regions: list[Region], colours: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    shown = image / 255
    for region in regions:
        shown[region.mask] = 0.45 * shown[region.mask] + 0.55 * colours[region.label][:3]
    axes.imshow(shown)
    for region in regions:
        if region.box is None:
            continue
        colour = colours[region.label]
        if region.mask.any():
            axes.contour(region.mask, levels=[0.5], colors=[colour], linewidths=1)
        x1, y1, x2, y2 = region.box
        # Pixel centers are at integers in matplotlib, pixel borders in boxes.
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=colour))
        if region.score is not None:
            axes.text(
                *corner,
                f'{region.score:.2f}',
                fontsize=6,
                verticalalignment='bottom',
                bbox=dict(facecolor=colour, edgecolor='none', pad=0.6),
                clip_on=True,
            )

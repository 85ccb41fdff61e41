"""Timing the evaluation of detectors: our COCO metric beside mmdet's, on generated results."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..engine.quiet import muffled
from .environment import LoadWatch, describe
from .rounds import CallRunner, Schedule, compare
from .tables import Record, record

SCHEMA_VERSION = 1
CLASSES = 80
PACKAGES = ('mmdet', 'pycocotools', 'faster-coco-eval')
SIDE = 480


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Args:
        images: Number of images.
        results: Results per image.
        objects: Objects per image.
        schedule: How long to measure.
    """

    images: int = 1000
    results: int = 100
    objects: int = 7
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if min(self.images, self.results, self.objects) < 1:
            raise ValueError('images, results and objects must be at least 1.')


def scenes(settings: Settings) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Objects and results as mmdet's metric takes them: ellipses; results are near an object."""
    from pycocotools import mask as coco_masks

    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]

    def shape(box: np.ndarray) -> dict[str, Any]:
        (x, y), (w, h) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 2) / 2
        inside = ((columns - x) / w) ** 2 + ((rows - y) / h) ** 2 <= 1
        return coco_masks.encode(np.asfortranarray(inside, dtype=np.uint8))

    # So many shapes are drawn, and moved to other images.
    pool = []
    for _ in range(100):
        corner = generator.uniform(0, 0.7 * SIDE, 2)
        box = np.hstack([corner, corner + generator.uniform(8, 0.3 * SIDE, 2)])
        near = [box + generator.normal(0, 0.05 * (box[2] - box[0]), 4) for _ in range(10)]
        pool.append([(each, shape(each)) for each in (box, *near)])
    found = []
    for number in range(1, settings.images + 1):
        own = generator.integers(len(pool), size=settings.objects)
        labels = generator.integers(CLASSES, size=settings.objects)
        objects = [
            {'bbox': pool[i][0][0].tolist(), 'bbox_label': label, 'mask': dict(pool[i][0][1])}
            for i, label in zip(own, labels)
        ]
        which = generator.integers(settings.objects, size=settings.results)
        near = [pool[own[i]][generator.integers(1, 11)] for i in which]
        same = generator.random(settings.results) < 0.7
        result = {
            'img_id': number,
            'bboxes': np.array([box for box, _ in near], np.float32),
            'scores': generator.random(settings.results).astype(np.float32),
            'labels': np.where(
                same, labels[which], generator.integers(CLASSES, size=settings.results)
            ),
            'masks': [dict(mask) for _, mask in near],
        }
        image = {'img_id': number, 'width': SIDE, 'height': SIDE, 'anns': objects}
        found.append((image, result))
    return found


def run(settings: Settings) -> Record:
    """Time of box and mask AP by FastCocoMetric relative to mmdet's CocoMetric.

    Returns JSON values: `schema_version`, `command`, `settings`, `environment`, `load`,
    `comparison`, and `values`: the AP that both have.

    Raises:
        ValueError: A setting is not allowed, or the two differ.
    """
    from mmdet.evaluation.metrics import CocoMetric

    from ..evaluation.coco import FastCocoMetric

    watch = LoadWatch()
    found = scenes(settings)
    values: dict[str, Any] = {}

    def runner(name: str, kind: Any) -> CallRunner:
        metric = kind(metric=['bbox', 'segm'])
        metric.dataset_meta = {'classes': [str(number) for number in range(CLASSES)]}
        given = copy.deepcopy(found)

        def evaluate() -> None:
            gc.enable()  # as in a run: so many objects make it a part of the time
            with muffled(), contextlib.redirect_stdout(io.StringIO()):
                values[name] = dict(metric.compute_metrics(given))

        evaluate()  # reads the objects, as the first epoch does
        return CallRunner(evaluate)

    reference, ours = 'mmdet CocoMetric', 'FastCocoMetric'
    runners = {reference: runner(reference, CocoMetric), ours: runner(ours, FastCocoMetric)}
    twin = runner(f'{reference} again', CocoMetric)
    comparison = compare(runners, {reference: twin}, None, settings.schedule)
    if values[reference] != values[ours]:
        raise ValueError(f'{values[ours]} is not {values[reference]}; please report this.')
    return {
        'schema_version': SCHEMA_VERSION,
        'command': 'evaluation',
        'settings': asdict(settings),
        'environment': describe(PACKAGES),
        'load': watch.report(),
        'comparison': record(comparison),
        'values': values[ours],
    }

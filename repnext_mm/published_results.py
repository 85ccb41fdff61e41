"""Published figures, and the ways of training that they are published for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to train a backbone on a task: how its configs are called, and what is known of it."""

    title: str
    task: str
    dataset: str
    section: str = ''  # of published_results.json; none of ours has published figures without
    columns: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """How the names of its configs end."""
        return self.dataset.lower()


#: By the first part of a config's name.
METHODS = {
    'mask_rcnn': Method(
        'box / mask AP', 'Instance Segmentation', 'COCO', 'coco_mask_rcnn_1x', ('box_AP', 'mask_AP')
    ),
    'semantic_fpn': Method(
        'mIoU, Semantic FPN', 'Semantic Segmentation', 'ADE20K', 'ade20k_semantic_fpn', ('mIoU',)
    ),
    'upernet': Method(
        'mIoU, UPerNet', 'Semantic Segmentation', 'ADE20K', 'ade20k_upernet', ('mIoU',)
    ),
    'faster_rcnn': Method('box AP, Faster R-CNN', 'Object Detection', 'COCO'),
    'retinanet': Method('box AP, RetinaNet', 'Object Detection', 'COCO'),
    'rtmdet': Method('box AP, RTMDet', 'Object Detection', 'COCO'),
    'rtmdet_ins': Method('box / mask AP, RTMDet-Ins', 'Instance Segmentation', 'COCO'),
}


@cache
def published_results() -> dict[str, dict[str, Any]]:
    """Published figures by section and model; nothing in it was measured here."""
    return json.loads((Path(__file__).parent / 'published_results.json').read_text('utf-8'))


def published(section: str, model: str) -> dict[str, float]:
    """Published figures of one model by column; empty where there are none."""
    rows = published_results().get(section, {'_columns': ()})
    values = zip(rows['_columns'], rows.get(model, ()), strict=False)
    return {column: value for column, value in values if value is not None}


#: Columns of ImageNet by the recipe that they are of: a recipe's figures are compared with its own.
TOP1: dict[str, str] = {
    'top1_distilled': 'top-1, distilled',
    'top1': 'top-1',
    'top1_starnet_distilled': "top-1, StarNet's recipe, distilled",
    'top1_starnet': "top-1, StarNet's recipe",
}
LATENCIES: dict[str, str] = {
    'latency_ms_iphone12': 'ms, iPhone 12',
    'latency_ms_iphone13': 'ms, iPhone 13',
}
#: How the names of ImageNet's configs end, and whose figure is theirs.
_ENDINGS = {
    '_starnet_distill': 'top1_starnet_distilled',
    '_starnet': 'top1_starnet',
    '_distill': 'top1_distilled',
    '': 'top1',
}


def top1(figures: Mapping[str, float]) -> float:
    """One accuracy for a network: of its family's own recipe and distilled, where published."""
    return next(figures[c] for c in ('top1_distilled', 'top1_starnet_distilled', 'top1')
                if c in figures)  # fmt: skip


def of_imagenet_config(name: str) -> tuple[str, dict[str, float]] | None:
    """The network of a config of ImageNet by its name, and the figure of its recipe."""
    stem = name.removesuffix('_imagenet')
    if stem == name:
        return None
    ending = next(ending for ending in _ENDINGS if stem.endswith(ending))
    network = stem.removesuffix(ending).removesuffix('_384')
    figures = published('imagenet', network)
    column = _ENDINGS[ending]
    if column not in figures:  # the E forms have StarNet's recipe alone
        column = column.replace('top1', 'top1_starnet')
    found = column in figures and not stem.endswith('_384')
    return network, {'top1': figures[column]} if found else {}

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
    section: str
    columns: tuple[str, ...]

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
}


@cache
def published_results() -> dict[str, dict[str, Any]]:
    """Published figures by section and model; nothing in it was measured here."""
    return json.loads((Path(__file__).parent / 'published_results.json').read_text('utf-8'))


def published(section: str, model: str) -> dict[str, float]:
    """Published figures of one model by column; empty where there are none."""
    rows = published_results()[section]
    values = zip(rows['_columns'], rows.get(model, ()), strict=False)
    return {column: value for column, value in values if value is not None}


def top1(figures: Mapping[str, float]) -> float:
    """ImageNet accuracy of a network's figures: with distillation where it was published."""
    return figures.get('top1_distill_300e', figures['top1_300e'])

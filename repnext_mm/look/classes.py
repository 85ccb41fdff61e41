"""Segmentation and classification beside the truth: confusions, IoU, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

IGNORED = 255
#: Pixels on each side of an edge between classes that count as its border.
BORDER = 3


@dataclass
class Pixels:
    """What an evaluation of label maps says.

    Args:
        classes: Names.
        confusion: `(C, C)` pixels by true and predicted class.
        border: Share of the wrong pixels that are near an edge of the truth.
        images: IoU of each image and class, `(C,)`; NaN where the class is not in the image.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    border: float = float('nan')
    images: list[np.ndarray] = field(default_factory=list)

    @property
    def iou(self) -> np.ndarray:
        """Of each class; NaN where it is in no image and nowhere predicted."""
        return iou_of(self.confusion)


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class of a confusion matrix."""
    right = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - right
    return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)


def confusion_of(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """`(C, C)` pixels of two label maps `(H, W)`; those of no class are left out."""
    valid = (truth < classes) & (prediction < classes)
    codes = truth[valid].astype(np.int64) * classes + prediction[valid]
    return np.bincount(codes, minlength=classes**2).reshape(classes, classes)


def compare_maps(pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: Sequence[str]) -> Pixels:
    """Evaluate pairs of true and predicted label maps `(H, W)`."""
    count = len(classes)
    result = Pixels(tuple(classes), np.zeros((count, count), np.int64))
    wrong = near = 0
    for truth, prediction in pairs:
        confusion = confusion_of(truth, prediction, count)
        result.confusion += confusion
        present = confusion.sum(1) > 0
        result.images.append(np.where(present, iou_of(confusion), np.nan))
        errors = (truth != prediction) & (truth < count)
        wrong += int(errors.sum())
        near += int((errors & _borders(truth)).sum())
    result.border = near / wrong if wrong else float('nan')
    return result


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels of a label map `(H, W)` near another class."""
    edges = np.zeros(labels.shape, bool)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    wide = edges.copy()
    for shift in range(1, BORDER + 1):
        for axis in (0, 1):
            wide |= np.roll(edges, shift, axis) | np.roll(edges, -shift, axis)
    return wide

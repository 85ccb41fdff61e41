"""NMS in its forms, and the overlaps of boxes.

Boxes are `(N, 4)` as x1, y1, x2, y2 in pixels. With `offset` 1 a box from 3 to 5 is 3 pixels wide,
as in MMDetection 1; with 0 it is 2 wide.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .numerics import widen

NAIVE, LINEAR, GAUSSIAN = range(3)  # softnms' methods


def _rounded(value: float, single: bool) -> float:
    """A limit in the boxes' precision, so that what is equal to it also compares as equal."""
    return float(np.float32(value)) if single else value


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; among equal scores the first box wins.

    A box is dropped when its IoU with a kept, better box exceeds `iou_threshold`.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    boxes, scores = widen(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    threshold = _rounded(iou_threshold, boxes.dtype == torch.float32)
    return torch.ops.torchvision.nms(boxes, scores, threshold)


def _iou(one: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """IoU of a box with N others, from columns x1, y1, x2, y2, area: `(5,)` and `(5, N)`."""
    width = np.minimum(one[2], others[2]) - np.maximum(one[0], others[0]) + offset
    height = np.minimum(one[3], others[3]) - np.maximum(one[1], others[1]) + offset
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    with np.errstate(divide='ignore', invalid='ignore'):  # two boxes without area
        return shared / (one[4] + others[4] - shared)


def _table(boxes: Tensor, scores: Tensor, offset: int) -> np.ndarray:
    """Rows x1, y1, x2, y2, area, score `(6, N)`: a copy in at least 32 bits."""
    boxes, scores = widen(boxes, scores)
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    return torch.stack([x1, y1, x2, y2, area, scores]).cpu().numpy()


@torch.no_grad()
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap a better one, and drop those below `min_score`.

    The M boxes that remain and their new scores are written to `dets[:M]`, shape `(N, 5)`, best
    first; their indices `(M,)` are returned. `method`: 0 sets the score to 0 from an IoU of
    `iou_threshold` on, 1 multiplies it by `1 - IoU` from there on, 2 by `exp(-IoU ** 2 / sigma)`
    at any IoU.
    """
    table = _table(boxes, scores, offset)
    score = table[5]
    order = np.arange(score.size)
    single = table.dtype == np.float32
    threshold, floor = _rounded(iou_threshold, single), _rounded(min_score, single)
    count = score.size
    first = 0
    while first < count:
        # Boxes change places as in the compiled operator, since places decide between equal scores.
        best = first
        if not np.isnan(score[first]):  # of two boxes without area; nothing compares as better
            best += int(np.nanargmax(score[first:count]))
        for rows in (table, order):
            rows[..., [first, best]] = rows[..., [best, first]]
        after = slice(first + 1, count)
        iou = _iou(table[:5, first], table[:5, after], offset)
        if method == GAUSSIAN:
            score[after] *= np.exp(-(iou * iou) / sigma)
        else:
            lowered = 1 - iou if method == LINEAR else np.zeros_like(iou)
            score[after] *= np.where(iou >= threshold, lowered, 1)
        kept = ~(score[after] < floor)
        count = first + 1 + int(kept.sum())
        # The last of the kept boxes fills the first gap, and so on.
        inside = count - first - 1
        gaps = first + 1 + np.flatnonzero(~kept[:inside])
        fillers = count + np.flatnonzero(kept[inside:])[::-1]
        for rows in (table, order):
            rows[..., gaps] = rows[..., fillers]
        first += 1
    dets[:count] = torch.from_numpy(table[[0, 1, 2, 3, 5], :count].T.copy()).to(dets)
    return torch.from_numpy(order[:count]).to(boxes.device)


@torch.no_grad()
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of box indices: a box that NMS keeps, then those it drops from an IoU of the threshold
    on, best score first. `dets` is `(N, 5)`, boxes and scores.
    """
    table = _table(dets[:, :4], dets[:, 4], offset=0)
    threshold = _rounded(iou_threshold, table.dtype == np.float32)
    rest = np.argsort(-table[5], kind='stable')
    groups = []
    while rest.size:
        best, rest = rest[0], rest[1:]
        matched = _iou(table[:5, best], table[:5, rest], offset=0) >= threshold
        groups.append([int(best), *rest[matched].tolist()])
        rest = rest[~matched]
    return groups


@torch.no_grad()
def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """Write IoUs (`mode` 0), or shares of the first boxes' areas (`mode` 1), to `ious`.

    `ious` is `(N, M)` for boxes `(N, 4)` and `(M, 4)`, or `(N,)` for `aligned` pairs.
    """
    first, second = widen(bboxes1, bboxes2)
    if not aligned:
        first = first[:, None]
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low + offset).clamp(min=0).prod(-1)
    base, area = ((boxes[..., 2:] - boxes[..., :2] + offset).prod(-1) for boxes in (first, second))
    if mode == 0:
        base = base + area - shared
    ious.copy_(shared / base)

"""Boxes of fixed number: what an exported detector selects, clips and suppresses with.

A row that holds nothing has the score `ABSENT`; scores proper are not negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...operators.suppression import ABSENT, PRESENT, nms_keep


def translations() -> dict[Any, Callable[..., Any]]:
    """How torch.onnx writes `nms_keep`: with its maximum and threshold inside NonMaxSuppression.

    Its own lowering of `torchvision::nms` has neither.
    """
    import numpy as np
    from onnx import numpy_helper
    from onnxscript import opset18 as op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, dtype)))

    def nms_keep_onnx(boxes: Any, scores: Any, iou: float, most: int) -> Any:
        scores = op.Unsqueeze(scores, constant([1], np.int64))
        rows = op.NonMaxSuppression(
            boxes,
            scores,
            constant([most], np.int64),
            constant([iou], np.float32),
            constant([PRESENT], np.float32),
        )
        nothing = op.Expand(constant(ABSENT, np.float32), op.Shape(scores))
        kept = op.ScatterND(nothing, rows, op.GatherND(scores, rows))
        return op.Squeeze(kept, constant([1], np.int64))

    return {torch.ops.repnext_mm.nms_keep.default: nms_keep_onnx}


def batched_nms(boxes: Tensor, scores: Tensor, ids: Tensor, iou: float, most: int) -> Tensor:
    """What mmcv's `batched_nms` keeps: scores `(N, R)`, `ABSENT` where dropped.

    Boxes are moved apart by their id as mmcv moves them, with its rounding in float32, so that
    overlaps next to the threshold are decided alike.

    Args:
        boxes: `(N, R, 4)`.
        scores: `(N, R)`.
        ids: `(N, R)`; boxes of different ids do not suppress each other.
    """
    edge = torch.where(scores > PRESENT, boxes.amax(-1), -torch.inf).amax(1)
    moved = boxes + (ids.to(boxes) * (edge + 1).clamp(min=0)[:, None])[..., None]
    return nms_keep(moved, scores, iou, most)


def best(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The best of `(N, R)` and their places, both `(N, most)` or less where R is known.

    Where R is open and smaller than `most`, what is missing is -inf, and its place 0.
    """
    count = scores.shape[1]
    if isinstance(count, int):
        values, places = scores.topk(min(most, count), 1)
        return values, places
    # -inf and not `ABSENT`, since logits may be smaller.
    values, places = F.pad(scores, (0, most), value=-torch.inf).topk(most, 1)
    return values, torch.where(places < count, places, 0)


def strongest(scores: Tensor, most: int, above: float | None) -> tuple[Tensor, Tensor]:
    """The best of `(N, R)` and their places, both `(N, K)`, where K is not known before.

    K is how many are above a score in the image that has the most of them, one at least; `most` or
    R, whatever is less, with `above=None`.
    """
    count = scores.shape[1]
    if above is None:
        is_open = isinstance(count, torch.SymInt)  # a tensor in torch.jit.trace
        return scores.topk(torch.sym_min(most, count) if is_open else min(most, int(count)), 1)
    k = (scores > above).sum(1).max().clamp(1, most).item()
    torch._check(k >= 1)
    torch._check(k <= count)
    return scores.topk(k, 1)  # type: ignore[arg-type]


def rows_of(values: Tensor, places: Tensor) -> Tensor:
    """`(N, R, C)` at `(N, K)`: `(N, K, C)`."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def flattened(maps: Tensor, channels: int) -> Tensor:
    """A head's `(N, anchors * channels, H, W)` as `(N, H * W * anchors, channels)`."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, channels)


def clipped(boxes: Tensor, image_size: Tensor) -> Tensor:
    """`(N, K, 4)` within `(N, 2)` heights and widths."""
    limit = image_size.flip(1).repeat(1, 2)[:, None]
    return torch.minimum(boxes.clamp(min=0), limit)


def decoded(coder: Any, priors: Tensor, deltas: Tensor, image_size: Tensor) -> Tensor:
    """Boxes `(N, K, 4)` of priors `(N, K, P)` and what a head says of them `(N, K, D)`."""
    n, k = deltas.shape[:2]
    flat = coder.decode(priors.reshape(n * k, -1), deltas.reshape(n * k, -1))
    boxes = flat.reshape(n, k, 4)
    return clipped(boxes, image_size) if getattr(coder, 'clip_border', True) else boxes

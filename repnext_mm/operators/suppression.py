"""Non-maximum suppression with results of fixed shape, for exported detectors."""

from __future__ import annotations

import torch
from torch import Tensor

#: The score of a row that holds nothing; scores proper are not negative.
ABSENT = -1.0
#: Between `ABSENT` and every score.
PRESENT = ABSENT / 2


@torch.library.custom_op('repnext_mm::nms_keep', mutates_args=())
def nms_keep(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Scores of what NMS keeps, `ABSENT` elsewhere: of the same shape, whatever is found.

    Args:
        boxes: `(N, R, 4)`.
        scores: `(N, R)`.
        iou: More overlap than this with a better box, and a box is dropped.
        most: At most so many are kept of each image.
    """
    from torchvision.ops import nms  # most who import this module never call it

    kept = torch.full_like(scores, ABSENT)
    for own, row, out in zip(boxes, scores, kept):
        present = (row > PRESENT).nonzero().squeeze(1)
        chosen = present[nms(own[present], row[present], iou)[:most]]
        out[chosen] = row[chosen]
    return kept


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    return torch.empty_like(scores)

"""A segmentor of mmseg in whole mode: an image to the class of every pixel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtimes import LEAST_SIDE, MOST_SIDE
from .base import OUT_SIZE, Preprocess, Target, UnsupportedModel


class OpenUpsample(nn.Module):
    """mmseg's `Upsample`, with a factor that sizes stay whole numbers under.

    mmseg multiplies by a float, which the ONNX of an open size gets wrong without a word.
    """

    def __init__(self, factor: int, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, factor * H, factor * W)`."""
        size = [side * self.factor for side in x.shape[2:]]
        return F.interpolate(x, size, None, self.mode, self.align_corners)


class OpenPool(nn.Module):
    """Adaptive average pooling as two matrix products, exact at open sizes.

    torch's own decomposition assumes the size that was traced.
    """

    def __init__(self, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(bins)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, *bins)`."""
        rows, columns = (
            self._weights(side, bins).to(x) for side, bins in zip(x.shape[2:], self.bins)
        )
        return rows @ x @ columns.T

    @staticmethod
    def _weights(side: int, bins: int) -> Tensor:
        """`(bins, side)`: bin i averages the pixels from floor(i*side/bins) on."""
        i, at = torch.arange(bins)[:, None], torch.arange(side)
        low, high = i * side // bins, ((i + 1) * side + bins - 1) // bins
        inside = ((at >= low) & (at < high)).float()
        return inside / inside.sum(1, keepdim=True)


class SegmentorTarget(Target):
    """`image (N, 3, H, W)` and `out_size (2,)` to `classes (N, *out_size)` int32.

    The logits are resized as `predict` of mmseg resizes them: to the image's size, then to that of
    the original.

    Args:
        model: An mmseg EncoderDecoder whose `test_cfg.mode` is 'whole'.
        output: 'classes', or 'logits' for `logits (N, C, *out_size)` float32.
        sized: Whether there is the input `out_size`; classes at the image's size where not.

    Raises:
        UnsupportedModel: It predicts otherwise than an EncoderDecoder in whole mode.
    """

    task = 'segmentation'
    model: Any

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype | None = None,
        output: str = 'classes',
        sized: bool = True,
    ) -> None:
        _require_whole(model)
        super().__init__(opened(copy.deepcopy(model)), preprocess, dtype)
        self.output_names = (output,)
        self.extras = (OUT_SIZE,) if sized else ()
        self.lowers_once = sized
        self.align_corners = self.model.align_corners
        self.threshold: Any = getattr(self.model.decode_head, 'threshold', None)

    def forward(self, image: Tensor, out_size: Tensor | None = None) -> Tensor:
        features = self.model.extract_feat(self.prepared(image))
        logits = self.model.decode_head(features).float()
        logits = self._resized(logits, tuple(image.shape[2:]))
        if out_size is not None:
            height, width = (out_size[i].item() for i in range(2))
            for side in (height, width):
                torch._check(side >= LEAST_SIDE)
                torch._check(side <= MOST_SIDE)
            logits = self._resized(logits, (height, width))
        if self.output_names == ('logits',):
            return logits
        if logits.shape[1] == 1:
            return (logits[:, 0].sigmoid() > self.threshold).to(torch.int32)
        return logits.argmax(1).to(torch.int32)

    def _resized(self, logits: Tensor, size: Any) -> Tensor:
        return F.interpolate(logits, size, mode='bilinear', align_corners=self.align_corners)

    def for_format(self, format_name: str) -> SegmentorTarget:
        # Core ML takes images alone, and tracing makes a constant of a size.
        if format_name not in ('coreml', 'torchscript'):
            return self
        twin = copy.copy(self)
        twin.extras, twin.lowers_once = (), False
        return twin

    def refuse(self, format_name: str, dynamic: str) -> str:
        if format_name == 'torchscript' and 'hw' in dynamic:
            return 'tracing makes constants of its sizes'
        return ''

    def description(self) -> dict[str, Any]:
        return {'num_classes': int(self.model.decode_head.num_classes)}


def opened(model: nn.Module) -> nn.Module:
    """Replace, in place, what is wrong at open sizes by what is right at every size."""
    from mmseg.models.utils.wrappers import Upsample

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample) and not child.size:
                factor = float(child.scale_factor)
                if factor.is_integer():
                    setattr(
                        module, name, OpenUpsample(int(factor), child.mode, child.align_corners)
                    )
            elif isinstance(child, nn.AdaptiveAvgPool2d):
                size: Any = child.output_size
                bins = (size, size) if isinstance(size, int) else tuple(size)
                if bins != (1, 1) and None not in bins:
                    setattr(module, name, OpenPool(bins))
    return model


def _require_whole(model: Any) -> None:
    from mmseg.models import EncoderDecoder
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    name = type(model).__name__
    own = [
        method
        for method in ('predict', 'inference', 'encode_decode', 'whole_inference')
        if getattr(type(model), method) is not getattr(EncoderDecoder, method)
    ]
    if own:
        raise UnsupportedModel(f'{name} has its own {own[0]}, which cannot be exported exactly.')
    head = model.decode_head
    if not isinstance(head, BaseDecodeHead) or any(
        getattr(type(head), method) is not getattr(BaseDecodeHead, method)
        for method in ('predict', 'predict_by_feat')
    ):
        raise UnsupportedModel(
            f'{type(head).__name__} has its own predict, which cannot be exported exactly; heads '
            "of mmseg that use BaseDecodeHead's can."
        )
    mode = model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        raise UnsupportedModel(
            f'test_cfg.mode is {mode!r}, and a file computes one image at a time; set '
            "model.test_cfg to dict(mode='whole')."
        )

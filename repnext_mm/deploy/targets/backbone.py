"""A backbone: an image to its feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backbones import PyramidBackbone
from .base import Preprocess, Target


class BackboneTarget(Target):
    """`image (N, 3, H, W)` to one float32 feature map `(N, C_i, H_i, W_i)` per stage."""

    task = 'backbone'
    model: PyramidBackbone

    def __init__(
        self,
        model: PyramidBackbone,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, preprocess, dtype)
        self.output_names = tuple(f'stage{i}' for i in model.out_indices)
        self.step = model.strides[model.out_indices[-1]]
        self.least_side = model.least_side

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        stages = self.model(self.prepared(image))
        return stages if self.dtype is None else tuple(stage.float() for stage in stages)

    def description(self) -> dict[str, Any]:
        model = self.model
        return {
            'out_indices': list(model.out_indices),
            'out_channels': list(model.out_channels),
            'out_strides': list(model.out_strides),
        }

"""A classifier: an image to the logits of its classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .base import Preprocess, Target

#: What Core ML calls the probabilities beside the label that it chooses.
PROBABILITIES = 'probabilities'


class ClassifierTarget(Target):
    """`image (N, 3, H, W)` to `logits (N, num_classes)` float32.

    Args:
        model: A `TimmClassifier`, or a network of timm.
        output: 'logits', or `PROBABILITIES` for their softmax.
    """

    task = 'classification'

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype | None = None,
        output: str = 'logits',
    ) -> None:
        super().__init__(network_of(model), preprocess, dtype)
        self.output_names = (output,)
        self.least_side = getattr(self.model, 'least_side', 1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(self.prepared(image))
        logits = logits if self.dtype is None else logits.float()
        return (logits.softmax(1) if self.output_names == (PROBABILITIES,) else logits,)

    def for_format(self, format_name: str) -> ClassifierTarget:
        if format_name != 'coreml':
            return self
        twin = copy.copy(self)
        twin.output_names = (PROBABILITIES,)
        return twin

    def description(self) -> dict[str, Any]:
        return {'num_classes': int(self.model.num_classes)}  # type: ignore[arg-type]


def network_of(model: nn.Module) -> nn.Module:
    """The network of a classifier as it is trained, or the network itself."""
    from ...classification import TimmClassifier

    return model.network if isinstance(model, TimmClassifier) else model

"""What every target is: one module from an image batch to named tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbones import PyramidBackbone
from ..errors import ModelError

INPUT = 'image'
#: Second inputs of targets, as every runtime knows them.
IMAGE_SIZE, OUT_SIZE = 'image_size', 'out_size'


class UnsupportedModel(ModelError):
    """A model that cannot be exported exactly; the message says which part, and why."""


@dataclass(frozen=True)
class Preprocess:
    """What a data preprocessor does to an image with values from 0 to 255.

    Args:
        mean: Per channel, in the order after `swap`.
        std: As `mean`.
        swap: Whether red and blue change places first.
        pad_value: Of what is padded on the right and below, after the normalization.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    swap: bool
    pad_value: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Preprocess | None:
        """That of a config's `data_preprocessor`, None where it changes nothing."""
        settings = settings or {}
        swap = bool(settings.get('bgr_to_rgb') or settings.get('rgb_to_bgr'))
        normalizes = settings.get('mean') is not None and settings.get('std') is not None
        if not (normalizes or swap):
            return None
        mean, std = (settings['mean'], settings['std']) if normalizes else ((0,) * 3, (1,) * 3)
        pad_value = settings.get('pad_value', settings.get('pad_val', 0))
        return cls(tuple(mean), tuple(std), swap, float(pad_value))

    def apply(self, image: Tensor, image_size: Tensor | None = None) -> Tensor:
        """`(N, 3, H, W)` as loaded to what the network requires.

        Args:
            image_size: `(N, 2)` height and width without padding. The zeros that pad an image as it
                was loaded are not those that pad a normalized one, and these are written here.
        """
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        image = ((image.flip(1) if self.swap else image) - mean) / std
        if image_size is None:
            return image
        rows, columns = (
            torch.arange(side, device=image.device, dtype=image_size.dtype)
            for side in image.shape[2:]
        )
        inside = (rows[None, :, None] < image_size[:, 0, None, None]) & (
            columns[None, None] < image_size[:, 1, None, None]
        )
        return torch.where(inside[:, None], image, self.pad_value)

    def swapped(self) -> Preprocess:
        """The same for channels in the other order."""
        return replace(self, mean=self.mean[::-1], std=self.std[::-1], swap=not self.swap)

    def undo(self, image: Tensor) -> Tensor:
        """The image that `apply` makes `image` of."""
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        raw = image * std + mean
        return raw.flip(1) if self.swap else raw


class Target(nn.Module):
    """A model as every format presents it: `image (N, 3, H, W)` float32 to named tensors.

    Args:
        model: The model in eval mode, with float32 weights.
        preprocess: Applied first, where the file requires images as they were loaded.
        dtype: What the network computes in where that is not float32; inputs and outputs are
            converted, and what follows the network stays in float32.

    Attributes:
        task: What it is for; the key of everything that depends on it.
        output_names: One for each output, in their order.
        extras: Names of inputs beside the image; `runtimes.EXTRAS` says what they are.
        step: What height and width must be divisible by; 1 for any.
        least_side: The smallest height and width.
        lowers_once: Whether sizes depend on values, so that a program can be lowered only once.
    """

    task: ClassVar[str]
    extras: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    step = 1
    least_side = 1
    lowers_once = False
    #: The newest ONNX operator set that ONNX Runtime can run it in.
    most_opset = 23
    #: Whether its outputs are results, rather than what a predictor makes results of.
    finished = True

    def __init__(
        self, model: nn.Module, preprocess: Preprocess | None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        #: What of it is computed: all but what the first convolution does.
        self.applied = preprocess
        self.dtype = dtype

    @property
    def translations(self) -> dict[Any, Callable[..., Any]]:
        """How torch.onnx writes the operators of this package."""
        return {}

    def refuse(self, format_name: str, dynamic: str) -> str:
        """Why a format cannot hold this target; '' where it can."""
        return ''

    def for_format(self, format_name: str) -> Target:
        """This target as a format takes it."""
        return self

    def prepared(self, image: Tensor, image_size: Tensor | None = None) -> Tensor:
        """The image as the network requires it, in its dtype."""
        if self.applied is not None:
            image = self.applied.apply(image, image_size)
        return image if self.dtype is None else image.to(self.dtype)

    def without_swap(self) -> Target:
        """A copy whose first convolution, and no operation of its own, swaps red and blue.

        It is known in backbones of this package; others, and what swaps nothing, stay as they are.
        OpenVINO needs 4 ms more in bfloat16 to swap the channels of an image of 512x512.
        """
        known = any(isinstance(module, PyramidBackbone) for module in self.modules())
        if self.applied is None or not self.applied.swap or not known:
            return self
        twin = copy.deepcopy(self)
        backbone = next(m for m in twin.modules() if isinstance(m, PyramidBackbone))
        with torch.no_grad():
            weight = backbone.first_convolution.weight
            weight.copy_(weight.flip(1))
        twin.applied = self.applied.swapped()
        return twin

    def exactly(self) -> Target:
        """A copy that computes in float64."""
        twin = copy.deepcopy(self)
        twin.model.double()
        return twin

    def reduced(self, dtype: torch.dtype) -> Target:
        """A copy whose network computes in a smaller dtype."""
        twin = copy.deepcopy(self)
        for module in twin.network():
            module.to(dtype)
        twin.dtype = dtype
        return twin

    def network(self) -> list[nn.Module]:
        """The modules that `reduced` converts."""
        return [self.model]

    def description(self) -> dict[str, Any]:
        """What of the model stands in the metadata of its files."""
        return {}

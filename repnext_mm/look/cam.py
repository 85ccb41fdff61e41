"""Where a network looks for a decision: Grad-CAM and EigenCAM, by the package grad-cam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.errors import UserError

INSTALL = "pip install 'repnext_mm[look]'"


class _Score(nn.Module):
    """A model as one number: how much it is for a decision."""

    def __init__(self, model: nn.Module, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._score = score

    def forward(self, x: Tensor) -> Tensor:
        return self._score(x).reshape(1, 1)


def grad_cam(
    model: nn.Module, layer: nn.Module, x: Tensor, score: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """Grad-CAM (arXiv 1610.02391) of a decision, `(H, W)` from 0 to 1.

    Args:
        model: Contains `layer`.
        layer: Returns the feature maps `(1, C, h, w)` that are weighted.
        x: `(1, 3, H, W)`, as the model computes with it.
        score: The decision's score as a function of `x`.

    Raises:
        UserError: The package is not installed.
    """
    cam = _package().GradCAM(model=_Score(model, score), target_layers=[layer])
    try:
        with torch.enable_grad():
            return cam(input_tensor=x, targets=[lambda output: output[0]])[0]
    finally:
        cam.activations_and_grads.release()


def eigen_cam(features: Tensor) -> np.ndarray:
    """EigenCAM (arXiv 2008.00299): the first principal component of feature maps, `(h, w)`.

    The package computes it, and leaves the sign open, so that half of the maps mark the
    background. It is chosen here: places where features are strong count as marked.

    Args:
        features: `(1, C, h, w)`.

    Raises:
        UserError: The package is not installed.
    """
    _package()
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

    array = features.detach().float().cpu().numpy()
    component = get_2d_projection(array)[0]
    strength = np.linalg.norm(array[0], axis=0)
    if ((component - component.mean()) * (strength - strength.mean())).sum() < 0:
        component = -component
    low, high = component.min(), component.max()
    return (component - low) / max(high - low, 1e-12)


def _package() -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise UserError(f'maps of attention need grad-cam ({error}): {INSTALL}.') from error
    return pytorch_grad_cam


def available() -> bool:
    """Whether the package is installed."""
    try:
        _package()
    except UserError:
        return False
    return True


# --- scores of decisions


def class_score(model: Any, label: int) -> Callable[[Tensor], Tensor]:
    """Of a classifier: the logit of a class."""
    return lambda x: model.network(x)[0, label]


def pixels_score(model: Any, label: int) -> Callable[[Tensor], Tensor]:
    """Of a segmentor: the logits of a class where it is predicted."""

    def score(x: Tensor) -> Tensor:
        logits = model.decode_head(model.extract_feat(x))
        inside = (logits.argmax(1) == label).detach()
        return logits[:, label][inside].sum() if inside.any() else logits[:, label].mean()

    return score


def box_score(model: Any, box: np.ndarray, label: int) -> Callable[[Tensor], Tensor]:
    """Of a detector: the logit of a class for a box in pixels of its input.

    A two-stage detector classifies the box; of a dense head it is the highest logit of the class
    at a place inside.
    """
    if hasattr(model, 'roi_head'):

        def two_stage(x: Tensor) -> Tensor:
            roi = x.new_tensor([[0.0, *map(float, box)]])
            return model.roi_head._bbox_forward(model.extract_feat(x), roi)['cls_score'][0, label]

        return two_stage

    def dense(x: Tensor) -> Tensor:
        best = []
        for level in model.bbox_head(model.extract_feat(x))[0]:
            _, channels, height, width = level.shape
            classes = model.bbox_head.cls_out_channels
            maps = level[0].view(channels // classes, classes, height, width)[:, label]
            stride = x.shape[-1] / width
            x0, y0, x1, y1 = (float(value) / stride for value in box)
            rows = slice(int(max(y0, 0)), max(int(np.ceil(y1)), int(max(y0, 0)) + 1))
            columns = slice(int(max(x0, 0)), max(int(np.ceil(x1)), int(max(x0, 0)) + 1))
            inside = maps[:, rows, columns]
            if inside.numel():
                best.append(inside.amax())
        return torch.stack(best).amax()

    return dense

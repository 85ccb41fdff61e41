"""Attention: multi-scale deformable, and the masks of PSANet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import differentiate, widen


def _attend(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[list[int]], starts: list[int]
) -> Tensor:
    """Weighted sums of samples, `(N, queries, heads * channels)`, differentiable."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = 2 * locations - 1
    output = value.new_zeros(batch * heads, channels, queries)
    for level, ((height, width), start) in enumerate(zip(shapes, starts)):
        level_map = value[:, start : start + height * width].permute(0, 2, 3, 1)
        samples = F.grid_sample(
            level_map.reshape(-1, channels, height, width),
            grids[:, :, :, level].transpose(1, 2).flatten(0, 1),
            padding_mode='zeros',
            align_corners=False,
        )
        factors = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, queries, points)
        output = output + (samples * factors).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


@torch.no_grad()
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Sum of bilinear samples of all levels, `(N, queries, heads * channels)`.

    `value` is `(N, pixels of all levels, heads, channels)`, `value_spatial_shapes` `(L, 2)` heights
    and widths, `sampling_locations` `(N, queries, heads, L, points, 2)` x and y in [0, 1] and
    `attention_weights` the same without its last axis. `im2col_step` changes nothing.
    """
    values, locations, weights = widen(value, sampling_locations, attention_weights)
    shapes, starts = value_spatial_shapes.tolist(), value_level_start_index.tolist()
    return _attend(values, locations, weights, shapes, starts).to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients, written to `grad_value, grad_sampling_loc, grad_attn_weight`."""
    value, locations, weights, grad = widen(
        value, sampling_locations, attention_weights, grad_output
    )
    levels = (value_spatial_shapes.tolist(), value_level_start_index.tolist())
    grads = differentiate(_attend, grad, (value, locations, weights), *levels)
    with torch.no_grad():
        for target, result in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
            target.copy_(result)


def _relative(length: int, window: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Place of each position in the window around each other, `(length, length)`, and if inside."""
    position = torch.arange(length, device=device)
    place = position[:, None] - position + half
    return place.clamp(0, window - 1), (place >= 0) & (place < window)


@torch.no_grad()
def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread every pixel's window of attention over the feature map.

    `input` is `(N, h_mask * w_mask, H, W)`; `output` `(N, H * W, H, W)` receives pixel pairs, with
    the window's owner last for `psa_type` 0 (collect) and first for 1 (distribute).
    """
    rows, row_inside = _relative(h_feature, h_mask, half_h_mask, input.device)
    columns, column_inside = _relative(w_feature, w_mask, half_w_mask, input.device)
    index = rows[:, None, :, None] * w_mask + columns[None, :, None, :]
    inside = row_inside[:, None, :, None] & column_inside[None, :, None, :]
    pixels = h_feature * w_feature
    index = index.reshape(1, pixels, pixels).expand(num_, -1, -1)
    pairs = input.flatten(2).gather(1, index) * inside.reshape(pixels, pixels)
    if psa_type == 1:
        pairs = pairs.transpose(1, 2)
    output.copy_(pairs.reshape(output.shape))


@torch.no_grad()
def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Gradient of the windows, written to `grad_input`."""
    pairs = grad_output.flatten(2)
    if psa_type == 1:
        pairs = pairs.transpose(1, 2)
    targets, valid = [], []
    for length, window, half in (
        (h_feature, h_mask, half_h_mask),
        (w_feature, w_mask, half_w_mask),
    ):
        place = torch.arange(window, device=grad_output.device)[:, None] - half
        target = place + torch.arange(length, device=grad_output.device)
        targets.append(target.clamp(0, length - 1))
        valid.append((target >= 0) & (target < length))
    index = targets[0][:, None, :, None] * w_feature + targets[1][None, :, None, :]
    inside = valid[0][:, None, :, None] & valid[1][None, :, None, :]
    shape = (h_mask * w_mask, h_feature * w_feature)
    grad = pairs.gather(1, index.reshape(1, *shape).expand(num_, -1, -1)) * inside.reshape(shape)
    grad_input.copy_(grad.reshape(grad_input.shape))

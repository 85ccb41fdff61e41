"""Pooling of regions of interest.

RoIs are `(K, 5)`: index of the image in the batch, then x1, y1, x2, y2 in pixels of the image,
which `spatial_scale` maps to the feature map `(N, C, H, W)`. Outputs are
`(K, C, pooled_height, pooled_width)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import differentiate, reproducibly, widen

MAX_POOL = 0  # roi_align's pool_mode; 1 is the average
_CHUNK = 2**25  # sampled values at a time


def _to_map(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Top left corners and sizes of RoIs on the feature map, `(K, 2)` each as x, y."""
    boxes = rois[:, 1:] * spatial_scale - 0.5 * aligned
    start, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    return start, size if aligned else size.clamp(min=1)


def _samples(bins: Tensor, sampling_ratio: int) -> Tensor:
    """How many points of a bin are sampled along x and y, `(K, 2)`: by default one per pixel."""
    if sampling_ratio > 0:
        return torch.full_like(bins, sampling_ratio, dtype=torch.long)
    return bins.ceil().clamp(min=0).long()


def _groups(keys: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The distinct rows of `(K, n)` integers, each with the indices of its occurrences."""
    distinct, group = keys.unique(dim=0, return_inverse=True)
    for index, key in enumerate(distinct.tolist()):
        yield key, (group == index).nonzero()[:, 0]


@torch.no_grad()
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average or maximum of bilinear samples in each bin; `argmax_*` receive the maximum's place.

    An RoI without area is 0 everywhere.
    """
    features, rois = widen(input, rois)
    if pool_mode != MAX_POOL:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features,
                rois,
                spatial_scale,
                aligned_height,
                aligned_width,
                sampling_ratio,
                aligned,
            )
        )
        return
    start, size = _to_map(rois, spatial_scale, aligned)
    bins = size / size.new_tensor([aligned_width, aligned_height])
    output.zero_()
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    for (nx, ny), chosen in _groups(_samples(bins, sampling_ratio)):
        if nx * ny == 0:
            continue
        fine = (aligned_height * ny, aligned_width * nx)
        chunk = max(1, _CHUNK // (features.shape[1] * fine[0] * fine[1]))
        for index in chosen.split(chunk):
            # A bin per sample: its average is the sample.
            values = torch.ops.torchvision.roi_align(
                features, rois[index], spatial_scale, *fine, 1, aligned
            )
            shape = (*values.shape[:2], aligned_height, ny, aligned_width, nx)
            values, place = values.view(shape).transpose(3, 4).flatten(4).max(-1)
            output[index] = values.to(output)
            for axis, argmax, count in ((1, argmax_y, ny), (0, argmax_x, nx)):
                step = place // nx if axis else place % nx
                along = torch.arange(shape[2 if axis else 4], device=input.device)
                cell = along[:, None] if axis else along
                where = start[index, axis].view(-1, 1, 1, 1) + bins[index, axis].view(
                    -1, 1, 1, 1
                ) * (cell + (step + 0.5) / count)
                argmax[index] = where.to(argmax)


@torch.no_grad()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of the feature map, written to `grad_input`."""
    grad, rois = widen(grad_output, rois)
    if pool_mode == MAX_POOL:
        grad_input.copy_(_scatter(grad, rois[:, 0], argmax_y, argmax_x, grad_input.shape))
        return
    grad_input.copy_(
        reproducibly(
            torch.ops.torchvision._roi_align_backward,
            grad,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _scatter(values: Tensor, images: Tensor, y: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Add values `(K, C, h, w)` to a map at points `(K, C, h, w)`, shared by the 4 pixels around.

    Points outside the map count to the pixel nearest to them, up to 1 pixel away. A coordinate of
    -1 marks a bin without samples.
    """
    channels, height, width = shape[1:]
    y, x = widen(y, x)
    valid = (y != -1) & (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    plane = images.long().view(-1, 1, 1, 1) * channels
    plane = (plane + torch.arange(channels, device=values.device).view(1, -1, 1, 1)) * height
    sums = values.new_zeros(shape.numel())
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.long(), x.long()
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            # Where a pixel would be beyond the border its weight is 0.
            index = (plane + row.clamp(max=height - 1)) * width + column.clamp(max=width - 1)
            share = torch.where(valid, values * weight_y * weight_x, 0)
            sums.index_add_(0, index.flatten(), share.flatten().to(sums))
    return sums.view(shape)


@torch.no_grad()
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum of the pixels in each bin; `argmax` receives its index in `H * W`.

    A bin without pixels is 0 with argmax -1.
    """
    features, rois = widen(input, rois)
    limits = []
    for axis, count, length in ((0, pooled_width, -1), (1, pooled_height, -2)):
        low, high = rois[:, 1 + axis] * spatial_scale, (rois[:, 3 + axis] + 1) * spatial_scale
        edges = torch.arange(count + 1, device=input.device) * ((high - low) / count)[:, None]
        edges = edges + low[:, None]
        bounds = torch.stack([edges[:, :-1].floor(), edges[:, 1:].ceil()])
        limits.append(bounds.clamp(0, features.shape[length]) * (high > low)[:, None])
    (x1, x2), (y1, y2) = (
        limits[0][:, :, None, :].expand(-1, -1, pooled_height, -1),
        limits[1][:, :, :, None].expand(-1, -1, -1, pooled_width),
    )
    filled = (x2 > x1) & (y2 > y1)
    # torchvision rounds RoIs to pixels, and mmcv its bins: so each bin is an RoI to torchvision.
    image = rois[:, 0].view(-1, 1, 1).expand_as(x1)
    bins = torch.stack([image, x1, y1, x2 - 1, y2 - 1], -1).flatten(0, 2)
    pooled, place = torch.ops.torchvision.roi_pool(features, bins, 1.0, 1, 1)
    shape = (*filled.shape, features.shape[1])
    for target, values, empty in ((output, pooled, 0), (argmax, place, -1)):
        values = values.view(shape).permute(0, 3, 1, 2)
        target.copy_(torch.where(filled[:, None], values, empty))


@torch.no_grad()
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of the feature map, written to `grad_input`."""
    grad, rois = widen(grad_output, rois)
    grad_input.copy_(
        reproducibly(
            torch.ops.torchvision._roi_pool_backward,
            grad,
            rois,
            argmax,
            spatial_scale,
            pooled_height,
            pooled_width,
            *grad_input.shape,
        )
    )


def _deform_roi_pool(
    features: Tensor,
    rois: Tensor,
    offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """Averages of bins that `offset` moves, differentiable in features and offset."""
    height, width = features.shape[-2:]
    start, size = _to_map(rois, spatial_scale, aligned=True)
    bins = size / size.new_tensor([pooled_width, pooled_height])
    columns = torch.arange(pooled_width, device=rois.device)
    rows = torch.arange(pooled_height, device=rois.device)
    cells = torch.stack(torch.meshgrid(columns, rows, indexing='xy'))  # (2, h, w) as x, y
    corners = start[:, :, None, None] + bins[:, :, None, None] * cells
    if offset.numel():
        corners = corners + gamma * size[:, :, None, None] * offset
    output = features.new_zeros(len(rois), features.shape[1], pooled_height, pooled_width)
    keys = torch.cat([rois[:, :1].long(), _samples(bins, sampling_ratio)], 1)
    for (image, nx, ny), index in _groups(keys):
        if nx * ny == 0:
            continue
        x, y = (
            corners[index, axis, :, :, None]
            + (torch.arange(count, device=rois.device) + 0.5)
            / count
            * bins[index, axis].view(-1, 1, 1, 1)
            for axis, count in ((0, nx), (1, ny))
        )
        y, x = torch.broadcast_tensors(y[..., :, None], x[..., None, :])  # (k, h, w, ny, nx)
        inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        values = F.grid_sample(
            features[image : image + 1],
            grid.view(1, -1, nx * ny, 2),
            padding_mode='border',
            align_corners=False,
        )
        values = values.view(-1, *inside.shape) * inside
        output = output.index_copy(0, index, values.mean((-2, -1)).transpose(0, 1))
    return output


@torch.no_grad()
def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """RoIAlign whose bins move by `gamma * RoI size * offset`; no move for an empty `offset`.

    `offset` is `(K, 2, pooled_height, pooled_width)` as x, y.
    """
    features, rois, offset = widen(input, rois, offset)
    sizes = (pooled_height, pooled_width, spatial_scale, sampling_ratio, gamma)
    output.copy_(_deform_roi_pool(features, rois, offset, *sizes))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Gradients of the feature map and of the offsets, written to `grad_input, grad_offset`."""
    sizes = (pooled_height, pooled_width, spatial_scale, sampling_ratio, gamma)
    grad, features, rois, offset = widen(grad_output, input, rois, offset)
    grads = differentiate(
        lambda features, offset, rois: _deform_roi_pool(features, rois, offset, *sizes),
        grad,
        (features, offset),
        rois,
    )
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[1])

"""mmcv's operators once more, slow and plain: one loop per sample, gradients by autograd.

Shapes and conventions are those of mmcv's Python functions. All tensors are float64 on the CPU.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from repnext_mm.operators import ext


def use_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators in all files of mmcv.ops, also where mmcv has compiled ones."""
    importlib.import_module('mmcv.ops')
    patched = [
        monkeypatch.setattr(module, 'ext_module', ext)
        for name, module in list(sys.modules.items())
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module')
    ]
    assert len(patched) > 10


def hat(position: Tensor, length: int) -> Tensor:
    """Weights of bilinear interpolation along one axis: 1 at the position, 0 from 1 pixel away."""
    return (1 - (torch.arange(length) - position).abs()).clamp(min=0)


def sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Value `(C,)` of an image `(C, H, W)` between its pixels, with zeros around it."""
    height, width = image.shape[1:]
    return torch.einsum('chw,h,w->c', image, hat(y, height), hat(x, width))


def sample_to_border(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """As `sample`, with the border continued for 1 pixel and zeros from there on."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    return sample(image, y.clamp(0, height - 1), x.clamp(0, width - 1))


def _bins(roi, size, scale, sampling_ratio, aligned, shift=None):
    """For every bin its place (row, column) and its sampled points."""
    _, x1, y1, x2, y2 = roi
    border = 0.5 if aligned else 0.0
    x, y = x1 * scale - border, y1 * scale - border
    width, height = (x2 - x1) * scale, (y2 - y1) * scale
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    bin_h, bin_w = height / size[0], width / size[1]
    ny = sampling_ratio or math.ceil(bin_h)
    nx = sampling_ratio or math.ceil(bin_w)
    for row, column in itertools.product(range(size[0]), range(size[1])):
        dx, dy = (0, 0) if shift is None else shift[:, row, column] * torch.stack([width, height])
        yield (
            (row, column),
            [
                (
                    y + dy + bin_h * (row + (i + 0.5) / ny),
                    x + dx + bin_w * (column + (j + 0.5) / nx),
                )
                for i in range(ny)
                for j in range(nx)
            ],
        )


def _pool_rois(input, rois, size, reduce, *args, shifts=None):
    output = torch.zeros(len(rois), input.shape[1], *size)
    for index, roi in enumerate(rois):
        shift = None if shifts is None else shifts[index]
        for (row, column), points in _bins(roi, size, *args, shift=shift):
            values = [sample_to_border(input[int(roi[0])], y, x) for y, x in points]
            if values:
                output[index, :, row, column] = reduce(torch.stack(values))
    return output


def roi_align(input, rois, size, scale, sampling_ratio, pool_mode, aligned):
    reduce = (lambda v: v.mean(0)) if pool_mode == 'avg' else (lambda v: v.max(0).values)
    return _pool_rois(input, rois, size, reduce, scale, sampling_ratio, aligned)


def deform_roi_pool(input, rois, offset, size, scale, sampling_ratio, gamma):
    shifts = None if offset is None else gamma * offset
    mean = lambda v: v.mean(0)  # noqa: E731
    return _pool_rois(input, rois, size, mean, scale, sampling_ratio, True, shifts=shifts)


def roi_pool(input, rois, size, scale):
    output = torch.zeros(len(rois), input.shape[1], *size)
    height, width = input.shape[2:]
    for index, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x, y = x1 * scale, y1 * scale
        w, h = (x2 + 1) * scale - x, (y2 + 1) * scale - y
        if w <= 0 or h <= 0:
            continue
        for row, column in itertools.product(range(size[0]), range(size[1])):
            top = max(math.floor(row * (h / size[0]) + y), 0)
            bottom = min(math.ceil((row + 1) * (h / size[0]) + y), height)
            left = max(math.floor(column * (w / size[1]) + x), 0)
            right = min(math.ceil((column + 1) * (w / size[1]) + x), width)
            if bottom > top and right > left:
                pixels = input[int(image), :, top:bottom, left:right].flatten(1)
                output[index, :, row, column] = pixels.max(1).values
    return output


def modulated_deform_conv2d(
    input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
):
    batch, channels, _, _ = input.shape
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    output = torch.zeros(batch, out_channels, out_h, out_w)
    offset = offset.view(batch, deform_groups, kernel_h, kernel_w, 2, out_h, out_w)
    mask = mask.view(batch, deform_groups, kernel_h, kernel_w, out_h, out_w)
    for n, row, column in itertools.product(range(batch), range(out_h), range(out_w)):
        patch = torch.zeros(channels, kernel_h, kernel_w)
        for g, i, j in itertools.product(range(deform_groups), range(kernel_h), range(kernel_w)):
            dy, dx = offset[n, g, i, j, :, row, column]
            y = row * stride[0] - padding[0] + i * dilation[0] + dy
            x = column * stride[1] - padding[1] + j * dilation[1] + dx
            part = slice(g * channels // deform_groups, (g + 1) * channels // deform_groups)
            patch[part, i, j] = sample(input[n, part], y, x) * mask[n, g, i, j, row, column]
        grouped = patch.view(groups, per_group, kernel_h, kernel_w)
        kernels = weight.view(groups, -1, per_group, kernel_h, kernel_w)
        output[n, :, row, column] = torch.einsum('gcij,gocij->go', grouped, kernels).flatten()
    return output if bias is None else output + bias[:, None, None]


def deform_conv2d(input, offset, weight, *args):
    mask = torch.ones(len(input), offset.shape[1] // 2, *offset.shape[2:])
    return modulated_deform_conv2d(input, offset, mask, weight, None, *args)


def sigmoid_focal_loss(input, target, gamma, alpha, weight, reduction):
    loss = torch.zeros(input.shape)
    for n, c in itertools.product(*map(range, input.shape)):
        p = input[n, c].sigmoid()
        if target[n] == c:
            loss[n, c] = -alpha * (1 - p) ** gamma * p.log()
        else:
            loss[n, c] = -(1 - alpha) * p**gamma * (1 - p).log()
        if weight is not None and target[n] < input.shape[1]:
            loss[n, c] = loss[n, c] * weight[target[n]]
    return _reduce(loss, reduction)


def softmax_focal_loss(input, target, gamma, alpha, weight, reduction):
    loss = torch.zeros(len(input))
    for n, label in enumerate(target.tolist()):
        if label >= 0:
            p = input[n].softmax(0)[label]
            loss[n] = -alpha * (1 - p) ** gamma * p.log()
            if weight is not None:
                loss[n] = loss[n] * weight[label]
    return _reduce(loss, reduction)


def _reduce(loss, reduction):
    total = loss.sum()
    return {'none': loss, 'sum': total, 'mean': total / len(loss)}[reduction]


def carafe(features, masks, kernel_size, group_size, scale_factor):
    batch, channels, height, width = features.shape
    output = torch.zeros(batch, channels, height * scale_factor, width * scale_factor)
    half = kernel_size // 2
    for n, c, y, x in itertools.product(*map(range, output.shape)):
        group = c // (channels // group_size)
        for i, j in itertools.product(range(kernel_size), repeat=2):
            row, column = y // scale_factor + i - half, x // scale_factor + j - half
            if 0 <= row < height and 0 <= column < width:
                weight = masks[n, (group * kernel_size + i) * kernel_size + j, y, x]
                output[n, c, y, x] = output[n, c, y, x] + features[n, c, row, column] * weight
    return output


def ms_deform_attn(value, shapes, starts, locations, weights):
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[3])
    for n, q, h, level, p in itertools.product(
        *map(range, (batch, queries, heads, levels, points))
    ):
        height, width = shapes[level].tolist()
        start = int(starts[level])
        image = value[n, start : start + height * width, h].T.view(-1, height, width)
        x, y = locations[n, q, h, level, p] * torch.tensor([width, height]) - 0.5
        output[n, q, h] = output[n, q, h] + weights[n, q, h, level, p] * sample(image, y, x)
    return output.flatten(2)


def psa_mask(input, psa_type, mask_size):
    batch, _, height, width = input.shape
    windows = input.view(batch, *mask_size, height, width)
    # (N, row and column of the window's pixel, row and column of its owner)
    pairs = torch.zeros(batch, height, width, height, width)
    for i, j, y, x in itertools.product(*map(range, windows.shape[1:])):
        row, column = y + i - (mask_size[0] - 1) // 2, x + j - (mask_size[1] - 1) // 2
        if 0 <= row < height and 0 <= column < width:
            pairs[:, row, column, y, x] = windows[:, i, j, y, x]
    if psa_type == 1:
        pairs = pairs.permute(0, 3, 4, 1, 2)
    return pairs.reshape(batch, height * width, height, width)


def iou(a, b, offset=0, mode='iou'):
    """IoU of two boxes that are lists of 4 numbers."""
    area = lambda box: (box[2] - box[0] + offset) * (box[3] - box[1] + offset)  # noqa: E731
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = max(width, 0) * max(height, 0)
    return shared / (area(a) if mode == 'iof' else area(a) + area(b) - shared)


def by_score(scores):
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def nms(boxes, scores, threshold, offset):
    kept: list[int] = []
    for i in by_score(scores):
        if all(iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def nms_match(boxes, scores, threshold):
    groups: list[list[int]] = []
    for i in by_score(scores):
        for group in groups:
            if iou(boxes[i], boxes[group[0]]) >= threshold:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Indices and new scores of the boxes that remain; scores are distinct."""
    rest = dict(enumerate(scores))
    kept = []
    while rest:
        best = max(rest, key=rest.__getitem__)
        kept.append((best, rest.pop(best)))
        for i in list(rest):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                rest[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                rest[i] *= 1 - overlap if method == 'linear' else 0
            if rest[i] < min_score:
                del rest[i]
    return kept

"""The one door to speed: functions that compute what plain PyTorch does, but faster.

Each has a plain reference that tests compare it with: its own layers one by one, or an operation
of torch. Here alone are the rules per device and instruction set, and the autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..network import Plan
from ..reparam import Fusible, Note, kernels
from ..reparam.folding import Affine, folded, norm_affine
from .execution import (
    FastLayer,
    are_hooked,
    at_least_float32,
    is_channels_last,
    is_hooked,
    runs_eagerly,
)
from .recompute import Recomputed, kept_as_recipes

# --- layers one after the other, with norms folded into the convolutions beside them


class Chain(nn.Sequential, Fusible, FastLayer):
    """`nn.Sequential`, computed the fast way; fused, it is a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return chain(self, x, *self)

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        return nn.Sequential(*self).train(self.training)


class NormFolding(nn.Module):
    """A layer of convolutions that can fold the norm after it into them."""

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output."""
        raise NotImplementedError(f'{type(self).__name__} must define forward().')

    def fold_norm_backward(self, norm: _BatchNorm) -> nn.Module:
        """The layer that computes `norm(self(x))`; it may reuse this one's parts."""
        raise NotImplementedError(f'{type(self).__name__} must define fold_norm_backward().')


def chain(owner: FastLayer, x: Tensor, *layers: nn.Module) -> Tensor:
    """`x` through `layers`, one after the other; `owner` decides how to compute.

    A norm scales and shifts each channel. Doing that to a small kernel instead of a large feature
    map is exact up to rounding, and differentiable: gradients reach the kernel and the norm's
    parameters as if both had run. So a norm with frozen statistics is folded into the convolution
    before it, and a norm in front of a convolution, also in training, into that one. The reference
    is the layers as they are. A layer with a hook is called as it is, too.
    """
    if not owner.is_fast():
        for layer in layers:
            x = layer(x)
        return x
    steps: list[Any] = _flattened(layers, [])
    kinds = [*map(_kind, steps), '']
    recomputes = owner.recomputes()
    before: Affine | None = None  # still to be applied to `x`
    recipe: Recomputed | None = None  # how to compute `x` again, where that is cheap
    i = 0
    while i < len(steps):
        step, kind, following = steps[i], kinds[i], kinds[i + 1]
        i += 1
        after: Affine | None = None
        if following == 'frozen norm' and kind in ('conv', 'folds a norm'):
            after, i = frozen_affine(steps[i]), i + 1
        if following == 'conv' and kind in ('norm', 'frozen norm') and _folds_forward(steps[i]):
            x, before = separate(step, x)
            recipe = recipe if before is not None else None
        elif kind == 'conv':
            out = _call(convolve, x, step, before, after, recipe=recipe)
            cheap = recomputes and following == 'conv' and step.groups > 1
            recipe = Recomputed(out, _same_conv(step, out.dtype), x) if cheap else None
            x, before = out, None
        elif after is not None:
            x, recipe = scaled(step, x, after), None
        else:
            out = _call(step, x, recipe=recipe)
            x, recipe = out, _recipe(step, x, out, recipe) if recomputes else None
    return x


def _flattened(layers: Iterable[nn.Module], steps: list[nn.Module]) -> list[nn.Module]:
    """The layers of nested chains, added to `steps`, without those that do nothing.

    A chain with a hook is one step, so that it is called.
    """
    for layer in layers:
        if (isinstance(layer, Chain) or type(layer) is nn.Sequential) and not is_hooked(layer):
            _flattened(layer._modules.values(), steps)
        elif type(layer) is not nn.Identity or is_hooked(layer):
            steps.append(layer)
    return steps


def _kind(step: nn.Module) -> str:
    """What `chain` may do with a step; a step with a hook is only called."""
    if is_hooked(step):
        return 'other'
    if isinstance(step, _BatchNorm):
        return 'norm' if step.training else 'frozen norm'
    # A convolution that computes as torch's does.
    if isinstance(step, nn.Conv2d) and type(step).forward is nn.Conv2d.forward:
        return 'conv'
    if isinstance(step, NormFolding) and not are_hooked(step._modules.values()):
        return 'folds a norm'
    return 'other'


def _folds_forward(conv: nn.Conv2d) -> bool:
    """Whether a norm before `conv` folds into it: zeros that pad would come after the norm."""
    return conv.groups == 1 and not any(conv.padding)


def _call(function: Callable[..., Tensor], *arguments: Any, recipe: Recomputed | None) -> Tensor:
    """`function(*arguments)`; where it would keep the first of them, autograd keeps `recipe`."""
    if recipe is None:
        return function(*arguments)
    with kept_as_recipes(recipe):
        return function(*arguments)


def separate(norm: _BatchNorm, x: Tensor) -> tuple[Tensor, Affine | None]:
    """Split `norm(x)` into a feature map and the affine still to be applied to it.

    Where the affine cannot be separated, the feature map is `norm(x)` and the affine is None.
    """
    if not norm.training:
        return x, frozen_affine(norm)
    if _folds_batch_statistics(norm, x):
        return x, _batch_affine(norm, x)
    return norm(x), None


def convolve(
    x: Tensor, conv: nn.Conv2d, before: Affine | None = None, after: Affine | None = None
) -> Tensor:
    """`after(conv(before(x)))` as one convolution; `before` only for a 1x1 or unpadded `conv`."""
    if before is None and after is None:
        return conv(x)
    weight, bias = folded(conv, before, after, at_least_float32(conv.weight.dtype))
    return conv._conv_forward(x, weight.to(x.dtype), bias.to(x.dtype))


def scaled(layer: nn.Module, x: Tensor, after: Affine | None) -> Tensor:
    """`after(layer(x))`, for a convolution or a layer whose `forward` has `after`."""
    return convolve(x, layer, after=after) if isinstance(layer, nn.Conv2d) else layer(x, after)


def frozen_affine(norm: _BatchNorm) -> Affine:
    """What a norm with frozen statistics applies, in at least float32, as it computes itself."""
    return norm_affine(norm, at_least_float32(norm.weight.dtype))


def frozen_conv_norm(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in at least float32, of the convolution that is `norm(conv(x))`."""
    return folded(conv, after=frozen_affine(norm), dtype=at_least_float32(conv.weight.dtype))


def _recipe(
    step: nn.Module, x: Tensor, out: Tensor, source: Recomputed | None
) -> Recomputed | None:
    """How to compute `step(x)` again, if that is cheap; `source` if `x` is recomputed too."""
    if isinstance(step, nn.GELU):
        return Recomputed(out, step, source or x)
    if type(step) is nn.BatchNorm2d and step.training:
        return Recomputed(out, _same_norm(step), x)
    return None


def _same_norm(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What `norm` computes in training, without changing its running statistics."""
    return lambda x: F.batch_norm(
        x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
    )


def _same_conv(conv: nn.Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What `conv` computes in `dtype`: backward runs outside of the forward pass's autocast."""

    def function(x: Tensor) -> Tensor:
        bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        return conv._conv_forward(x.to(dtype), conv.weight.detach().to(dtype), bias)

    return function


def _folds_batch_statistics(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether to compute batch statistics without normalizing.

    Shown to be faster on CPUs. Synchronized statistics, cumulative averages and single values per
    channel, which torch refuses, are left to the module.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and x.device.type == 'cpu'
        and norm.momentum is not None
        and x.numel() > x.shape[1]
        and runs_eagerly()
    )


def _batch_affine(norm: _BatchNorm, x: Tensor) -> Affine:
    """The affine that `norm` applies in training; moves its running statistics."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, var = _BatchStatistics.apply(x, norm.running_mean, norm.running_var, norm.momentum)
    return kernels.norm_affine(mean, var, norm.weight, norm.bias, norm.eps)


class _BatchStatistics(torch.autograd.Function):
    """Mean and biased variance `(C,)` of a feature map, with a backward of one pass over it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
    ) -> tuple[Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        pixels = x.numel() // x.shape[1]
        slope = grad_var * (2 / pixels)
        offset = grad_mean / pixels - slope * mean
        slope, offset = (t.to(x.dtype).view(1, -1, 1, 1) for t in (slope, offset))
        return torch.addcmul(offset, x, slope), None, None, None


# --- single operations


def gelu(x: Tensor) -> Tensor:
    """`F.gelu(x)`. On a CPU only contiguous tensors reach torch's fast kernel, so a channels_last
    feature map goes through its contiguous (N, H, W, C) view.
    """
    # Layout is asked for last: of symbolic sizes the answer would become a condition.
    if runs_eagerly() and x.device.type == 'cpu' and is_channels_last(x):
        return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.gelu(x)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """`x.split(sizes, dim=1)`, of which all but the first are made dense in channels_last.

    A part has gaps there; each convolution would close them, in forward and in backward.
    """
    first, *others = x.split([*sizes], dim=1)
    if runs_eagerly() and is_channels_last(x):
        others = [c.contiguous(memory_format=torch.channels_last) for c in others]
    return [first, *others]


def join(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat(parts, dim=1)`, whose gradient comes in dense parts in channels_last.

    A part of it has gaps there, which each convolution would close for its input, its weight and
    its bias anew.
    """
    if runs_eagerly() and is_channels_last(parts[-1]) and torch.is_grad_enabled():
        return _Join.apply(*parts)
    return torch.cat([*parts], dim=1)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(_in_channels_last, grad.split(ctx.sizes, dim=1)))


def leave(x: Tensor, contiguous: bool) -> Tensor:
    """`x` as the network hands it out, contiguous if asked for, with a gradient in its own layout.

    A neck or a mean hands back a contiguous gradient for a channels_last feature map. Left so, it
    runs through every block of the stage beside gradients in channels_last, and each norm and each
    sum computes with two layouts, several times slower.
    """
    if not (x.requires_grad and runs_eagerly() and is_channels_last(x)):
        return x.contiguous() if contiguous else x
    if contiguous:
        return _Contiguous.apply(x)
    # Not a function that returns a view: what follows may change the feature map in place.
    x.register_hook(_in_channels_last)
    return x


def follow(x: Tensor, other: Tensor) -> Tensor:
    """`x`, in channels_last and without gaps where `other` is in that layout."""
    return _in_channels_last(x) if runs_eagerly() and is_channels_last(other) else x


def _in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _in_channels_last(grad)


def upsample(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`F.interpolate` of `x` `(N, C, H, W)` to `size`; bilinear has half-pixel centers.

    torch's bilinear kernels are slow for contiguous feature maps: on a CPU they run pixel by
    pixel, on a GPU they are parallel over the pixels alone. To twice the size, blends of neighbors
    do the same faster. The kernels for channels_last are fast (docs/benchmarks/upsampling-cpu.md).
    """
    if mode == 'bilinear' and _blends(x, size):
        return _Double.apply(x)
    return F.interpolate(x, size=tuple(size), mode=mode)


def _blends(x: Tensor, size: Sequence[int]) -> bool:
    """Whether blending is right, and faster."""
    return (
        runs_eagerly()
        and [*size] == [2 * side for side in x.shape[2:]]
        and x.is_contiguous()
        and x.device.type in ('cpu', 'cuda')
    )


class _Double(torch.autograd.Function):
    """Bilinear upsampling to twice the size, one direction after the other.

    Each pixel becomes two, a quarter of its width to either side of its centre: three quarters of
    it and one quarter of the neighbour on that side, or all of it where there is none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _spread(_spread(x, 3), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Along the rows first: there the memory is contiguous, and only half of it is left then.
        return _gather(_gather(grad.contiguous(), 2), 3)


def _spread(x: Tensor, dim: int) -> Tensor:
    """Double the size along `dim`."""
    last = x.shape[dim] - 1
    pairs = torch.stack((x, x), dim + 1)
    before, after = pairs.unbind(dim + 1)
    before.narrow(dim, 1, last).lerp_(x.narrow(dim, 0, last), 0.25)
    after.narrow(dim, 0, last).lerp_(x.narrow(dim, 1, last), 0.25)
    return pairs.flatten(dim, dim + 1)


def _gather(grad: Tensor, dim: int) -> Tensor:
    """The transpose of `_spread`."""
    last = grad.shape[dim] // 2 - 1
    before, after = grad.unflatten(dim, (-1, 2)).unbind(dim + 1)
    total = (before + after).mul_(0.75)
    total.narrow(dim, 1, last).add_(after.narrow(dim, 0, last), alpha=0.25)
    total.narrow(dim, 0, last).add_(before.narrow(dim, 1, last), alpha=0.25)
    # The neighbour that the first and the last pixel lack is the pixel itself.
    total.select(dim, 0).add_(before.select(dim, 0), alpha=0.25)
    total.select(dim, last).add_(after.select(dim, last), alpha=0.25)
    return total


# --- depthwise convolution with a weight gradient that stays fast for wide kernels

#: Width of the kernels for which oneDNN's depthwise weight gradient is fast on AVX2.
FAST_WIDTH = 3
#: Number of values in a feature map from which splitting the gradient pays (docs/benchmarks).
WORTHWHILE = 2**17


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
) -> Tensor:
    """`F.conv2d` of `x` `(N, C, H, W)` with a depthwise `weight` `(C, 1, kh, kw)`."""
    if _splits(x, weight, stride):
        return _SplitGradient.apply(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))


@cache
def _lacks_wide_gradient() -> bool:
    """Whether this CPU's oneDNN runs wide depthwise weight gradients as padded full groups."""
    return torch.backends.cpu.get_cpu_capability() == 'AVX2'


def _splits(x: Tensor, weight: Tensor, stride: int) -> bool:
    height, width = weight.shape[2:]
    return (
        # Asked first: where sizes are symbols each further answer would be a condition on them.
        runs_eagerly()
        and stride == 1
        and x.numel() >= WORTHWHILE
        and height > FAST_WIDTH
        and width > FAST_WIDTH
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled('cpu')
        and is_channels_last(x)
        and _lacks_wide_gradient()
    )


class _SplitGradient(torch.autograd.Function):
    """Stride 1, channels_last; the weight's gradient is computed by groups of its columns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, 1, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolution_backward(grad, x, weight, ctx.padding, (True, False, False))[0]
        grad_weight = split_weight_gradient(x, grad, weight, ctx.padding)
        grad_bias = None
        if ctx.has_bias:
            channels = grad.shape[1]
            grad_bias = grad.permute(0, 2, 3, 1).reshape(-1, channels).sum(0)
        return grad_x, grad_weight, grad_bias, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], mask: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    options = (None, (1, 1), padding, (1, 1), False, (0, 0), len(weight), mask)
    return torch.ops.aten.convolution_backward(grad, x, weight, *options)


def split_weight_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, padding: tuple[int, int]
) -> Tensor:
    """Gradient `(C, 1, kh, kw)` of a depthwise convolution, `FAST_WIDTH` columns at a time.

    Column j of the kernel meets the input shifted by j. In a feature map padded on both sides that
    is the same memory read j pixels later: what wraps into the next row meets a zero of `grad`,
    padded to the same width.
    """
    n, channels, height, width = x.shape
    kernel_width, pad = weight.shape[3], padding[1]
    padded = width + 2 * pad
    # One more row, so that the last shift stays inside.
    rows = x.new_empty(n * height + 1, padded, channels)
    rows[:, :pad], rows[:, pad + width :], rows[-1] = 0, 0, 0
    rows[:-1].unflatten(0, (n, height))[:, :, pad : pad + width] = x.permute(0, 2, 3, 1)
    spread = x.new_empty(n, height, padded - FAST_WIDTH + 1, channels)
    spread[:, :, width:] = 0
    spread[:, :, :width] = grad.permute(0, 2, 3, 1)
    spread = spread.permute(0, 3, 1, 2)
    strides = (height * padded * channels, 1, padded * channels, channels)
    columns: list[Tensor] = []
    while (done := FAST_WIDTH * len(columns)) < kernel_width:
        # The last group ends with the kernel, and overlaps the one before it.
        start = min(done, kernel_width - FAST_WIDTH)
        shifted = rows.as_strided((n, channels, height, padded), strides, start * channels)
        part = weight[..., start : start + FAST_WIDTH]
        mask = (False, True, False)
        gradient = _convolution_backward(spread, shifted, part, (padding[0], 0), mask)[1]
        columns.append(gradient[..., done - start :])
    return torch.cat(columns, dim=3)

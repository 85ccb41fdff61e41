"""Linear attention over the pixels of a feature map, and its recursive form."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .conv_norm import ConvNorm
from .precision import run_in_float32
from .upsample import Upsample, UpsampleMode

Order = Literal['kv', 'qk']
EPS = 1e-6


def cheaper_order(pixels: int, key_width: int, value_width: int) -> Order:
    """Which of the two products to form first: 'kv' is linear in pixels, 'qk' quadratic."""
    if not isinstance(pixels, int):  # traced or exported: the size is open, so stay linear
        return 'kv'
    kv = 2 * pixels * key_width * value_width
    qk = pixels * pixels * (key_width + value_width)
    return 'kv' if kv <= qk else 'qk'


def linear_attention(q: Tensor, k: Tensor, v: Tensor, order: Order | None = None) -> Tensor:
    """Average the values of all pixels, weighted by the products of non-negative `q` and `k`.

    `q`, `k` `(N, heads, D, n)` and `v` `(N, heads, E, n)` over n pixels give `(N, heads, E, n)`.
    The product is associative, so both orders are one function; None takes the cheaper.
    RecNeXt, arXiv 2412.19628.
    """
    pixels = q.shape[-1]
    if order is None:
        order = cheaper_order(pixels, q.shape[-2], v.shape[-2])
    # (N, heads, 1, n): the mean weight that each pixel gives to all others.
    mean_weight = k.mean(-1, keepdim=True).transpose(-1, -2) @ q + EPS
    if order == 'kv':
        return ((v / pixels) @ k.transpose(-1, -2)) @ q / mean_weight
    return (v / pixels) @ (k.transpose(-1, -2) @ q / mean_weight)


class LinearAttention(nn.Module):
    """Linear attention with a 3x3 depthwise positional branch, `(N, C, H, W) -> (N, C, H, W)`.

    Queries and keys are as wide as the values (each from one half of the channels), or half as
    wide with `half_width` (both from all channels). They are made positive by `elu + 1`.
    """

    def __init__(
        self, channels: int, heads: int = 1, half_width: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        #: Set to fix the order of the products, for instance to trace both.
        self.order: Order | None = None
        width, groups = (channels, 1) if half_width else (2 * channels, 2)
        self.qk = ConvNorm(channels, width, groups=groups, bias=bias)
        self.pe = ConvNorm(channels, channels, 3, padding=1, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Sums over thousands of pixels overflow in float16, and `elu + 1` of a clearly negative
        # key rounds to 0.
        return run_in_float32(self.attend, x, self.qk(x)) + self.pe(x)

    def attend(self, x: Tensor, qk: Tensor) -> Tensor:
        """Attend over `x` `(N, C, H, W)` with the stacked raw queries and keys `qk`."""
        q, k = (F.elu(qk) + 1).flatten(2).unflatten(1, (2, self.heads, -1)).unbind(1)
        v = x.flatten(2).unflatten(1, (self.heads, -1))
        return linear_attention(q, k, v, self.order).flatten(1, 2).unflatten(-1, x.shape[2:])

    def extra_repr(self) -> str:
        return f'heads={self.heads}'


class RecursiveAttention(nn.Module):
    """Linear attention at half resolution, added to the input: `(N, C, H, W) -> (N, C, H, W)`.

    RecNeXt, arXiv 2412.19628, series A.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        kernel_size: int = 5,
        mode: UpsampleMode = 'nearest',
        bias: bool = False,
    ) -> None:
        super().__init__()
        conv = partial(
            ConvNorm,
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=bias,
        )
        self.upsample = Upsample(mode)
        self.down = nn.Sequential(conv(stride=2), LinearAttention(channels, heads, bias=bias))
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.upsample(self.down(x), x.shape[2:]))

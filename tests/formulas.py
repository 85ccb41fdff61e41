"""The papers' formulas of cost and reach."""

from __future__ import annotations

from fractions import Fraction


def chunk_convolution_parameters(channels: int, medium: int = 7, large: int = 11) -> int:
    """Weights of a fused chunk convolution, without biases: `(9 + k^2 + 2 l) C / 4`.

    With l = 11 the large chunk's two strips have 22 (RepNeXt, arXiv 2406.16004, section 3.2).
    """
    return (9 + medium**2 + 2 * large) * channels // 4


def recursive_convolution_parameters(channels: int, kernel_size: int, level: int) -> int:
    """Weights of RecConv: `l + 2` times those of one depthwise convolution (arXiv 2412.19628)."""
    return (level + 2 if level else 1) * kernel_size**2 * channels


def recursive_convolution_cost(level: int) -> Fraction:
    """Products of RecConv relative to one depthwise convolution's: at most 5/3.

    The convolutions of level k see a quarter to the power k of the pixels, and one `down` each
    leads there.
    """
    quarters = [Fraction(1, 4**k) for k in range(level + 1)]
    return sum(quarters, Fraction(0)) + sum(quarters[1:], Fraction(0))


def effective_receptive_field(kernel_size: int, level: int) -> int:
    """Side of RecConv's receptive field: `k * 2^l` (arXiv 2412.19628, section 3)."""
    return kernel_size * 2**level

"""The kernel algebra: each function against the convolutions it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from repnext_mm.reparam import kernels

odd = st.sampled_from([1, 3, 5, 7])
sizes = st.integers(1, 14)
channels = st.integers(1, 4)
strides = st.sampled_from([1, 2])
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def depthwise(x, weight, bias=None, stride=1, dilation=1):
    padding = [dilation * (k - 1) // 2 for k in weight.shape[-2:]]
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])


@given(seeds, channels, odd, odd, st.integers(0, 3), st.integers(0, 3), sizes, sizes, strides)
def test_a_padded_kernel_computes_the_same(seed, c, kh, kw, dh, dw, h, w, stride):
    x, weight = normal(seed, 2, c, h, w), normal(seed + 1, c, 1, kh, kw)
    padded = kernels.pad_kernel(weight, (kh + 2 * dh, kw + 2 * dw))
    torch.testing.assert_close(
        depthwise(x, padded, stride=stride), depthwise(x, weight, stride=stride)
    )


@pytest.mark.parametrize('size', [(2, 3), (4, 4), (1, 3)])
def test_a_kernel_without_a_centred_place_is_refused(size):
    with pytest.raises(ValueError, match='centred place'):
        kernels.pad_kernel(torch.zeros(1, 1, 3, 3), size)


@given(seeds, channels, st.integers(1, 3), st.integers(2, 3), sizes, sizes, strides)
def test_a_dilated_kernel_becomes_dense(seed, c, k, dilation, h, w, stride):
    x, weight = normal(seed, 2, c, h + 6, w + 6), normal(seed + 1, c, 1, k, k)
    dense = kernels.dilate_kernel(weight, dilation)
    assert dense.shape[-1] == dilation * (k - 1) + 1
    torch.testing.assert_close(
        F.conv2d(x, dense, stride=stride, groups=c),
        F.conv2d(x, weight, stride=stride, dilation=dilation, groups=c),
    )


@given(seeds, channels, odd, odd, sizes, sizes, strides)
def test_strips_without_bias_are_one_kernel_at_every_size(seed, c, kh, kw, h, w, stride):
    x = normal(seed, 2, c, h, w)
    row, column = normal(seed + 1, c, 1, 1, kw), normal(seed + 2, c, 1, kh, 1)
    serial = depthwise(depthwise(x, row, stride=(1, stride)), column, stride=(stride, 1))
    merged = depthwise(x, kernels.compose_strips(row, column), stride=stride)
    torch.testing.assert_close(merged, serial)


@given(seeds, channels, st.sampled_from([3, 5, 7]))
def test_a_strip_bias_is_right_inside_and_wrong_on_the_border(seed, c, k):
    x = normal(seed, 1, c, 3 * k, 3 * k)
    row, column = normal(seed + 1, c, 1, 1, k), normal(seed + 2, c, 1, k, 1).abs() + 0.1
    b1, b2 = normal(seed + 3, c).abs() + 0.1, normal(seed + 4, c)
    serial = depthwise(depthwise(x, row, b1), column, b2)
    merged = depthwise(x, kernels.compose_strips(row, column), kernels.strip_bias(column, b1, b2))
    inner = slice(k // 2, -(k // 2))
    torch.testing.assert_close(merged[:, :, inner], serial[:, :, inner])
    difference = (merged - serial).abs()
    assert difference[:, :, 0].min() > 1e-3
    assert difference[:, :, -1].min() > 1e-3


@given(seeds, channels, odd, odd, sizes, sizes)
def test_the_identity_kernel_returns_its_input(seed, c, kh, kw, h, w):
    x = normal(seed, 2, c, h, w)
    torch.testing.assert_close(depthwise(x, kernels.identity_kernel(c, (kh, kw), x.dtype)), x)


def test_an_even_identity_kernel_is_refused():
    with pytest.raises(ValueError, match='odd'):
        kernels.identity_kernel(1, (2, 3))


def batch_norm(x, seed):
    """Scale and shift of a frozen norm, and its output on `x`."""
    c = x.shape[1]
    mean, var = normal(seed, c), normal(seed + 1, c).abs() + 0.1
    weight, bias = normal(seed + 2, c), normal(seed + 3, c)
    out = F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)
    return kernels.norm_affine(mean, var, weight, bias, 1e-5), out


@given(seeds, channels, channels, odd, sizes, sizes)
def test_a_norm_folds_backward(seed, cin, cout, k, h, w):
    x, weight = normal(seed, 2, cin, h, w), normal(seed + 1, cout, cin, k, k)
    bias = normal(seed + 2, cout)
    affine_pair, expected = batch_norm(F.conv2d(x, weight, bias, padding=k // 2), seed + 3)
    folded = kernels.fold_output(weight, bias, *affine_pair)
    torch.testing.assert_close(F.conv2d(x, *folded, padding=k // 2), expected)


@given(seeds, channels, channels, st.integers(1, 3), sizes, st.integers(1, 3))
def test_a_norm_folds_forward_into_an_unpadded_convolution(seed, cin, cout, k, h, stride):
    x, weight = normal(seed, 2, cin, h + 2, h + 3), normal(seed + 1, cout, cin, k, k)
    bias = normal(seed + 2, cout)
    affine_pair, normed = batch_norm(x, seed + 3)
    folded = kernels.fold_input(weight, bias, *affine_pair, padded=False)
    expected = F.conv2d(normed, weight, bias, stride)
    torch.testing.assert_close(F.conv2d(x, *folded, stride), expected)
    if k == 1:
        folded = kernels.fold_input(weight, bias, *affine_pair)
        torch.testing.assert_close(F.conv2d(x, *folded, stride), expected)


@pytest.mark.parametrize('shape', [(4, 4, 3, 3), (4, 1, 1, 1)], ids=['3x3', 'grouped'])
def test_a_forward_fold_that_would_be_wrong_is_refused(shape):
    with pytest.raises(ValueError, match='ungrouped 1x1'):
        kernels.fold_input(torch.zeros(shape), torch.zeros(4), torch.ones(4), torch.ones(4))


def test_interleave_alternates():
    first, second = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])
    assert kernels.interleave(first, second).tolist() == [1, 10, 2, 20, 3, 30]


def test_every_function_is_differentiable():
    shapes = [(2, 1, 1, 3), (2, 1, 3, 1), (2,), (2,)]
    row, column, b1, b2 = (normal(i, *s).requires_grad_() for i, s in enumerate(shapes))

    def merged(row, column, b1, b2):
        weight = kernels.pad_kernel(kernels.compose_strips(row, column), (5, 5))
        weight, bias = kernels.fold_output(weight, kernels.strip_bias(column, b1, b2), b1, b2)
        return weight, bias, kernels.interleave(weight, kernels.dilate_kernel(weight, 1))

    assert torch.autograd.gradcheck(merged, (row, column, b1, b2))

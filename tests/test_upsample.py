"""Upsampling to twice the size: equal to `F.interpolate` in values, gradients and exports."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import tiny

from repnext_mm.backbones.recconv import (
    RECURSIVE_CONVS,
    UPSAMPLE_MODES,
    SharedRecursiveConv,
    Upsample,
)
from repnext_mm.backbones.recnext import RecursiveAttention
from repnext_mm.layers import fast as door
from repnext_mm.layers.execution import set_execution

FORMATS = (torch.contiguous_format, torch.channels_last)


def both(mode: str, x: torch.Tensor, size: tuple[int, int], seed: int = 0):
    """Outputs and input gradients of the layer and of `F.interpolate`, for one random gradient."""
    x = x.requires_grad_()
    outs = [Upsample(mode)(x, size), F.interpolate(x, size, mode=mode)]
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(outs[1].shape, generator=generator, dtype=torch.float64).to(x.dtype)
    direction = direction.contiguous(
        memory_format=torch.channels_last
        if outs[1].is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    return outs, [torch.autograd.grad(out, x, direction)[0] for out in outs]


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    mode=st.sampled_from(UPSAMPLE_MODES),
    less=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_interpolation(dtype, tolerance, shape, mode, less, channels_last, seed):
    """To even sizes and to odd ones, from single rows, columns and pixels, in both layouts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x = x.contiguous(memory_format=FORMATS[channels_last])
    size = (2 * shape[2] - less[0], 2 * shape[3] - less[1])
    for actual, expected in both(mode, x, size, seed):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * 4)


def test_blends_are_the_transpose_of_their_gradient():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(door._Double.apply, x)
    # Gradients come as they come: expanded from a sum, or in the other layout.
    out = door._Double.apply(x)
    (summed,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.testing.assert_close(summed, torch.full_like(x, 4))
    direction = torch.randn(out.shape, dtype=torch.float64)
    other = direction.contiguous(memory_format=torch.channels_last)
    a, b = (torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (direction, other))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_rounds_no_more_than_twice(dtype):
    x = torch.randn(2, 4, 16, 16).to(dtype)
    expected = F.interpolate(x.double(), (32, 32), mode='bilinear')
    out = Upsample()(x, (32, 32))
    assert out.dtype == dtype
    limit = 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (out.double() - expected).abs().max() <= limit


@pytest.mark.parametrize(
    'fast, layout, size, interpolations',
    [
        (True, torch.contiguous_format, (16, 16), 0),
        (True, torch.contiguous_format, (15, 16), 1),
        (True, torch.channels_last, (16, 16), 1),
        (False, torch.contiguous_format, (16, 16), 1),
    ],
)
def test_only_contiguous_maps_are_blended_and_only_to_twice_the_size(
    fast, layout, size, interpolations
):
    layer = Upsample()
    set_execution(layer, fast=fast)
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=layout)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = layer(x, size)
    calls = [e.count for e in profile.key_averages() if e.key == 'aten::upsample_bilinear2d']
    assert sum(calls) == interpolations
    assert out.is_contiguous(memory_format=layout)
    assert layer(x).shape == (1, 4, 16, 16)


@pytest.mark.parametrize('name', ['recnext_m', 'recnext_a', 'recnext_l_share'])
def test_published_form_of_a_network_interpolates(name):
    model = tiny(name, fast=False)
    layers = [m for m in model.modules() if isinstance(m, Upsample)]
    assert layers
    assert not any(layer.fast for layer in layers)
    merged = tiny(name)
    assert all(m.fast for m in merged.modules() if isinstance(m, Upsample))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_recursion_blends_in_float32_under_autocast(dtype):
    mixer = SharedRecursiveConv(8, level=2)
    seen = []
    mixer.upsample.register_forward_hook(lambda _, args, out: seen.append(out))
    x = torch.randn(1, 8, 16, 16)
    with torch.autocast('cpu', dtype):
        mixer(x.to(dtype))
    assert [(out.dtype, out.is_contiguous()) for out in seen] == 2 * [(torch.float32, True)]


@pytest.mark.parametrize('build', [SharedRecursiveConv, RECURSIVE_CONVS['recurrent']])
@pytest.mark.parametrize('layout', FORMATS, ids=['contiguous', 'channels_last'])
def test_compiles_as_one_graph_with_gradients(build, layout):
    torch._dynamo.reset()
    mixer = build(4, level=2)
    x = torch.randn(1, 4, 8, 12).contiguous(memory_format=layout).requires_grad_()
    compiled = torch.compile(mixer, fullgraph=True, backend='aot_eager')
    outs = [mixer(x), compiled(x)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in outs))


@pytest.mark.parametrize('build', [SharedRecursiveConv, RecursiveAttention])
def test_exporters_see_an_interpolation(build):
    mixer = build(8).eval()
    x = torch.randn(1, 8, 8, 12)
    mode = mixer.upsample.mode
    traced = torch.jit.trace(mixer, x)
    assert f'aten::upsample_{mode}2d' in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), mixer(x))
    program = torch.export.export(mixer, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith(f'aten.upsample_{mode}2d') for target in targets)
    torch.testing.assert_close(program.module()(x), mixer(x))


def test_recursion_takes_its_kernels_gradients_the_fast_way(monkeypatch):
    """In channels_last, with maps that are large enough; equal to the published form's."""
    monkeypatch.setattr(door, '_lacks_wide_gradient', lambda: True)
    monkeypatch.setattr(door, 'WORTHWHILE', 0)
    mixer = SharedRecursiveConv(8, level=2, bias=True)
    x = torch.randn(2, 8, 16, 24).contiguous(memory_format=torch.channels_last)
    found = {}
    for fast in (False, True):
        set_execution(mixer, fast=fast)
        out = mixer(x)
        assert ('_SplitGradient' in str(out.grad_fn)) == fast
        found[fast] = torch.autograd.grad(out.square().sum(), [*mixer.parameters()])
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)

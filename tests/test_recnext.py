"""What is RecNeXt's own: attention, recursion and its variants, sharing, precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TINY, grads, image, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repnext_mm import RecNeXt
from repnext_mm.backbones.recconv import RECURSIVE_CONVS, SharedRecursiveConv
from repnext_mm.backbones.recnext import LinearAttention, cheaper_order, linear_attention
from repnext_mm.layers.execution import run_in_float32

CUSTOM = dict(channels=(16, 32, 64, 128), depths=(1, 1, 1, 1))
VARIANTS = pytest.mark.parametrize('variant', RECURSIVE_CONVS)
HALVED_EVENLY = ('grouped', 'split')


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- linear attention -------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 24),
    st.integers(1, 200),
)
def test_both_orders_of_attention_are_its_definition(seed, heads, d, e, pixels):
    q, k = (normal(seed + i, 2, heads, d, pixels).exp() for i in (0, 1))
    v = normal(seed + 2, 2, heads, e, pixels)
    weights = q.transpose(-1, -2) @ k
    weights = weights / (weights.mean(-1, keepdim=True) + 1e-6) / pixels
    expected = (weights @ v.transpose(-1, -2)).transpose(-1, -2)
    for order in ('kv', 'qk', None):
        torch.testing.assert_close(linear_attention(q, k, v, order), expected)


@pytest.mark.parametrize('pixels, cheaper', [(4, 'qk'), (16, 'qk'), (64, 'kv'), (4096, 'kv')])
def test_orders_agree_in_float32_where_each_wins(pixels, cheaper):
    assert cheaper_order(pixels, 32, 32) == cheaper
    attention = LinearAttention(64, heads=2).eval()
    x = torch.randn(1, 64, pixels // 4, 4)
    outs = {}
    for attention.order in ('kv', 'qk', None):
        outs[attention.order] = attention(x)
    scale = outs['kv'].std()
    assert (outs['kv'] - outs['qk']).abs().max() < 1e-5 * scale
    assert torch.equal(outs[None], outs[cheaper])


def flops(attention: LinearAttention, pixels: int, order: str | None) -> int:
    attention.order = order
    with FlopCounterMode(display=False) as counter:
        attention(torch.zeros(1, attention.pe.conv.in_channels, pixels // 4, 4))
    return counter.get_total_flops()


def test_the_chosen_order_costs_the_least():
    attention = LinearAttention(64, heads=2).eval()
    for pixels in (4, 16, 28, 32, 36, 64, 1024):
        costs = {order: flops(attention, pixels, order) for order in ('kv', 'qk')}
        assert flops(attention, pixels, None) == min(costs.values())


@pytest.mark.parametrize('arch', ['a0', 'a5', 't', 'b', 't_share_channel'])
def test_no_stage_is_quadratic_in_pixels_at_detection_size(arch):
    with torch.device('meta'):
        model = RecNeXt(arch, deploy=True).eval()
    attentions = [m for m in model.modules() if isinstance(m, LinearAttention)]
    assert attentions
    for attention in {a.pe.in_channels: a for a in attentions}.values():
        channels = attention.pe.in_channels
        stage = next(i for i, c in enumerate(model.channels) if channels in (c, c // 4))
        stride = model.strides[stage]
        pixels = math.ceil(800 / stride) * math.ceil(1333 / stride)
        width = attention.qk.out_channels // 2 // attention.heads
        # At full resolution in the last stages of series l, at half of it elsewhere.
        for n in (pixels, pixels // 4):
            assert cheaper_order(n, width, channels // attention.heads) == 'kv'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['recnext_a', 'recnext_l', 'recnext_l_share'])
def test_autocast_stays_finite_at_detection_size(name, dtype):
    model = tiny(name).eval()
    x = 3 * torch.randn(1, 3, 800, 1333)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', dtype):
            actual = model(x)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert (a.float() - e).std() < 0.1 * e.std()


@pytest.mark.parametrize('order', ['kv', 'qk'])
@pytest.mark.parametrize('shift, spread', [(0, 300), (-8, 0.5)], ids=['overflow', 'vanish'])
def test_attention_survives_what_float16_does_not(order, shift, spread):
    """Large keys overflow it in products; `elu + 1` of negative ones rounds to 0 or 2**-11."""
    attention = LinearAttention(8).eval()
    attention.order = order
    x, qk = torch.randn(1, 8, 20, 20).half(), (shift + spread * torch.randn(1, 16, 20, 20)).half()
    expected = attention.attend(x.double(), qk.double())
    narrow = attention.attend(x, qk).double()
    assert not (narrow - expected).abs().max() < 0.1 * expected.std()
    out = run_in_float32(attention.attend, x, qk)
    assert out.dtype == torch.float16
    assert (out.double() - expected).abs().max() < 2e-3 * expected.std()


# --- recursion --------------------------------------------------------------------------------


def reference(variant: str, m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Each variant from its definition, by recursion from the finest level."""

    def up(y, like):
        return F.interpolate(y, like.shape[2:], mode=m.mode)

    if variant == 'recursive':

        def descend(f, k):
            deeper = up(descend(m.down(f), k - 1), f) if k else 0
            return m.convs[k](f + deeper)

        return descend(x, m.level)
    if variant == 'recurrent':

        def descend(f, k):
            if k == 0:
                return m.b(f)
            deeper = up(descend(m.n(f), k - 1), f)
            return m.c(deeper) + m.d(f) if k == m.level else m.a(deeper) + m.b(f)

        return descend(x, m.level)
    if variant == 'grouped':

        def descend(f, k):
            # convs and ups are stored deepest first, downs finest first.
            deeper = m.ups[k - 1](descend(m.downs[m.level - k](f), k - 1)) if k else 0
            return m.convs[k](f + deeper)

        return descend(x, m.level)

    def descend(f, k):
        if k == 0:
            return m.convs[0](f)
        kept, handed = f.chunk(2, dim=1)
        deeper = m.ups[k - 1](descend(m.downs[m.level - k](handed), k - 1))
        return m.convs[k](torch.cat((kept, deeper), dim=1))

    return descend(x, m.level)


@VARIANTS
@pytest.mark.parametrize('mode', ['bilinear', 'nearest'])
@pytest.mark.parametrize('level', [1, 2, 3])
@pytest.mark.parametrize('kernel', [3, 5, 7])
def test_variants_compute_their_definition(variant, mode, level, kernel):
    mixer = RECURSIVE_CONVS[variant](16, kernel, level, mode, bias=True).double()
    size = (16, 24) if variant in HALVED_EVENLY else (13, 23)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    out = mixer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, reference(variant, mixer, x))


@VARIANTS
def test_variants_have_right_gradients(variant):
    mixer = RECURSIVE_CONVS[variant](4, 3, 2).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, x)
    mixer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


@VARIANTS
@pytest.mark.parametrize('options', [dict(kernel_size=3, mode='nearest'), dict(level=1, bias=True)])
def test_variants_are_chosen_by_a_custom_arch(variant, options):
    arch = CUSTOM | dict(series='m', token_mixer=dict(type=variant, **options))
    model = RecNeXt(arch)
    mixers = [b.token_mixer for s in model.stages for b in s.blocks]
    assert {type(m) for m in mixers} == {RECURSIVE_CONVS[variant]}
    assert [m.level for m in mixers] == [options.get('level', 4 - i) for i in range(4)]
    convs = [c for m in mixers for c in m.modules() if isinstance(c, nn.Conv2d)]
    assert {c.kernel_size[0] for c in convs} == {options.get('kernel_size', 5)}
    assert {c.bias is not None for c in convs} == {options.get('bias', False)}
    assert {m.mode for m in mixers} == {options.get('mode', 'bilinear')}
    gradients = grads(model, image(model))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize('size', [(75, 101), (72, 64)], ids=['75x101', '72x64'])
@VARIANTS
def test_sizes_that_do_not_halve_evenly_work_or_are_refused(variant, size):
    model = RecNeXt(CUSTOM | dict(series='m', token_mixer=dict(type=variant))).eval()
    if variant in HALVED_EVENLY:
        with pytest.raises(ValueError, match=r'level 4 cannot compute .*multiples of 16'):
            model(torch.zeros(1, 3, *size))
    else:
        out = model(torch.zeros(1, 3, *size))[0]
        assert out.shape[2:] == tuple(math.ceil(s / 4) for s in size)


def test_level_0_is_one_plain_convolution():
    arch = CUSTOM | dict(series='m', token_mixer=dict(level=0, kernel_size=7))
    mixer = RecNeXt(arch).stages[0].blocks[0].token_mixer
    assert [(n, tuple(p.shape)) for n, p in mixer.named_parameters()] == [
        ('convs.0.weight', (16, 1, 7, 7))
    ]
    x = torch.randn(1, 16, 9, 9)
    torch.testing.assert_close(mixer(x), mixer.convs[0](x))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected).square().mean().sqrt() / expected.std())


def outputs_per_level(mixer: nn.Module, run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each convolution returned, in order, then the mixer; with the gradient of `down`."""
    levels: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_hook(
            lambda _, __, out, name=name: levels.update({f'{name} {tuple(out.shape[2:])}': out})
        )
        for name, m in mixer.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    mixer.zero_grad()
    levels['output'] = run(x)
    (levels['output'].double() * torch.linspace(-1, 1, x.shape[-1])).mean().mul(1024).backward()
    levels['gradient of down'] = mixer.down.weight.grad / 1024
    levels['output'] = levels.pop('output')
    for hook in hooks:
        hook.remove()
    return levels


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_precision_per_level_of_the_recursion(dtype):
    """Prints the table of docs/numerics.md."""
    mixer = SharedRecursiveConv(64, level=4)
    x = torch.randn(2, 64, 64, 64).to(dtype)
    exact = outputs_per_level(mixer.double(), mixer.recur, x.double())
    mixer.float()
    errors = {}
    for name, run in dict(before=mixer.recur, after=mixer).items():
        with torch.autocast('cpu', dtype):
            levels = outputs_per_level(mixer, run, x)
        errors[name] = {k: relative_error(v, exact[k]) for k, v in levels.items()}
    print(f'\n{dtype}, relative RMS error:')
    for key, before in errors['before'].items():
        print(f'  {key:20} before {before:.1e}  after {errors["after"][key]:.1e}')
    rounding = torch.finfo(dtype).eps / 2
    inside = [k for k in exact if k.startswith(('down', 'convs'))]
    assert max(errors['before'][k] for k in inside) > rounding
    assert max(errors['after'][k] for k in inside) < 1e-6
    # What is left is the one rounding of the output, and of its gradient, to `dtype`.
    for key, gain in (('output', 1.5), ('gradient of down', 3)):
        assert errors['after'][key] < errors['before'][key] / gain
        assert errors['after'][key] < rounding


def test_recursion_that_overflows_float16_inside_stays_finite():
    mixer = SharedRecursiveConv(4, level=4)
    nn.init.constant_(mixer.down.weight, 1.0)  # each level is 25 times the one before
    for conv in mixer.convs:
        nn.init.constant_(conv.weight, 1e-3)
    x = torch.ones(1, 4, 64, 64)
    with torch.autocast('cpu', torch.float16):
        assert not mixer.recur(x).isfinite().all()
        out = mixer(x.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), mixer(x), rtol=1e-3, atol=1e-3)


# --- series -----------------------------------------------------------------------------------


def test_series_l_declares_the_strides_that_it_has():
    for arch in ('t', 'b_share_channel'):
        with torch.device('meta'):
            assert RecNeXt(arch, out_indices=(1, 3)).out_strides == (16, 64)
    assert RecNeXt('m0', out_indices=(1, 3)).out_strides == (8, 32)


def test_merged_rep_mixer_runs_one_convolution_with_frozen_statistics():
    counts = {}
    for fast in (True, False):
        mixer = tiny('recnext_l', fast=fast, norm_eval=True).stages[1].blocks[0].rep_mixer
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            mixer(torch.zeros(1, 16, 8, 8))
        counts[fast] = next(e.count for e in profile.key_averages() if e.key == 'aten::conv2d')
    assert counts == {True: 1, False: 2}


@pytest.mark.parametrize('frozen', ['lk', 'sk'])
def test_rep_mixer_with_one_frozen_norm_keeps_the_batch_statistics_of_the_other(frozen):
    reference, fast = (
        tiny('recnext_l', fast=fast).stages[1].blocks[0].rep_mixer for fast in (False, True)
    )
    x = torch.randn(2, 16, 8, 8)
    for mixer in (reference, fast):
        getattr(mixer, frozen).norm.eval()
    torch.testing.assert_close(fast(x), reference(x))


def test_shared_blocks_add_the_attended_channels_of_the_four_before():
    model = tiny('recnext_l_share').eval()
    stage = model.stages[3]
    assert [hasattr(b.token_mixer, 'attn') for b in stage.blocks] == [True] * 4 + [False, True]
    attended = []
    for block in stage.blocks:
        if hasattr(block.token_mixer, 'attn'):
            block.token_mixer.attn.register_forward_hook(lambda _, __, out: attended.append(out))
    inputs = []
    shared = stage.blocks[4]
    shared.channel_mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    shared.rep_mixer.register_forward_hook(lambda _, __, out: inputs.append(out))
    first = model(image(model))
    torch.testing.assert_close(inputs[1], inputs[0] + torch.cat(attended[:4], dim=1))
    # Nothing is kept from one image to the next.
    model(image(model))
    assert len(attended) == 10
    torch.testing.assert_close(first[3].shape, model(image(model))[3].shape)


def drop_rates(model: RecNeXt) -> dict[str, float]:
    return {
        name: getattr(m, 'drop_prob', 0.0)
        for name, m in model.named_modules()
        if name.endswith('drop_path')
    }


@pytest.mark.parametrize('arch, given', [('m4', 0.2), ('a5', 0.3)])
def test_drop_path_is_constant_in_series_m_and_a(arch, given):
    with torch.device('meta'):
        rates, default = (drop_rates(RecNeXt(arch, drop_path_rate=r)) for r in (given, None))
    assert {r for n, r in rates.items() if 'blocks' in n} == {given}
    assert {r for n, r in rates.items() if 'downsample' in n} == {0.0}
    assert set(default.values()) == {0.0}


def test_drop_path_rises_linearly_in_series_l():
    with torch.device('meta'):
        rates, default = (drop_rates(RecNeXt('b', drop_path_rate=r)) for r in (0.2, None))
    blocks = [r for n, r in rates.items() if 'blocks' in n]
    assert blocks == pytest.approx(torch.linspace(0, 0.2, 2 + 8 + 8 + 12).tolist())
    for i, first in ((1, 2), (2, 10), (3, 18)):
        assert rates[f'stages.{i}.downsample.drop_path'] == blocks[first]
    assert set(default.values()) == {0.0}


def test_mlp_ratios_may_differ_between_stages():
    arch = TINY['recnext_m'][1] | dict(mlp_ratio=(1, 2, 3, 1.5))
    hidden = [s.blocks[0].channel_mixer[0].conv.out_channels for s in RecNeXt(arch).stages]
    assert hidden == [8, 32, 96, 96]


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(series='x'), ["series='x'", 'm, a, l']),
        (dict(series='l', token_mixer=dict(level=1)), ['level', 'share_channel']),
        (dict(series='a', token_mixer=dict(share_channel=True)), ['share_channel', 'heads']),
        (dict(token_mixer=dict(type='unet')), ['unet', 'recursive, recurrent, grouped, split']),
        (dict(token_mixer=dict(mode='cubic')), ['cubic', 'nearest, bilinear']),
        (dict(token_mixer=dict(level=(4, 3))), ['level', '4, one per stage']),
        (dict(token_mixer=dict(kernel_size=4)), ['kernel_size=4', 'odd']),
        (dict(token_mixer=dict(type='recurrent', level=0)), ['level=0', '1 or more']),
        (dict(token_mixer=dict(type='split', level=5)), ['32', '16 channels']),
        (dict(mlp_ratio=(2, 2)), ['mlp_ratio', '4, one per stage']),
        (dict(series='a', channels=(9, 18, 36, 72)), ['9', 'multiple of 2']),
        (dict(series='l', channels=(8, 12, 32, 64)), ['12', 'multiple of 8']),
    ],
)
def test_wrong_custom_archs_say_what_is_allowed(change, words):
    with pytest.raises(ValueError, match=r'must be|one of|has no key|too low|cannot') as caught:
        RecNeXt(CUSTOM | dict(series='m') | change)
    assert all(word in str(caught.value) for word in words), caught.value

"""RepNeXt and the pyramid contract: forms, freezing, norms, precision, registration."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import REPO, randomise
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm import RepNeXt

TINY = dict(channels=(8, 16, 32, 64), depths=(1, 1, 2, 1))
TINY_E = TINY | dict(single_branch=True)


def tiny(arch=TINY, **kwargs) -> RepNeXt:
    return randomise(RepNeXt(arch, **kwargs))


def grads(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum((o.flatten() * torch.linspace(-1, 1, o.numel()).to(o)).sum() for o in model(x)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(64, 64), (75, 101), (33, 40)])
def test_merged_equals_branches_in_outputs_and_every_gradient(size, train):
    merged = tiny().double().train(train)
    branches = RepNeXt(TINY, train_form='branches').double().train(train)
    branches.load_state_dict(merged.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for a, b in zip(merged(x), branches(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    ga, gb = grads(merged, x), grads(branches, x)
    assert ga.keys() == gb.keys() == dict(merged.named_parameters()).keys()
    for name in ga:
        torch.testing.assert_close(ga[name], gb[name], rtol=1e-10, atol=1e-10, msg=name)


def test_merged_form_runs_one_convolution_per_mixer():
    counts = {}
    for form in ('merged', 'branches'):
        model = RepNeXt(TINY, train_form=form).eval()
        calls = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with torch.no_grad(), calls as profile:
            model(torch.zeros(1, 3, 64, 64))
        counts[form] = next(e.count for e in profile.key_averages() if e.key == 'aten::conv2d')
    # 5 blocks and 3 downsamples with 2 branched mixers each: 4 + 7 kernels and 4 + 7 again.
    assert counts['branches'] - counts['merged'] == (5 + 3) * (11 - 2)


@pytest.mark.parametrize(
    'size',
    [(64, 64), (75, 101), (31, 17), (8, 8), (1, 1), (224, 3)],
    ids=lambda s: f'{s[0]}x{s[1]}',
)
@pytest.mark.parametrize('arch', [TINY, TINY_E], ids=['m', 'e'])
def test_shapes_at_every_size_are_as_declared(arch, size):
    model = RepNeXt(arch).eval()
    outs = model(torch.zeros(1, 3, *size))
    for out, c, s in zip(outs, model.out_channels, model.out_strides, strict=True):
        assert tuple(out.shape) == (1, c, *(-(-side // s) for side in size))


def test_out_indices_choose_stages_and_skip_the_rest():
    full, some = RepNeXt(TINY).eval(), RepNeXt(TINY, out_indices=(1, 2)).eval()
    some.load_state_dict(full.state_dict())
    x = torch.randn(1, 3, 64, 64)
    some.stages[3].forward = None  # would raise if it were called
    for a, b in zip(some(x), full(x)[1:3], strict=True):
        torch.testing.assert_close(a, b)
    assert some.out_channels == (16, 32)
    assert some.out_strides == (8, 16)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3, 4])
def test_frozen_stages_neither_learn_nor_update_statistics(frozen):
    model = tiny(frozen_stages=frozen)
    assert model.train() is model
    before = copy.deepcopy(model.state_dict())
    if frozen < 4:
        grads(model, torch.randn(2, 3, 64, 64))
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    else:
        model(torch.randn(2, 3, 64, 64))
    frozen_prefixes = tuple(['stem.'] * (frozen >= 0) + [f'stages.{i}.' for i in range(frozen)])
    for key, value in model.state_dict().items():
        if key.startswith(frozen_prefixes):
            assert torch.equal(value, before[key]), key
        elif frozen < 4 and key.endswith(('running_mean', '.conv.weight')):
            assert not torch.equal(value, before[key]), key


def test_norm_eval_keeps_statistics_but_trains_affine():
    model = tiny(norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert not any(n.training for n in norms)
    before = [n.running_mean.clone() for n in norms]
    grads(model, torch.randn(2, 3, 64, 64))
    assert all(torch.equal(b, n.running_mean) for b, n in zip(before, norms, strict=True))
    assert all(n.weight.grad.abs().sum() > 0 for n in norms)
    assert model.training
    assert model.stages[0].blocks[0].token_mixer.training


def test_checkpointing_keeps_gradients_and_statistics():
    plain, saving = tiny().double(), RepNeXt(TINY, with_cp=True).double()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, actual = grads(plain, x), grads(saving, x)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[key], value, msg=key)


def test_checkpointing_saves_memory():
    saved = {}
    for with_cp in (False, True):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        model = RepNeXt(TINY, with_cp=with_cp)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(1, 3, 64, 64))
        saved[with_cp] = total
    assert saved[True] < 0.5 * saved[False]


def test_drop_path_drops_whole_samples_only_in_training():
    model = tiny(drop_path_rate=0.9)
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(model(x), model(x))
    block = model.stages[0].blocks[0].train()
    y = torch.randn(64, 8, 4, 4)
    kept = (block(y) != y).flatten(1).any(1)
    assert 0 < kept.sum() < 32


def test_sync_bn_is_reverted_to_the_same_function_on_cpu():
    plain, sync = tiny().eval(), RepNeXt(TINY, norm_cfg=dict(type='SyncBN')).eval()
    norms = [m for m in sync.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert len(norms) == 18 + 8
    sync.load_state_dict(plain.state_dict())
    reverted = revert_sync_batchnorm(sync)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(reverted(x), plain(x))
    torch.testing.assert_close(reverted.train()(x), plain.train()(x))


def test_norm_cfg_sets_what_it_names():
    cfg = dict(type='BN', eps=1e-3, momentum=0.01, requires_grad=False)
    norms = [m for m in RepNeXt(TINY, norm_cfg=cfg).modules() if isinstance(m, _BatchNorm)]
    assert {(n.eps, n.momentum, n.weight.requires_grad) for n in norms} == {(1e-3, 0.01, False)}


@pytest.mark.parametrize('form', ['merged', 'branches'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_stays_close_and_trains(dtype, tolerance, form):
    model = tiny(train_form=form).eval()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    with torch.autocast('cpu', dtype):
        autocast = model(x)
    converted = copy.deepcopy(model).to(dtype)(x.to(dtype))
    for reference, *others in zip(expected, autocast, converted, strict=True):
        for other in others:
            assert (other.float() - reference).std() < tolerance * reference.std()
    model.train()
    with torch.autocast('cpu', dtype):
        gradients = grads(model, x)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


def test_channels_last_is_kept_and_equal():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    for out, e in zip(model(x.to(memory_format=torch.channels_last)), expected, strict=True):
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, e, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.train()
    expected = grads(model, x)
    for name, g in grads(torch.compile(model, fullgraph=True, backend='aot_eager'), x).items():
        name = name.removeprefix('_orig_mod.')
        torch.testing.assert_close(g, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_deepcopy_is_independent():
    model = tiny().eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(twin(x), model(x))
    nn.init.zeros_(twin.stem.stem[0].conv.weight)
    assert not torch.equal(twin(x)[0], model(x)[0])


def test_every_parameter_learns():
    gradients = grads(tiny(), torch.randn(2, 3, 64, 64))
    assert gradients.keys() == dict(tiny().named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(arch='m9'), ValueError, ['m9', 'm0, m1']),
        (dict(arch='M4'), ValueError, ["Did you mean 'm4'"]),
        (dict(arch=4), TypeError, ['int']),
        (dict(arch=dict(channels=(8, 16, 32, 64))), ValueError, ['depths']),
        (dict(arch=TINY | dict(width=3)), ValueError, ['width', 'mlp_ratio']),
        (dict(arch=dict(channels=(8, 16), depths=(1, 1))), ValueError, ['4 whole numbers']),
        (dict(arch=dict(channels=(8, 12, 32, 64), depths=(1,) * 4)), ValueError, ['double']),
        (dict(out_indices=(0, 4)), ValueError, ['(0, 4)', '(0, 1, 2, 3)']),
        (dict(out_indices=(-1,)), ValueError, ['(-1,)']),
        (dict(out_indices=(2, 1)), ValueError, ['increasing']),
        (dict(out_indices=()), ValueError, ['one or more']),
        (dict(frozen_stages=5), ValueError, ['frozen_stages=5', '1 to 4']),
        (dict(norm_cfg=dict(type='GN')), ValueError, ['GN', 'SyncBN']),
        (dict(norm_cfg=dict(type='BN', groups=2)), ValueError, ['groups', 'eps']),
        (dict(norm_cfg='BN'), TypeError, ['norm_cfg', 'str']),
        (dict(train_form='fused'), ValueError, ['fused', 'merged, branches']),
        (dict(drop_path_rate=1.0), ValueError, ['drop_path_rate=1.0']),
        (dict(deploy='fast'), ValueError, ['fast', 'branches, exact, single']),
    ],
)
def test_wrong_arguments_say_what_is_allowed(kwargs, error, words):
    with pytest.raises(error) as caught:
        RepNeXt(**(dict(arch=TINY) | kwargs))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.compat
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize(
    'name, imports', [('RepNeXt', 'import repnext_mm'), ('repnext_mm.RepNeXt', 'pass')]
)
def test_builds_from_the_registries_of_mmdet_and_mmseg(scope, name, imports):
    """In a fresh process: whether the package is imported beforehand is the point."""
    code = f"""
{imports}
from {scope}.registry import MODELS
from {scope}.utils import register_all_modules
register_all_modules()
model = MODELS.build(dict(type={name!r}, arch='m0'))
assert type(model).__module__ == 'repnext_mm.backbones.repnext'
print(model.out_channels)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=REPO)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith('(40, 80, 160, 320)')

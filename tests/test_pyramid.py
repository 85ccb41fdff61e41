"""The contract of `PyramidBackbone`, kept by every family."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from networks import TINY, grads, image, tiny
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm import prove, reparameterize
from repnext_mm.layers.blocks import Stage
from repnext_mm.network import PLANS

NETWORKS = pytest.mark.parametrize('name', TINY)


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@NETWORKS
@pytest.mark.parametrize(
    'size',
    [(64, 64), (75, 101), (31, 17), (8, 8), (1, 1), (224, 3)],
    ids=lambda s: f'{s[0]}x{s[1]}',
)
def test_shapes_at_every_size_are_as_declared(name, size):
    model = tiny(name).eval()
    x = torch.zeros(1, 3, *size)
    if name == 'inception_next':
        if min(size) < 32:
            with pytest.raises(ValueError, match=rf'{size[0]}x{size[1]} image.*at least 32x32'):
                model(x)
            return
        shapes = [[side // s for side in size] for s in model.out_strides]
    else:
        shapes = [[-(-side // s) for side in size] for s in model.out_strides]
    for out, c, shape in zip(model(x), model.out_channels, shapes, strict=True):
        assert list(out.shape) == [1, c, *shape]
        assert out.isfinite().all()


@NETWORKS
def test_out_indices_choose_stages_and_skip_the_rest(name):
    full, some = tiny(name).eval(), tiny(name, out_indices=(1, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    some.stages[3].forward = None  # would raise if it were called
    for a, b in zip(some(x), full(x)[1:3], strict=True):
        torch.testing.assert_close(a, b)
    assert some.out_channels == (16, 32)
    assert some.out_strides == full.strides[1:3]


@NETWORKS
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0, 1, 2), (1,), (0,)])
def test_what_requires_a_gradient_gets_one(name, out_indices):
    model = tiny(name, out_indices=out_indices, norm_cfg=dict(type='BN', requires_grad=True))
    learning = {n for n, p in model.train().named_parameters() if p.requires_grad}
    assert grads(model, image(model)).keys() == learning
    run = ('stem.', *(f'stages.{i}.' for i in range(out_indices[-1] + 1)))
    assert learning == {n for n, _ in model.named_parameters() if n.startswith(run)}
    assert tiny(name).load_state_dict(model.state_dict())
    fused = reparameterize(model.eval())
    assert all(not p.requires_grad for n, p in fused.named_parameters() if not n.startswith(run))


@NETWORKS
@pytest.mark.parametrize('frozen', [-1, 0, 1, 3, 4])
def test_frozen_stages_neither_learn_nor_update_statistics(name, frozen):
    model = tiny(name, frozen_stages=frozen)
    assert model.train() is model
    before = copy.deepcopy(model.state_dict())
    if frozen < 4:
        grads(model, image(model))
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    else:
        model(image(model))
    frozen_prefixes = tuple(['stem.'] * (frozen >= 0) + [f'stages.{i}.' for i in range(frozen)])
    for key, value in model.state_dict().items():
        if key.startswith(frozen_prefixes):
            assert torch.equal(value, before[key]), key
        elif frozen < 4 and (key.endswith('running_mean') or value.dim() == 4):
            assert not torch.equal(value, before[key]), key


@NETWORKS
def test_norm_eval_keeps_statistics_but_trains_affine(name):
    model = tiny(name, norm_eval=True).train()
    assert norms(model)
    assert not any(n.training for n in norms(model))
    before = [n.running_mean.clone() for n in norms(model)]
    grads(model, image(model))
    assert all(torch.equal(b, n.running_mean) for b, n in zip(before, norms(model), strict=True))
    assert all(n.weight.grad.abs().sum() > 0 for n in norms(model))
    assert model.training
    assert model.stages[1].blocks[0].token_mixer.training


@NETWORKS
def test_checkpointing_keeps_gradients_and_statistics(name):
    plain = tiny(name, drop_path_rate=0.3).double()
    saving = tiny(name, drop_path_rate=0.3, with_cp=True).double()
    x = image(plain, dtype=torch.float64)
    state = torch.get_rng_state()
    expected = grads(plain, x)
    torch.set_rng_state(state)
    actual = grads(saving, x)
    assert expected.keys() == actual.keys() == dict(plain.named_parameters()).keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=key)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[key], value, msg=key)


@NETWORKS
def test_checkpointing_saves_memory(name):
    saved = {}
    for with_cp in (False, True):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        model = tiny(name, with_cp=with_cp)
        assert any(isinstance(m, Stage) for m in model.stages)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(image(model))
        saved[with_cp] = total
    assert saved[True] < 0.6 * saved[False], saved


@NETWORKS
def test_sync_bn_is_reverted_to_the_same_function_on_cpu(name):
    plain, sync = tiny(name), tiny(name, norm_cfg=dict(type='SyncBN'))
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms(sync))
    assert len(norms(sync)) == len(norms(plain))
    x = image(plain)
    # Fusing needs no reverting first.
    for fused in (reparameterize(sync.eval()), reparameterize(revert_sync_batchnorm(sync))):
        assert not norms(fused)
        assert all(e.max_rel < 1e-4 for e in prove(plain.eval(), fused, (64, 64)))
    reverted = revert_sync_batchnorm(sync)
    for mode in (False, True):
        for a, b in zip(reverted.train(mode)(x), plain.train(mode)(x), strict=True):
            torch.testing.assert_close(a, b)


@NETWORKS
def test_norm_cfg_sets_what_it_names(name):
    cfg = dict(type='BN', eps=1e-3, momentum=0.01, requires_grad=False)
    values = {(n.eps, n.momentum, n.weight.requires_grad) for n in norms(tiny(name, norm_cfg=cfg))}
    assert values == {(1e-3, 0.01, False)}


@NETWORKS
@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_stays_close_and_trains(name, dtype, tolerance, fast):
    model = tiny(name, fast=fast).eval()
    x = image(model)
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
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


@NETWORKS
def test_channels_last_is_equal(name):
    model = tiny(name).eval()
    x = image(model)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    for out, e in zip(model(x.to(memory_format=torch.channels_last)), expected, strict=True):
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'name', ['repnext_m', 'recnext_m', 'recnext_a', 'recnext_l_share', 'inception_next']
)
def test_is_captured_as_one_graph_with_autocast(name):
    torch._dynamo.reset()
    model = tiny(name).eval()
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.usefixtures('inductor')
def test_compiles_and_stays_equal():
    """One stage: the C++ compiler takes seconds for every few operators."""
    torch._dynamo.reset()
    stage = tiny('repnext_m').eval().stages[1]
    x = torch.randn(1, 8, 16, 16)
    compiled = torch.compile(stage, fullgraph=True)
    torch.testing.assert_close(compiled(x), stage(x), rtol=1e-4, atol=1e-4)


@NETWORKS
def test_deepcopy_is_independent(name):
    model = tiny(name).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(twin(x), model(x))
    nn.init.zeros_(next(twin.stem.parameters()))
    assert not torch.equal(twin(x)[0], model(x)[0])


@NETWORKS
def test_every_parameter_learns(name):
    model = tiny(name)
    gradients = grads(model, image(model))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, g in gradients.items():
        assert g.isfinite().all(), key
        # A bias before a norm that uses batch statistics has no effect.
        assert g.abs().sum() > 0 or key.endswith('.conv.bias'), key


@NETWORKS
@pytest.mark.parametrize('plan', PLANS)
def test_fusing_is_equal_and_loads_into_a_deploy_model(name, plan):
    # The merged train form composes as fusing does, so only the branches can contradict it.
    model = tiny(name, fast=False).eval().double()
    fused = reparameterize(model, plan, accept_inexact=True)
    if (name, plan) != ('repnext_m', 'single'):
        assert not fused.fusion_report.inexact
        for size in ((64, 64), (75, 101), (37, 33)):
            assert all(e.max_rel < 1e-9 for e in prove(model, fused, size))
    assert bool(norms(fused)) == (plan == 'upstream' and name not in NORMS_INSIDE)
    again = reparameterize(fused, plan, accept_inexact=True)
    assert not again.fusion_report.rewrites
    deploy = tiny(name, deploy=plan).double()
    deploy.eval().load_state_dict(fused.state_dict())
    # `fused` computes operation by operation, `deploy` in the other memory format.
    assert all(e.max_rel < 1e-12 for e in prove(fused, deploy, (64, 64)))
    exact = reparameterize(fused, 'single', accept_inexact=True)
    assert not norms(exact)


#: Networks whose norms all follow a convolution at once: no norm stands between the mixers.
NORMS_INSIDE = ('recnext_l', 'recnext_l_share')


@NETWORKS
def test_is_registered_in_mmengine_under_the_class_name(name):
    family, arch = TINY[name]
    assert MODELS.get(family.__name__) is family
    assert type(MODELS.build(dict(type=family.__name__, arch=arch))) is family

"""Fusion of backbones, alone and inside detectors and segmentors."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import REPO, randomise
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm import RepNeXt, prove, reparameterize

TINY = dict(channels=(8, 16, 32, 64), depths=(1, 1, 2, 1))
TINY_E = TINY | dict(single_branch=True)
ARCHS = pytest.mark.parametrize('arch', [TINY, TINY_E], ids=['m', 'e'])


def trained(arch=TINY, **kwargs) -> RepNeXt:
    return randomise(RepNeXt(arch, **kwargs)).eval()


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize('plan', ['upstream', 'full'])
def test_a_named_network_is_equal_in_float32(plan):
    model = trained('m1')
    for error in prove(model, reparameterize(model, plan), (64, 96)):
        assert error.max_rel < 1e-4


def test_single_is_one_depthwise_convolution_per_mixer():
    model = trained().double()
    for block in (b for s in model.stages for b in s.blocks):
        nn.init.zeros_(block.token_mixer.conv_l[0].bias)
    fused = reparameterize(model, 'single')
    assert all(e.max_rel < 1e-9 for e in prove(model, fused, (75, 101)))
    mixers = [m for n, m in fused.named_modules() if n.endswith('token_mixer')]
    mixers = [getattr(m, 'conv', m) for m in mixers]
    assert len(mixers) == 8
    assert all(isinstance(m, nn.Conv2d) for m in mixers)
    assert not fused.fusion_report.inexact
    assert not norms(fused)


def test_single_says_where_it_is_not_exact_and_is_refused_unless_named():
    model = trained().double()
    with pytest.raises(ValueError, match=r'stages\.0\.blocks\.0\.token_mixer.*top and bottom 5'):
        reparameterize(model, 'single')
    fused = reparameterize(model, 'single', accept_inexact=True)
    inexact = {r.module for r in fused.fusion_report.inexact}
    assert inexact == {
        f'stages.{s}.blocks.{b}.token_mixer' for s, b in [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    }
    # Away from the border the first block is the same.
    x = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    a, b = (m.stages[0](m.stem(x)) for m in (model, fused))
    torch.testing.assert_close(a[:, :, 5:-5], b[:, :, 5:-5])
    assert (a - b).abs().max() > 1e-6


def test_fusing_in_two_steps_equals_one():
    model = trained().double()
    steps = reparameterize(reparameterize(model, 'upstream'), 'full')
    assert all(e.max_rel < 1e-9 for e in prove(reparameterize(model), steps, (64, 64)))
    assert steps.state_dict().keys() == reparameterize(model).state_dict().keys()


def test_the_original_stays_and_a_second_fuse_changes_nothing():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    fused = reparameterize(model)
    assert model.plan is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = reparameterize(fused)
    assert again is not fused
    assert all(torch.equal(v, fused.state_dict()[k]) for k, v in again.state_dict().items())
    assert not again.fusion_report.rewrites


def test_refusals():
    with pytest.raises(ValueError, match=r'training mode.*eval\(\)'):
        reparameterize(RepNeXt(TINY).train())
    with pytest.raises(ValueError, match=r'eval\(\)'):
        RepNeXt(TINY).train().switch_to_deploy()
    with pytest.raises(ValueError, match="already fused with plan='full'"):
        reparameterize(reparameterize(trained()), 'upstream')
    with pytest.raises(ValueError, match='upstream, full, single'):
        reparameterize(trained(), 'all')
    with pytest.raises(TypeError, match='True or False'):
        reparameterize(trained(), 'single', accept_inexact='border')
    with pytest.raises(TypeError, match='Sequential holds no backbone'):
        reparameterize(nn.Sequential().eval())
    for models in ((trained(), trained().train()), (trained().train(), trained())):
        with pytest.raises(ValueError, match='both models must be in eval mode'):
            prove(*models)
    with pytest.raises(ValueError, match=r'shapes \[\(1, 8, .* and \[\(1, 16'):
        prove(trained(), trained(out_indices=(1, 2, 3)), (64, 64))


def test_report_lists_every_rewrite_and_the_counts():
    model = trained()
    report = reparameterize(model).fusion_report
    assert report.params_before == sum(p.numel() for p in model.parameters())
    assert report.params_after == sum(p.numel() for p in reparameterize(model).parameters())
    rules = [r.rule for r in report.rewrites]
    assert sum('norm to one convolution' in r for r in rules) == 2 + 2 * (5 + 3)
    assert sum('branches to one kernel' in r for r in rules) == 2 * (5 + 3)
    assert sum('forward' in r for r in rules) == 5
    assert sum('backward' in r for r in rules) == 3
    assert not report.norms_left
    assert 'plan full' in str(report)
    assert f'{report.params_after:,}' in str(report)
    assert len(reparameterize(model, 'upstream').fusion_report.norms_left) == 8


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_are_kept(dtype, memory_format):
    model = trained().to(dtype=dtype, memory_format=memory_format)
    fused = reparameterize(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    weight = fused.stem.get_parameter('stem.2.weight')
    assert weight.is_contiguous(memory_format=memory_format)
    assert fused(torch.zeros(1, 3, 64, 64, dtype=dtype))[0].dtype == dtype


def test_frozen_stages_stay_frozen_when_fused():
    fused = reparameterize(trained(frozen_stages=2))
    frozen = {n for n, p in fused.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in fused.named_parameters() if n.startswith(('stem.', 'stages.0.', 'stages.1.'))
    }


@pytest.mark.compat
@pytest.mark.parametrize(
    'config', ['mask_rcnn_repnext_m0_coco.py', 'semantic_fpn_repnext_m0_ade20k.py']
)
def test_a_whole_model_is_fused_in_its_backbone_only(config):
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(REPO / 'configs' / config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(init_cfg=None, norm_cfg=dict(type='BN'))
    model = randomise(revert_sync_batchnorm(MODELS.build(cfg.model))).eval()
    fused = reparameterize(model)
    assert type(fused) is type(model)
    assert not norms(fused.backbone)
    assert norms(model.backbone)
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for a, b in zip(model.extract_feat(x), fused.extract_feat(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.std()))
    for name, value in model.state_dict().items():
        if not name.startswith('backbone.'):
            assert torch.equal(fused.state_dict()[name], value), name


def test_a_merged_copy_convolution_is_not_taken_for_a_single_branch_one():
    merged, single = (RepNeXt(a, deploy=p) for a, p in [(TINY, 'single'), (TINY_E, True)])
    with pytest.raises(RuntimeError, match=r'downsample\.token_mixer'):
        single.load_state_dict(merged.state_dict())

"""InceptionNeXt: timm's network under this package's contract."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import randomise
from networks import TINY, tiny
from torch import nn

from repnext_mm import InceptionNeXt, reparameterize

ARCHS = pytest.mark.parametrize('arch', InceptionNeXt.arch_zoo)


@ARCHS
def test_keys_and_shapes_are_those_of_timms_weights(arch):
    with torch.device('meta'):
        published = timm.create_model(f'inception_next_{arch}').state_dict()
        own = InceptionNeXt(arch).state_dict()
    backbone = {k: v.shape for k, v in published.items() if not k.startswith('head.')}
    assert {k: v.shape for k, v in own.items()} == backbone


@pytest.mark.parametrize('arch', ['atto', 'tiny'])
def test_outputs_equal_timms_features(arch):
    reference = timm.create_model(f'inception_next_{arch}', features_only=True)
    reference = randomise(reference).eval()
    model = InceptionNeXt(arch, fast=False).eval()
    # timm's feature extractor flattens the names of the stem and the stages.
    model.load_state_dict(
        {
            k.replace('stem_', 'stem.').replace('stages_', 'stages.'): v
            for k, v in reference.state_dict().items()
        }
    )
    for size in ((64, 96), (75, 101)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            for a, b in zip(model(x), reference(x), strict=True):
                assert torch.equal(a, b)
    info = reference.feature_info
    assert model.out_channels == tuple(info.channels())
    assert model.out_strides == tuple(info.reduction())


@ARCHS
def test_parameters_with_timms_head_are_the_published_count(arch, published):
    with torch.device('meta'):
        head = timm.create_model(f'inception_next_{arch}').head
        model = InceptionNeXt(arch)
    millions = sum(p.numel() for m in (model, head) for p in m.parameters()) / 1e6
    assert millions == pytest.approx(published['imagenet'][f'inception_next_{arch}'][0], abs=0.06)


def test_fusing_folds_every_norm_and_layer_scale():
    model = tiny('inception_next').eval()
    assert all(b.gamma is not None for s in model.stages for b in s.blocks)
    fused = reparameterize(model)
    rules = [r.rule for r in fused.fusion_report.rewrites]
    assert sum('layer scale' in r for r in rules) == 5
    assert sum('1x1 convolution after it' in r for r in rules) == 5
    assert sum('unpadded convolution after it' in r for r in rules) == 3
    assert not any('gamma' in key for key in fused.state_dict())
    assert 'stages.1.downsample.weight' in fused.state_dict()


@pytest.mark.parametrize('band', [9, 11])
def test_single_is_one_depthwise_convolution_per_mixer(band):
    arch = TINY['inception_next'][1] | dict(band_kernel_size=band)
    fused = reparameterize(randomise(InceptionNeXt(arch)).eval(), 'single')
    for mixer in (b.token_mixer for s in fused.stages for b in s.blocks):
        assert type(mixer) is nn.Conv2d
        assert mixer.kernel_size == (band, band)
        assert mixer.groups == mixer.out_channels


def test_drop_path_rises_linearly():
    model = InceptionNeXt('tiny', drop_path_rate=0.2)
    rates = [getattr(b.drop_path, 'drop_prob', 0.0) for s in model.stages for b in s.blocks]
    reference = timm.create_model('inception_next_tiny', drop_path_rate=0.2)
    assert rates == pytest.approx(torch.linspace(0, 0.2, 18).tolist())
    assert rates == pytest.approx(
        [getattr(b.drop_path, 'drop_prob', 0.0) for s in reference.stages for b in s.blocks]
    )


def test_layer_scale_and_weights_start_as_timms():
    model = InceptionNeXt('atto')
    assert model.stages[0].blocks[0].gamma.tolist() == pytest.approx([1e-6] * 40)
    assert model.stages[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.stem[0].bias.any()
    plain = InceptionNeXt(TINY['inception_next'][1] | dict(ls_init_value=0))
    assert plain.stages[0].blocks[0].gamma is None

"""Networks of timm as backbones, alone and in models of mmdet and mmseg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mm_models import build
from mmengine.config import Config
from tool_runs import CONFIGS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm.backbones.timm_pyramid import TimmPyramid
from repnext_mm.checkpoints import CheckpointError

#: The rivals of the papers' table 4 that timm has, and networks of other layouts.
RIVALS = {
    'repvit_m1_1': (4, 8, 16, 32),
    'fastvit_t8': (4, 8, 16, 32),
    'efficientformerv2_s0': (4, 8, 16, 32),
    'swiftformer_xs': (4, 8, 16, 32),
    'convnext_femto': (4, 8, 16, 32),
    'resnet18': (4, 8, 16, 32),
    'mobileone_s0': (4, 8, 16, 32),
    'mobilenetv3_small_100': (4, 8, 16, 32),
    'swin_tiny_patch4_window7_224': (4, 8, 16, 32),
}


@pytest.mark.parametrize('name, strides', RIVALS.items())
def test_the_contract(name: str, strides: tuple[int, ...]) -> None:
    """The last four levels, `(N, C, H, W)`, with the channels and strides that it states."""
    model = TimmPyramid(name).eval()
    assert model.out_strides == strides
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        outs = model(image)
    assert len(outs) == 4
    for out, width, stride in zip(outs, model.out_channels, model.out_strides, strict=True):
        assert out.shape == (1, width, 224 // stride, 224 // stride)


def test_levels_are_chosen() -> None:
    model = TimmPyramid('resnet18', out_indices=(1, 3))
    assert model.out_strides == (4, 16) and model.out_channels == (64, 256)
    assert not hasattr(model.network, 'layer4'), 'a level that is not used'


@pytest.mark.parametrize('name', ['resnet18', 'repvit_m0_9', 'mobilenetv3_small_100'])
@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_freezing(name: str, frozen: int) -> None:
    """Levels up to the asked one take no gradient and no statistics, all later ones do."""
    model = TimmPyramid(name, frozen_stages=frozen).train()
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    norms = {k: m for k, m in model.named_modules() if isinstance(m, _BatchNorm)}
    before = {k: m.running_mean.clone() for k, m in norms.items()}
    outs = model(torch.randn(2, 3, 64, 64))
    sum(out.square().mean() for out in outs).backward()
    assert bool(fixed) == (frozen >= 0)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key in fixed), key
    still = {k for k, m in norms.items() if torch.equal(m.running_mean, before[k])}
    assert all(norms[k].training == (k not in still) for k in norms)
    order = [k for k, _ in model.named_parameters()]
    last = max((order.index(k) for k in fixed), default=-1)
    assert fixed == set(order[: last + 1]), 'what is frozen comes before what is not'
    more = TimmPyramid(name, frozen_stages=min(frozen + 2, 4))
    assert sum(not p.requires_grad for p in more.parameters()) > len(fixed)


def test_norms_in_eval_mode() -> None:
    model = TimmPyramid('resnet18', norm_eval=True).train()
    assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
    assert model.network.training


def test_weights_survive_the_runner_and_load_from_a_classifier(tmp_path: Path) -> None:
    model = TimmPyramid('convnext_femto')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    classifier = timm.create_model('convnext_femto')
    for prefix in ('', 'network.'):
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / f'x{prefix}.pth'))
        state = {prefix + k: v for k, v in classifier.state_dict().items()}
        torch.save({'state_dict': state}, init_cfg['checkpoint'])
        model = TimmPyramid('convnext_femto', init_cfg=init_cfg)
        model.init_weights()
        stage = model.network.stages_1.blocks[0].mlp.fc1.weight
        assert torch.equal(stage, classifier.stages[1].blocks[0].mlp.fc1.weight)
    other = TimmPyramid('resnet18', init_cfg=init_cfg)
    with pytest.raises(CheckpointError, match='does not fit TimmPyramid'):
        other.init_weights()


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(model_name='repvit_m99'), "timm has no model 'repvit_m99'; did you mean repvit"),
        (dict(model_name='resnet18', out_indices=(5,)), r'levels of resnet18: 0 \(stride 2\), 1'),
        (dict(model_name='resnet18', out_indices=(2, 1)), 'must be increasing levels'),
        (dict(model_name='resnet18', frozen_stages=9), 'frozen_stages=9 is not allowed'),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TimmPyramid(**options)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_one_line_of_a_config(task: str, tmp_path: Path) -> None:
    """In mmdet's and mmseg's own models: the channels are those that it states."""
    backbone = TimmPyramid('repvit_m0_9')
    config = tmp_path / 'rival.py'
    config.write_text(
        f'_base_ = {str(CONFIGS[task])!r}\n'
        "model = dict(backbone=dict(_delete_=True, type='TimmPyramid', model_name='repvit_m0_9'),"
        f' neck=dict(in_channels={list(backbone.out_channels)}))\n'
    )
    model = build(Config.fromfile(config))
    assert isinstance(model.backbone, nn.Module) and type(model.backbone).__name__ == 'TimmPyramid'
    features = model.extract_feat(torch.randn(1, 3, 64, 64))
    assert [f.shape[2] for f in features] == [16, 8, 4, 2]

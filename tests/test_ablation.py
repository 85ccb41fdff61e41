"""The variants of the papers' ablations, their sizes, and the papers' formulas."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import formulas
import pytest
import timm
import torch
from conftest import REPO, randomise
from mmengine.config import Config
from test_classifiers import drawn
from torch import nn

import repnext_mm.timm  # noqa: F401  registers
from repnext_mm import RecNeXt, RepNeXt, reparameterize
from repnext_mm.backbones.recconv import SharedRecursiveConv
from repnext_mm.backbones.repnext import ChunkConv
from repnext_mm.backbones.single_branch import to_single_branch
from repnext_mm.complexity import count_macs

#: `n_parameters` of the published logs of M1 with both heads; RepNeXt's baseline is the paper's.
LOGGED = {
    'repnext_m1_120e': 5_323_316,
    'repnext_m1_without_reparameterization_120e': 5_230_424,
    'recnext_m1_7x7_120e': 5_948_456,
    'recnext_m1_7x7_nearest_120e': 5_948_456,
    'recnext_m1_7x7_transposed_120e': 6_209_576,
    'recnext_m1_7x7_recurrent_120e': 6_120_152,
    'recnext_m1_7x7_grouped_120e': 6_164_129,
    'recnext_m1_7x7_split_120e': 5_832_926,
}
#: Of the fused classifiers, in millions (RepNeXt, table 5), which cuts its digits off.
FUSED = {'small': 4.81, 'medium': 4.77, 'large': 4.79}
CONFIGS = sorted((REPO / 'configs/imagenet/ablation').glob('*.py'))

SMALL_NET = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1))
REPNEXT: dict[str, dict[str, Any]] = {
    'small serial': dict(small='serial'),
    'small plain': dict(small='3x3'),
    'no small': dict(small='none'),
    'no medium': dict(medium='none'),
    'no large': dict(large='none'),
    'dense': dict(large='dense'),
    'no branches': dict(reparameterize=False),
    '3x3 downsample': dict(downsample='3x3'),
    'square': dict(medium='7x7+5x5+3x3'),
    'square and strips': dict(medium='7x7+5x5+3x3+strips'),
    'rectangles': dict(medium='7x7+5x3+3x5'),
    'widths': dict(channels=(8, 24, 32, 40)),
}


def network(**settings: Any) -> RepNeXt:
    return randomise(RepNeXt({**SMALL_NET, **settings})).double().eval()


@pytest.mark.parametrize('settings', REPNEXT.values(), ids=REPNEXT)
def test_variants_of_repnext_compute_and_fuse(settings: dict[str, Any]) -> None:
    model = network(**settings)
    image = torch.randn(1, 3, 75, 90, dtype=torch.float64)
    with torch.no_grad():
        outs = model(image)
        model.set_execution(fast=False)
        for a, b in zip(model(image), outs, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert tuple(out.shape[1] for out in outs) == model.out_channels
        fused = reparameterize(model)
        assert fused.fusion_report.norms_left == [] and not fused.fusion_report.inexact
        for a, b in zip(fused(image), outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('settings', REPNEXT.values(), ids=REPNEXT)
def test_gradients_of_the_fast_form(settings: dict[str, Any]) -> None:
    grads = []
    for fast in (True, False):
        torch.manual_seed(0)
        model = RepNeXt({**SMALL_NET, **settings}, fast=fast).double().train()
        image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        sum(out.square().mean() for out in model(image)).backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for key, grad in grads[1].items():
        torch.testing.assert_close(grads[0][key], grad, rtol=1e-6, atol=1e-9, msg=key)


def test_one_kernel_is_exact_with_a_dense_large_branch() -> None:
    model = network(large='dense')
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    fused = reparameterize(model, 'single')  # nothing to accept
    assert not fused.fusion_report.inexact
    mixers = [m for m in fused.modules() if isinstance(m, ChunkConv)]
    assert not mixers
    with torch.no_grad():
        for a, b in zip(fused(image), model(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match='not exact'):
        reparameterize(network(), 'single')


@pytest.mark.parametrize('name, count', LOGGED.items())
def test_parameters_are_those_of_the_logs(name: str, count: int) -> None:
    cfg = Config.fromfile(REPO / 'configs/imagenet/ablation' / f'{name}.py')
    arch = {'arch': dict(cfg.model.arch)} if 'arch' in cfg.model else {}
    with torch.device('meta'):
        model = timm.create_model(cfg.model.network, **arch)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_ablations_build(path: Any) -> None:
    cfg = Config.fromfile(path)
    assert cfg.max_epochs == cfg.train_cfg.max_epochs == 120
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == (1024 if 'recnext' in path.stem else 2048) == cfg.auto_scale_lr.base_batch_size
    assert cfg.optim_wrapper.optimizer.lr == 1e-3 * batch / 512
    arch = {'arch': dict(cfg.model.arch)} if 'arch' in cfg.model else {}
    with torch.device('meta'):
        assert timm.create_model(cfg.model.network, **arch).num_classes == 1000


@pytest.mark.parametrize('branch, millions', FUSED.items())
def test_parameters_without_a_branch(branch: str, millions: float) -> None:
    model = timm.create_model('repnext_m1', arch={branch: 'none'}).eval()
    count = sum(p.numel() for p in reparameterize(model).parameters())
    assert int(count / 1e4 + 0.5) / 100 == millions or int(count / 1e4) / 100 == millions


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(small='5x5'), "arch['small']='5x5' must be one of parallel, serial, 3x3, none"),
        (dict(medium='9x9'), "arch['medium']='9x9' must be one of 7x7+5x3"),
        (dict(large='x'), "arch['large']='x' must be one of strips, dense, none"),
        (dict(downsample='max'), "arch['downsample']='max' must be one of copy, 3x3"),
        (dict(reparameterize='no'), "arch['reparameterize']='no' must be one of True, False"),
        (dict(small='none', single_branch=True), 'is for the branches that single_branch=True'),
        (dict(channels=(6, 12, 24, 48)), 'must be multiples of 4'),
    ],
)
def test_wrong_variants_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace('[', r'\[').replace('+', r'\+')):
        RepNeXt({**SMALL_NET, **settings})


# --- from M to E


def test_m_as_e_is_exact_without_the_first_strips_bias() -> None:
    model = drawn('repnext_m0', num_classes=7).double()
    image = torch.randn(1, 3, 128, 160, dtype=torch.float64)
    with torch.no_grad():
        single, orders = to_single_branch(model)
        assert single.describe() == "RepNeXtClassifier(arch='m0e')"
        near = (single(image) - model(image)).abs().max()
        assert 1e-6 < near < 0.1, 'the borders differ'
        for name, parameter in model.named_parameters():
            if name.endswith('conv_l.0.bias'):
                parameter.zero_()
        single, orders = to_single_branch(model)
        torch.testing.assert_close(single(image), model(image), rtol=1e-10, atol=1e-10)
        ours, theirs = (m.forward_intermediates(image)[1] for m in (model, single))
        for own, other, order in zip(ours, theirs, orders, strict=True):
            torch.testing.assert_close(other, own[:, order], rtol=1e-9, atol=1e-9)


def test_a_backbone_and_a_custom_arch_convert_too() -> None:
    model = network()
    for name, parameter in model.named_parameters():
        if name.endswith('conv_l.0.bias'):
            nn.init.zeros_(parameter)
    single, orders = to_single_branch(model)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for own, other, order in zip(model(image), single(image), orders, strict=True):
            torch.testing.assert_close(other, own[:, order], rtol=1e-9, atol=1e-9)


def test_what_has_no_e_form_is_refused() -> None:
    model = network()
    for wrong, kind, said in (
        (RecNeXt('m0').eval(), TypeError, 'RecNeXt is no RepNeXt'),
        (RepNeXt('m0e').eval(), ValueError, 'is not a training form with branches'),
        (reparameterize(model), ValueError, 'is not a training form with branches'),
        (model.train(), ValueError, 'training mode'),
        (network(downsample='3x3'), ValueError, 'only downsamples of copy convolutions'),
    ):
        with pytest.raises(kind, match=said):
            to_single_branch(wrong)


# --- recursive convolutions


@pytest.mark.parametrize('size', [(64, 64), (75, 90), (33, 65)])
@pytest.mark.parametrize('kind', ['recursive', 'recurrent'])
def test_transposed_upsampling(kind: str, size: tuple[int, int]) -> None:
    """At every size, fused and as trained; one transposed convolution for each mixer."""
    token_mixer = dict(type=kind, mode='transposed')
    arch = dict(series='m', **SMALL_NET, token_mixer=token_mixer)
    model = randomise(RecNeXt(arch)).double().eval()
    transposed = [m for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.kernel_size for m in transposed] == [(6, 6)] * 4
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        outs = model(image)
        for a, b in zip(reparameterize(model)(image), outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_transposed_is_for_recursive_convolutions() -> None:
    arch = dict(series='a', channels=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="'transposed' is not one of nearest, bilinear"):
        RecNeXt({**arch, 'token_mixer': dict(mode='transposed')})


# --- the papers' formulas


@pytest.mark.parametrize('channels', [48, 96])
def test_parameters_of_a_chunk_convolution(channels: int) -> None:
    mixer = ChunkConv(channels)
    mixer.conv_s = mixer.conv_s.fuse('full', lambda *_: None)
    mixer.conv_m = mixer.conv_m.fuse('full', lambda *_: None)
    weights = sum(p.numel() for p in mixer.parameters() if p.ndim > 1)
    assert weights == formulas.chunk_convolution_parameters(channels)
    assert weights == (9 + 7**2 + 22) * channels // 4


@pytest.mark.parametrize('level', [0, 1, 2, 3, 4])
def test_cost_and_reach_of_a_recursive_convolution(level: int) -> None:
    channels, side = 4, 64
    mixer = SharedRecursiveConv(channels, 5, level).double()
    count = sum(p.numel() for p in mixer.parameters())
    assert count == formulas.recursive_convolution_parameters(channels, 5, level)
    assert count == (level + 2 if level else 1) * 25 * channels
    plain = 25 * channels * side**2
    with torch.device('meta'):
        counted = count_macs(
            _OneImage(SharedRecursiveConv(channels, 5, level), channels), (side, side)
        )
    ratio = Fraction(int(counted), plain)
    assert ratio == formulas.recursive_convolution_cost(level) <= Fraction(5, 3)


@pytest.mark.parametrize('level', [1, 2, 3])
def test_reach_of_a_recursive_convolution(level: int) -> None:
    """All weights one: the pixels that reach the middle span about k * 2^l."""
    side, kernel = 192, 5
    mixer = SharedRecursiveConv(1, kernel, level, mode='nearest').double()
    for parameter in mixer.parameters():
        nn.init.ones_(parameter)
    image = torch.zeros(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    mixer(image)[0, 0, side // 2, side // 2].backward()
    row = image.grad[0, 0].abs().sum(0)
    # Where its weight is felt: at least a quarter of the most.
    felt = int((row > row.max() / 4).sum())
    claimed = formulas.effective_receptive_field(kernel, level)
    assert claimed == kernel * 2**level
    assert 0.5 * claimed <= felt <= 1.5 * claimed


class _OneImage(nn.Module):
    """Takes an image of three channels, as the counter of operations gives."""

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.mixer, self.channels = mixer, channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.mixer(image[:, :1].repeat(1, self.channels, 1, 1))

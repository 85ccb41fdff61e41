"""Fused weights, and training weights that are fused while loading."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import TINY, tiny
from weight_files import (
    Tree,
    assert_holds,
    fused_classifier,
    fused_state,
    network,
    refuse,
    save_bare,
    save_release,
    save_torchscript,
    state_of,
    under,
)

from repnext_mm import RepNeXt, reparameterize
from repnext_mm.checkpoints import (
    load_pretrained,
)


def upstream_fused_keys(training: list[str]) -> set[str]:
    """Names after the published fuse(): branches merged, each conv + norm pair one convolution,
    RecNeXt's two convolutions and identity one too.

    Norms of their own stay; the strip pair of conv_l stays.
    """
    merged = set()
    for key in training:
        key = re.sub(r'\.(conv_s|conv_m)\.conv_\w+\.', r'.\1.', key)
        if '.rep_mixer.' in key:
            merged |= {
                re.sub(r'(\.rep_mixer)\..*', rf'\1.{kind}', key) for kind in ('weight', 'bias')
            }
            continue
        key = re.sub(r'\.conv\.(weight|bias)$', r'.\1', key)
        paired = re.sub(r'\.norm\.\w+$', '.conv.weight', key) in training
        if key.endswith('.num_batches_tracked') and paired:
            continue
        if paired:
            key = re.sub(r'\.norm\.\w+$', '.bias', key)
        merged.add(key)
    return merged


@pytest.mark.parametrize('arch', ['m0', 'm0e'])
def test_fused_keys_are_upstreams(arch: str) -> None:
    assert set(fused_state(arch)) == upstream_fused_keys(list(state_of(arch)))


@pytest.mark.parametrize(
    'deploy, script', [('upstream', True), ('upstream', False), (True, True), ('single', True)]
)
def test_fused_archive_loads_into_fused_models(
    deploy: str | bool, script: bool, tmp_path: Path
) -> None:
    path = tmp_path / 'repnext_m0_distill_300e_fused.pt'
    tree = Tree.of(fused_classifier())
    (torch.jit.script(tree) if script else torch.jit.trace(tree, torch.zeros(1))).save(str(path))
    model = RepNeXt('m0', deploy=deploy).eval()
    report = load_pretrained(model, path)
    assert report.complete
    assert report.match.ignored == {'head': 2}
    assert ('fused on loading' in str(report)) == (deploy != 'upstream')
    expected = fused_state(plan='full' if deploy is True else str(deploy))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize('deploy', ['upstream', True, 'single'])
def test_training_checkpoint_is_fused_into_fused_models(
    deploy: str | bool, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    model = RepNeXt('m0', deploy=deploy).eval()
    report = load_pretrained(model, save_release(tmp_path / 'a.pth'))
    assert 'training form, fused on loading' in log()[-1]
    assert len(report.match.matched) == 657
    image = torch.randn(1, 3, 64, 64)
    outs = zip(model(image), network()(image), strict=True)
    for i, (actual, expected) in enumerate(outs):
        if deploy == 'single':  # differs on the border rows; that it is close is enough here
            assert (actual - expected).abs().mean() < 0.1 * expected.std(), i
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_fusing_on_loading_uses_the_models_epsilon(tmp_path: Path) -> None:
    norm_cfg = dict(type='BN', eps=0.1)
    reference = RepNeXt('m0', norm_cfg=norm_cfg)
    reference.load_state_dict(state_of())
    model = RepNeXt('m0', norm_cfg=norm_cfg, deploy=True).eval()
    load_pretrained(model, save_bare(tmp_path / 'a.pth'))
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(image)[-1], reference.eval()(image)[-1], rtol=1e-4, atol=1e-4)


def test_fused_state_dict_loads_where_it_came_from(tmp_path: Path) -> None:
    state = fused_state(plan='full')
    torch.save({'state_dict': under('backbone.', state)}, tmp_path / 'fused.pth')
    model = RepNeXt('m0', deploy=True)
    report = load_pretrained(model, tmp_path / 'fused.pth')
    assert_holds(model, state)
    assert report.match.prefix == 'backbone.'
    single = RepNeXt('m0', deploy='single')
    assert 'fused on loading' in str(load_pretrained(single, tmp_path / 'fused.pth'))


@pytest.mark.parametrize(
    'plan, deploy, fix',
    [
        ('upstream', False, "RepNeXt(arch='m0', deploy='upstream')"),
        ('full', False, "RepNeXt(arch='m0', deploy=True)"),
        ('full', 'upstream', "RepNeXt(arch='m0', deploy=True)"),
    ],
)
def test_fused_too_far(plan: str, deploy: str | bool, fix: str, tmp_path: Path) -> None:
    torch.save(fused_state(plan=plan), tmp_path / 'fused.pth')
    refuse(tmp_path / 'fused.pth', fix, model=RepNeXt('m0', deploy=deploy))


def test_fused_archive_into_a_training_model_names_the_fix(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / 'fused.pt', fused_classifier())
    refuse(path, 'fused', "deploy='upstream'", 'training checkpoint')


@pytest.mark.parametrize('name', [name for name in TINY if name.startswith('recnext')])
def test_fused_archives_of_recnext_load(name: str, tmp_path: Path) -> None:
    family, arch = TINY[name]
    trained = tiny(name).eval()
    branches = dict(reparameterize(trained, 'upstream').state_dict())
    assert set(branches) == upstream_fused_keys(list(trained.state_dict()))
    head = {'head.weight': torch.zeros(5, 64), 'head.bias': torch.zeros(5)}
    path = save_torchscript(tmp_path / 'fused.pt', branches | head)

    model = family(arch, deploy='upstream').eval()
    report = load_pretrained(model, path)
    assert_holds(model, branches)
    assert report.complete
    fused = family(arch, deploy=True).eval()
    # T, S and B have no norm but those that upstream folds too.
    norms_left = any(key.endswith('running_mean') for key in branches)
    assert norms_left == (name in ('recnext_m', 'recnext_a'))
    assert ('fused on loading' in str(load_pretrained(fused, path))) == norms_left
    image = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(fused(image), trained(image), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

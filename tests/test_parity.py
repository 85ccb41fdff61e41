"""Every network against the published implementation's keys, shapes and outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import repnext_mm

FAMILIES = {'repnext': repnext_mm.RepNeXt, 'recnext': repnext_mm.RecNeXt}


def fixture_names() -> list[str]:
    """All fixtures of the families above, known only where the shared data is."""
    data = os.environ.get('REPNEXT_MM_DATA')
    folder = Path(data).resolve().parent / 'parity' if data else Path('unset')
    return sorted(p.stem for p in folder.glob('*.json') if p.stem.split('_')[0] in FAMILIES)


def build(variant: str, **kwargs):
    family, arch = variant.split('_', 1)
    return FAMILIES[family](arch, **kwargs).eval()


def test_every_family_has_fixtures(parity_dir):
    assert {name.split('_')[0] for name in fixture_names()} == set(FAMILIES)


@pytest.mark.parametrize('variant', fixture_names())
def test_keys_and_outputs_are_the_published_ones(variant, parity_dir, formula):
    fixture = formula.load(parity_dir / f'{variant}.json')
    model = build(variant)
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert keys == fixture['state_dict']
    assert sum(p.numel() for p in model.parameters()) == fixture['parameters']
    model.load_state_dict(formula.formula_state_dict(model.state_dict()))
    assert len(fixture['outputs']) == 3
    for size, expected in fixture['outputs'].items():
        with torch.no_grad():
            actual = formula.describe(model(formula.formula_image(*map(int, size.split('x')))))
        for stage, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert a['shape'] == e['shape'], f'{size}, stage {stage}'
            assert a['index'] == e['index']
            worst = max(abs(x - y) for x, y in zip(a['value'], e['value'], strict=True))
            assert worst <= 1e-4 * e['std'], f'{size}, stage {stage}'


@pytest.mark.parametrize(
    'family, arch', [(f, a) for f, cls in FAMILIES.items() for a in cls.arch_zoo]
)
def test_fused_parameters_are_the_published_count(family, arch, published):
    model = FAMILIES[family](arch, deploy=True)
    head = 1000 * (model.channels[-1] + 1)
    millions = (sum(p.numel() for p in model.parameters()) + head) / 1e6
    assert millions == pytest.approx(published['imagenet'][f'{family}_{arch}'][0], abs=0.06)

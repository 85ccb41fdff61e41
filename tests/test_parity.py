"""Every network against the published implementation's keys, shapes and outputs."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA

import repnext_mm

FAMILIES = {'repnext': repnext_mm.RepNeXt, 'recnext': repnext_mm.RecNeXt}


PARITY = DATA / 'parity'
#: All fixtures of the families above.
FIXTURES = sorted(p.stem for p in PARITY.glob('*.json') if p.stem.split('_')[0] in FAMILIES)


def build(variant: str, **kwargs):
    family, arch = variant.split('_', 1)
    return FAMILIES[family](arch, **kwargs).eval()


def test_every_family_has_fixtures():
    assert {name.split('_')[0] for name in FIXTURES} == set(FAMILIES)


@pytest.mark.parametrize('variant', FIXTURES)
def test_keys_and_outputs_are_the_published_ones(variant, formula):
    fixture = formula.load(PARITY / f'{variant}.json')
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

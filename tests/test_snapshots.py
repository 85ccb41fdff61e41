"""What must not change unnoticed: names of weights, outputs, keys of reports, help texts.

`pytest tests/test_snapshots.py --update-snapshots` records them again; look at what differs.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import DATA
from networks import TINY, grads
from repnext_mm_cli import COMMANDS, load, parser

from repnext_mm import reparameterize
from repnext_mm.backbones import names
from repnext_mm.network import PLANS

#: The training form, and every plan by its place in `PLANS`.
FORMS = {'training': False, **{f'plan {i}': plan for i, plan in enumerate(PLANS)}}
Snapshot = Callable[[str, Any], None]


@pytest.fixture
def same(request: pytest.FixtureRequest) -> Snapshot:
    """Compare with what was recorded, exactly; or record it."""

    def check(name: str, value: Any) -> None:
        path = DATA / 'snapshots' / f'{name}.json.gz'
        if request.config.getoption('--update-snapshots'):
            record(path, value)
        assert value == recorded(path)

    return check


def record(path: Path, value: Any) -> None:
    text = json.dumps(value, sort_keys=True, indent=0)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def recorded(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def test_names_and_shapes_of_all_weights(same: Snapshot) -> None:
    states = {}
    with torch.device('meta'):
        for name, (family, arch) in names().items():
            for form, deploy in FORMS.items():
                state = family(arch, deploy=deploy).state_dict()
                states[f'{name}, {form}'] = {
                    key: f'{tuple(value.shape)} {value.dtype}' for key, value in state.items()
                }
    same('state_dicts', states)


@pytest.mark.parametrize('name', TINY)
def test_outputs_and_gradients_in_float64(
    name: str, formula: ModuleType, request: pytest.FixtureRequest
) -> None:
    """To 1e-9 of their deviation, as float64 rounds elsewhere on other processors."""
    family, arch = TINY[name]
    model = family(arch)
    model.load_state_dict(formula.formula_state_dict(model.state_dict()))
    model.double()
    side = 4 * model.strides[-1]
    image = formula.formula_image(side, side).double()
    found = {'training': formula.describe(model.eval()(image))}
    for form, plan in zip([*FORMS][1:], PLANS, strict=True):
        fused = reparameterize(model, plan, accept_inexact=True)
        found[form] = formula.describe(fused(image))
    images = torch.cat((image, image.flip(3)))
    found['gradients'] = [
        dict(std=float(g.square().mean().sqrt()), value=formula.sample(g, 2)[1])
        for g in grads(model.train(), images).values()
    ]
    path = DATA / 'snapshots' / f'outputs_{name}.json.gz'
    if request.config.getoption('--update-snapshots'):
        record(path, found)
    expected = recorded(path)
    assert found.keys() == expected.keys()
    for form, rows in expected.items():
        for i, (row, actual) in enumerate(zip(rows, found[form], strict=True)):
            error = max(abs(a - e) for a, e in zip(actual['value'], row['value'], strict=True))
            # A bias before a norm that uses batch statistics has no gradient but rounding.
            assert error <= 1e-9 * row['std'] + 1e-11, f'{form}, {i}'
            assert actual.get('shape') == row.get('shape')


def paths(value: Any, prefix: str = '') -> set[str]:
    """Every path of keys in JSON data; entries of a list share theirs."""
    if isinstance(value, dict):
        return {path for key in value for path in paths(value[key], f'{prefix}.{key}')} or {prefix}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {path for item in value for path in paths(item, f'{prefix}[]')}
    return {prefix}


def test_keys_of_reports(same: Snapshot, tmp_path: Path) -> None:
    deploy = load('deploy')
    folder = tmp_path / 'out'
    options = ['--size', '64', '--format', 'pth,onnx,torchscript', '--work-dir', str(folder)]
    assert deploy(['repnext_m0', *options]) == 0
    timed = tmp_path / 'layers.json'
    options = ['--channels', '4', '--size', '8', '--rounds', '2', '--json', str(timed)]
    assert load('benchmark')(['layers', 'gelu', *options]) == 0
    found = {}
    for name, path in {'deploy': folder / 'report.json', 'benchmark': timed}.items():
        found[name] = sorted(paths(json.loads(path.read_text())))
    # A machine, or how busy it is, decides about these.
    found = {
        name: [path for path in rows if not re.search(r'environment|load\.|packages', path)]
        for name, rows in found.items()
    }
    same('report_keys', found)


SUBCOMMANDS = {
    'deploy': ('check', 'bench', 'explain'),
    'benchmark': ('train-step', 'model-step', 'inference', 'layers', 'throughput'),
    'operators': (),
}


def test_help_texts(same: Snapshot) -> None:
    """The words of each, in any order: Python versions arrange them differently."""
    texts = {'': parser().format_help()}
    for command in COMMANDS:
        for verb in ((), *((verb,) for verb in SUBCOMMANDS.get(command, ()))):
            texts[' '.join((command, *verb))] = help_of(command, *verb)
    same('help', {name: words(text) for name, text in texts.items()})


def help_of(command: str, *verb: str) -> str:
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS='10000'),
        mock.patch.object(sys, 'argv', [f'repnext-mm {command}', *verb, '--help']),
        contextlib.redirect_stdout(out),
        pytest.raises(SystemExit) as stop,
    ):
        load(command)()
    assert not stop.value.code
    return out.getvalue()


def words(text: str) -> list[str]:
    return sorted(set(re.findall(r'[\w./-]*\w', text)))

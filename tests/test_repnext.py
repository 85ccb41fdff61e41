"""What is RepNeXt's own: its training forms, its arguments, its registration."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from networks import TINY as NETWORKS
from networks import tiny

from repnext_mm import RepNeXt
from repnext_mm.operators.installation import ONE_LINE

TINY = NETWORKS['repnext_m'][1]


def test_merged_form_runs_one_convolution_per_mixer():
    counts = {}
    for fast in (True, False):
        model = RepNeXt(TINY, fast=fast).eval()
        calls = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with torch.no_grad(), calls as profile:
            model(torch.zeros(1, 3, 64, 64))
        counts[fast] = next(e.count for e in profile.key_averages() if e.key == 'aten::conv2d')
    # 5 blocks and 3 downsamples with 2 branched mixers each: 4 + 7 kernels and 4 + 7 again.
    assert counts[False] - counts[True] == (5 + 3) * (11 - 2)


def test_drop_path_drops_whole_samples_only_in_training():
    model = tiny('repnext_m', drop_path_rate=0.9)
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(model(x), model(x))
    block = model.stages[0].blocks[0].train()
    y = torch.randn(64, 8, 4, 4)
    kept = (block(y) != y).flatten(1).any(1)
    assert 0 < kept.sum() < 32


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(arch='m9'), ValueError, ['m9', 'm0, m1']),
        (dict(arch='M4'), ValueError, ["Did you mean 'm4'"]),
        (dict(arch=4), TypeError, ['int']),
        (dict(arch=dict(channels=(8, 16, 32, 64))), ValueError, ['depths']),
        (dict(arch=TINY | dict(width=3)), ValueError, ['width', 'mlp_ratio']),
        (dict(arch=dict(channels=(8, 16), depths=(1, 1))), ValueError, ['4 whole numbers']),
        (dict(arch=dict(channels=(8, 18, 32, 64), depths=(1,) * 4)), ValueError, ['multiples']),
        (dict(out_indices=(0, 4)), ValueError, ['(0, 4)', '(0, 1, 2, 3)']),
        (dict(out_indices=(-1,)), ValueError, ['(-1,)']),
        (dict(out_indices=(2, 1)), ValueError, ['increasing']),
        (dict(out_indices=()), ValueError, ['one or more']),
        (dict(frozen_stages=5), ValueError, ['frozen_stages=5', '1 to 4']),
        (dict(norm_cfg=dict(type='GN')), ValueError, ['GN', 'SyncBN']),
        (dict(norm_cfg=dict(type='BN', groups=2)), ValueError, ['groups', 'eps']),
        (dict(norm_cfg='BN'), TypeError, ['norm_cfg', 'str']),
        (dict(fast='merged'), TypeError, ["fast='merged'", 'True', 'False']),
        (dict(drop_path_rate=1.0), ValueError, ['drop_path_rate=1.0']),
        (dict(deploy='fast'), ValueError, ['fast', 'upstream, full, single']),
    ],
)
def test_wrong_arguments_say_what_is_allowed(kwargs, error, words):
    with pytest.raises(error) as caught:
        RepNeXt(**(dict(arch=TINY) | kwargs))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.compat
@pytest.mark.parametrize(
    'name, imports', [('RepNeXt', 'import repnext_mm'), ('repnext_mm.RepNeXt', 'pass')]
)
def test_builds_from_the_registries_of_mmdet_and_mmseg(name, imports, tmp_path):
    """In a fresh process: whether the package is imported beforehand is the point.

    Without it, an mmcv that is not compiled needs what `repnext-mm operators --install` writes.
    """
    mmcv = Path(importlib.util.find_spec('mmcv').origin).parent
    if not list(mmcv.glob('_ext*.so')):
        copy = shutil.copytree(mmcv, tmp_path / 'mmcv', ignore=shutil.ignore_patterns('csrc'))
        (copy / '_ext.py').write_text(ONE_LINE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get('PYTHONPATH')]))
    code = f"""
{imports}
from importlib import import_module
for scope in ('mmdet', 'mmseg'):
    import_module(scope + '.utils').register_all_modules()
    model = import_module(scope + '.registry').MODELS.build(dict(type={name!r}, arch='m0'))
    assert type(model).__module__ == 'repnext_mm.backbones.repnext'
    print(scope, model.out_channels)
"""
    run = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, 'PYTHONPATH': path},
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith('mm')]
    assert lines == [f'{scope} (40, 80, 160, 320)' for scope in ('mmdet', 'mmseg')]

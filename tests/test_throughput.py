"""Images per second: what is measured, and the picture of it. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm.measure import accuracy_picture, throughput
from repnext_mm.measure.cli import main
from repnext_mm.measure.throughput import Settings, Trial, build

NAMES = ['repnext_m0', 'repvit_m0_9', 'resnet18']


@pytest.fixture(scope='module')
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('result') / 'result.json'
    command = ['throughput', *NAMES, '--size', '64', '--rounds', '2', '--budget-s', '5']
    assert main([*command, '--json', str(path)]) == 0
    return path


@pytest.mark.slow
def test_what_a_result_has(result: Path) -> None:
    content = json.loads(result.read_text())
    rows = content['comparison']['rows']
    assert [row['variant'] for row in rows] == NAMES
    for row in rows:
        assert math.log2(row['batch']).is_integer()
        assert row['images_per_s'] == pytest.approx(1e3 / row['ms_per_image'])
        assert row['layout'] in throughput.LAYOUTS
    first, second = rows[:2]
    assert first['ratio_per_image'] == 1
    scale = first['batch'] / second['batch']
    assert second['ratio_per_image'] == pytest.approx(second['ratio'] * scale)
    assert content['settings']['size'] == [64, 64] and content['environment']['versions']['timm']


@pytest.mark.parametrize('name', ['repnext_m0', 'recnext_m0', 'repvit_m0_9', 'mobileone_s0'])
def test_what_is_timed_is_fused(name: str) -> None:
    model = build(name)
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    assert norms == 0 if name.startswith('re') and 'vit' not in name else norms <= 2


def test_feature_maps() -> None:
    for name in ('repnext_m0', 'resnet18'):
        with torch.no_grad():
            outs = build(name, features=True)(torch.zeros(1, 3, 64, 64))
        assert [out.shape[2] for out in outs] == [16, 8, 4, 2]


def test_a_fusion_that_changes_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(2)

    monkeypatch.setattr(throughput, 'fold_convolution_norms', spoil)
    with pytest.raises(ValueError, match='fusing resnet18 changed its outputs'):
        build('resnet18')


@pytest.mark.parametrize(
    'device, seconds, batch',
    [
        ('cpu', {1: 1.0, 2: 0.8, 4: 0.7, 8: 0.69, 16: 0.1}, 4),
        ('cpu', {1: 1.0, 2: 1.2}, 1),
        ('cuda', {1: 1.0, 2: 1.1, 4: 0.9, 8: math.inf}, 4),
    ],
)
def test_the_batch(
    device: str, seconds: dict[int, float], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU until doubling gains nothing, on a GPU the largest that fits."""
    trial = Trial.__new__(Trial)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    trial.settings = Settings(device=device)
    monkeypatch.setattr(Trial, 'seconds', lambda self, count: seconds[count])
    assert trial.best_batch() == (batch, seconds[batch])


@pytest.mark.slow
def test_with_and_without_amp_and_compile(tmp_path: Path) -> None:
    """In turns: rows of one comparison."""
    path = tmp_path / 'x.json'
    command = ['throughput', 'test_resnet', '--size', '32', '--batch', '2', '--rounds', '2']
    more = ['--amp', 'bfloat16', '--compile', '--layouts', 'contiguous', '--budget-s', '5']
    assert main([*command, *more, '--json', str(path)]) == 0
    rows = json.loads(path.read_text())['comparison']['rows']
    assert [row['variant'] for row in rows] == [
        'test_resnet',
        'test_resnet/compile',
        'test_resnet/bfloat16',
        'test_resnet/bfloat16/compile',
    ]


@pytest.mark.slow
def test_the_picture(result: Path, tmp_path: Path) -> None:
    out = tmp_path / 'x.png'
    assert main(['picture', str(result), '--out', str(out)]) == 0
    pixels = np.asarray(Image.open(out).convert('RGB'))
    assert pixels.std() > 10 and pixels.shape[1] > 600
    points = accuracy_picture.points(json.loads(result.read_text()), 'top1')
    assert set(points) == {'repnext_m0', 'repvit_m0_9'}, 'no figure of resnet18 is known'
    assert points['repnext_m0'][1] == 74.2 and points['repvit_m0_9'][1] == 78.7
    assert accuracy_picture.accuracy('repnext_m4', 'box_AP') == 42.9
    assert accuracy_picture.accuracy('repnext_m0e', 'top1') is None, 'of another recipe'
    assert accuracy_picture.accuracy('repnext_m0e', 'top1_starnet') == 75.6
    assert accuracy_picture.accuracy('repnext_m0', 'top1_starnet') == 75.4
    assert accuracy_picture.accuracy('repvit_m1_5', 'box_AP') == 41.6


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['throughput', 'repnxt_m0'], "timm has no model 'repnxt_m0'; did you mean repnext_m0?"),
        (['throughput', 'repnext_m0', '--batch', '0'], 'batch=0 must be at least 1'),
        (
            ['throughput', 'efficientformerv2_s0', '--size', '64', '--features'],
            'efficientformerv2_s0 cannot compute 64x64',
        ),
        (['throughput', 'repnext_m0', '--threads', '0'], '--threads 0 must be at least 1'),
        (['picture', 'none.json', '--out', 'x.png'], 'none.json is no result of benchmark'),
    ],
)
def test_wrong_input(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert said in capsys.readouterr().err

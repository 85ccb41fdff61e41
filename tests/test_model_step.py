"""`repnext-mm benchmark model-step`: training steps of complete models. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repnext_mm.measure import training
from repnext_mm.measure.cli import main

QUICK = ['--size', '64x96', '--batch', '1', '--rounds', '2', '--budget-s', '1', '--threads', '1']


def test_settings_of_a_process_reach_its_steps(tmp_path: Path) -> None:
    path = tmp_path / 'result.json'
    variants = ['branches', 'merged/keep_memory']
    command = ['model-step', 'mask_rcnn_repnext_m0_coco', *QUICK, '--variants', *variants]
    assert main([*command, '--profile', '--json', str(path)]) == 0
    content = json.loads(path.read_text())
    assert content['environment']['threads'] == 1
    [result] = content['comparisons']
    assert result['subject'] == 'mask_rcnn_repnext_m0_coco, training step'
    assert result['shape'] == [1, 3, 64, 96]
    assert [row['variant'] for row in result['rows']] == variants
    # Optimizer, losses and the backward pass are part of a step; so is a detector's RoIAlign.
    operators = {name: {e['operator'] for e in result['profiles'][name]} for name in variants}
    for found in operators.values():
        assert {'torchvision::_roi_align_backward', 'aten::convolution_backward'} <= found
        assert any('addcdiv' in name or 'adamw' in name.lower() for name in found)
    # The fast form adds branches up inside of functions of its own.
    assert operators['branches'] != operators['merged/keep_memory']


def test_a_segmentor_is_timed_too(capsys: pytest.CaptureFixture[str]) -> None:
    command = ['model-step', 'semantic_fpn_repnext_m0_ade20k', *QUICK, '--amp', 'bfloat16']
    variants = ['merged', 'merged/channels_last']
    assert main([*command, '--variants', *variants, '--json', '-']) == 0
    content = json.loads(capsys.readouterr().out)
    [result] = content['comparisons']
    assert [row['variant'] for row in result['rows']] == variants
    assert content['settings']['dtype'] == 'bfloat16'


def test_what_cannot_be_timed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / 'backbone.py'
    config.write_text("model = dict(type='RepNeXt', arch='m0')\n")
    assert main(['model-step', str(config), *QUICK, '--variants', 'merged']) == 2
    assert 'contains no detector or segmentor' in capsys.readouterr().err
    with pytest.raises(ValueError, match="'fused' is not one of branches, merged"):
        training.run('mask_rcnn_repnext_m0_coco', ['fused'], training.Settings())
    with pytest.raises(ValueError, match="'compile' is not one of keep_memory, channels_last"):
        training.run('mask_rcnn_repnext_m0_coco', ['merged/compile'], training.Settings())
    with pytest.raises(ValueError, match='batch=0'):
        training.Settings(batch=0)

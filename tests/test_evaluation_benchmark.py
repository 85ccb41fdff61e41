"""`repnext-mm benchmark evaluation`: both metrics have the same values. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repnext_mm.evaluation.coco import FastCocoMetric
from repnext_mm.measure import evaluation
from repnext_mm.measure.cli import main
from repnext_mm.measure.rounds import Schedule

COMMAND = ['evaluation', '--images', '8', '--results', '20', '--rounds', '2', '--budget-s', '1']


def test_result_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'result.json'
    assert main([*COMMAND, '--json', str(path)]) == 0
    content = json.loads(path.read_text())
    names = [row['variant'] for row in content['comparison']['rows']]
    assert names == ['mmdet CocoMetric', 'FastCocoMetric']
    assert 0.1 < content['values']['bbox_mAP'] < 0.9
    assert 0.1 < content['values']['segm_mAP'] < 0.9
    assert content['environment']['versions']['faster-coco-eval']
    assert '8 images of 20 results' in capsys.readouterr().out


def test_other_values_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, results: Any) -> dict[str, float]:
        return {'bbox_mAP': 1.0}

    monkeypatch.setattr(FastCocoMetric, 'compute_metrics', wrong)
    settings = evaluation.Settings(2, 3, 1, Schedule(rounds=2, budget_s=1))
    with pytest.raises(ValueError, match='please report this'):
        evaluation.run(settings)


def test_settings_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['evaluation', '--images', '0']) != 0
    assert 'must be at least 1' in capsys.readouterr().err

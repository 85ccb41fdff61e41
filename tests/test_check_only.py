"""`--check-only` and `--no-check`: the checks alone with their report, and a run without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tool_runs
from tool_runs import CONFIGS, FOLDERS, options, run_here

from repnext_mm.engine.cli import evaluate_main, train_main

pytestmark = pytest.mark.compat


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes', train=8)


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_report_of_good_data(task: str, shapes: Path, tmp_path: Path) -> None:
    done = run_here(train_main, CONFIGS[task], '--check-only', *options(task, shapes), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob('*.pth'))
    (report,) = (tmp_path / 'work_dirs').rglob('preflight_*.json')
    content = json.loads(report.read_text())
    assert [(part['split'], part['images']) for part in content['data']] == [
        ('train', 8),
        ('val', 2),
    ]
    assert all(part['classes'] for part in content['data'])
    assert content['data'][0]['batch_size'] == 4
    assert f'Wrote {report.relative_to(tmp_path)}.' in done.stdout
    assert 'AdamW' in content['schedule']
    for part in content['data']:
        assert any(
            line.split()[:3] == [part['split'], part['data_set'], str(part['images'])]
            for line in done.stdout.splitlines()
        )


def test_report_of_data_that_is_refused(shapes: Path, tmp_path: Path) -> None:
    path = tmp_path / 'val.json'
    source = shapes / FOLDERS['det'] / 'annotations' / 'instances_val2017.json'
    content = json.loads(source.read_text())
    content['categories'].reverse()
    path.write_text(json.dumps(content))
    moved = [f'{part}.ann_file={path}' for part in ('val_dataloader.dataset', 'val_evaluator')]
    arguments = options('det', shapes, *moved)
    done = run_here(train_main, CONFIGS['det'], '--check-only', *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert str(path) in done.stderr.splitlines()[-1]
    (report,) = (tmp_path / 'work_dirs').rglob('preflight_*.json')
    (finding,) = json.loads(report.read_text())['findings']
    assert finding['level'] == 'error'
    assert str(path) in finding['sentence']
    few = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9']
    done = run_here(train_main, CONFIGS['det'], '--no-check', *arguments, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_completed_file_is_what_the_run_reads(shapes: Path, tmp_path: Path) -> None:
    """Training and its evaluation read the copy; the config that is kept names the original."""
    paths = {}
    for split in ('train', 'val'):
        source = shapes / FOLDERS['det'] / 'annotations' / f'instances_{split}2017.json'
        content = json.loads(source.read_text())
        for annotation in content['annotations']:
            annotation.pop('area')
            annotation['id'] -= 1
        paths[split] = tmp_path / f'{split}.json'
        paths[split].write_text(json.dumps(content))
    moved = [
        f'train_dataloader.dataset.ann_file={paths["train"]}',
        f'val_dataloader.dataset.ann_file={paths["val"]}',
        f'val_evaluator.ann_file={paths["val"]}',
        f'test_dataloader.dataset.ann_file={paths["val"]}',
        f'test_evaluator.ann_file={paths["val"]}',
    ]
    arguments = options('det', shapes, *moved)
    done = run_here(train_main, CONFIGS['det'], '--epochs', 1, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'completed' in done.stderr
    folder = tmp_path / 'work_dirs' / CONFIGS['det'].stem
    assert str(paths['train']) in (folder / CONFIGS['det'].name).read_text()
    checkpoint = folder / 'epoch_1.pth'
    done = run_here(evaluate_main, CONFIGS['det'], checkpoint, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

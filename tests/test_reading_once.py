"""Every command opens a weight file once, whatever it needs from it, its SHA-256 included."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from conftest import randomise
from evaluations import Trained, trained
from mmengine.runner import CheckpointLoader

from repnext_mm import RepNeXt, reparameterize
from repnext_mm.checkpoints import load_pretrained, read_run
from repnext_mm.checkpoints.__main__ import main as describe
from repnext_mm.checkpoints.runs import passed_on
from repnext_mm.deploy.cli import deploy_main
from repnext_mm.deploy.whole_model import save_whole_model
from repnext_mm.engine.cli import train_main

#: Paths that were opened, where somebody counts them. An audit hook cannot be removed again.
_opened: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == 'open' and _opened:
        _opened[-1].append(str(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def opened_once(path: Path) -> Iterator[None]:
    _opened.append([])
    try:
        yield
        assert _opened[-1].count(str(path)) == 1
    finally:
        _opened.pop()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'm0.pth'
    torch.save({'model': randomise(RepNeXt('m0')).state_dict()}, path)
    return path


def exports(*arguments: str) -> Callable[[Path], None]:
    def deploy(path: Path) -> None:
        folder = path.parent / 'out'
        given = [a.format(path) for a in arguments]
        options = ['--format', 'pth', '--size', '64', '--work-dir', str(folder), '--parity', 'off']
        assert deploy_main([*given, *options]) == 0
        recorded = json.loads((folder / 'report.json').read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _opened[-1].remove(str(path))  # by the line above
        assert digest in json.dumps(recorded)

    return deploy


@pytest.mark.parametrize(
    'command',
    [
        lambda path: load_pretrained(RepNeXt('m0'), path),
        lambda path: load_pretrained(RepNeXt('m0', deploy=True), path),
        lambda path: describe([str(path)]),
        exports('repnext_m0', '{}'),
        exports('{}'),
    ],
    ids=['load', 'load fused', 'describe', 'deploy a network', 'deploy a file'],
)
def test_weights(command: Callable[[Path], Any], file: Path) -> None:
    with opened_once(file):
        command(file)


def test_a_fused_file(tmp_path: Path) -> None:
    path = tmp_path / 'fused.pth'
    torch.save(reparameterize(randomise(RepNeXt('m0')).eval()).state_dict(), path)
    with opened_once(path):
        exports('{}')(path)


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp('model')
    data = tool_runs.tiny_shapes(root / 'shapes')
    return trained('seg', root / 'seg', tool_runs.options('seg', data))


@pytest.mark.compat
@pytest.mark.slow
def test_checkpoints_of_runs(model: Trained, tmp_path: Path) -> None:
    """Evaluated, with an exported backbone too; fused; trained from; continued from."""
    with opened_once(model.checkpoint):
        assert model.evaluate().metric > 0
    folder = tmp_path / 'out'
    options = ['--format', 'pth', '--size', '64', '--work-dir', str(folder), '--parity', 'off']
    options += ['--scope', 'backbone']
    assert deploy_main([str(model.config), str(model.checkpoint), *options]) == 0
    [artifact] = folder.glob('*.pth')
    with opened_once(model.checkpoint):
        assert model.evaluate('--backbone', artifact).metric > 0
    with opened_once(model.checkpoint):
        save_whole_model(model.config, model.checkpoint, tmp_path / 'whole')

    steps = ['train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1']
    start = f'load_from={model.checkpoint}'
    with opened_once(model.checkpoint):
        tool_runs.succeed_here(
            train_main, model.config, *model.options, *steps, start, cwd=tmp_path
        )
    [saved] = tmp_path.rglob('iter_1.pth')
    steps[0] = 'train_cfg.max_iters=2'
    resume = ['--resume', saved]
    with opened_once(saved):
        tool_runs.succeed_here(
            train_main, model.config, *resume, *model.options, *steps, cwd=tmp_path
        )
    assert list(tmp_path.rglob('iter_2.pth'))


def test_a_run_does_not_keep_what_it_started_from(file: Path) -> None:
    checkpoint = read_run(file)
    tensor = weakref.ref(next(iter(checkpoint.content['model'].values())))
    with passed_on(checkpoint):
        loaded = CheckpointLoader.load_checkpoint(str(file))
        assert next(iter(loaded['model'].values())) is tensor()
        del loaded
        gc.collect()
        assert tensor() is None
        again = CheckpointLoader.load_checkpoint(str(file))
        assert again['model'].keys() == RepNeXt('m0').state_dict().keys()
    assert checkpoint.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def read_twice(path: Path) -> None:
    with opened_once(path):
        path.read_bytes()
        path.read_bytes()


def test_a_second_reader_is_noticed(file: Path) -> None:
    with pytest.raises(AssertionError):
        read_twice(file)

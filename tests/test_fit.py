"""Whether a checkpoint of a run is that of the model that it is loaded into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from evaluations import Trained, trained
from torch import nn

from repnext_mm.deploy.errors import ModelError
from repnext_mm.deploy.whole_model import save_whole_model
from repnext_mm.engine.cli import evaluate_main, train_main
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.resume import require_fit

State = dict[str, torch.Tensor]


def network(classes: int = 3) -> nn.Module:
    return nn.ModuleDict(
        {
            'backbone': nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
            'neck': nn.Conv2d(8, 8, 1),
            'head': nn.Conv2d(8, classes, 1),
        }
    )


def without(state: State, end: str) -> State:
    return {key: value for key, value in state.items() if not key.endswith(end)}


@pytest.mark.parametrize(
    'change',
    [
        lambda state: state,
        lambda state: without(state, 'num_batches_tracked'),
        lambda state: {f'module.{key}': value for key, value in state.items()},
        lambda state: state | {'ema.extra': torch.zeros(1)},
    ],
    ids=['same', 'no counters', 'DDP', 'more'],
)
def test_a_checkpoint_of_the_model_fits(change: Callable[[State], State]) -> None:
    state = change(network().state_dict())
    assert 'Loading 12 of the 12 entries' in require_fit(network(), {'state_dict': state}, 'a.pth')


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda s: network(4).state_dict(), ['10 of the 12', 'head.weight (3, 8', '(4, 8']),
        (lambda s: without(s, 'neck.bias'), ['11 of the 12', 'neck.bias (8,)', 'missing']),
        (lambda s: {f'model.{k}': v for k, v in s.items()}, ["the model is in it under 'model.'"]),
        (
            lambda s: {f'module._orig_mod.{k}': v for k, v in s.items()},
            ["the model is in it under '_orig_mod.'"],
        ),
        (lambda s: {'model': s}, ["the model is in it under 'model.'"]),
        (
            lambda s: {k[9:]: v for k, v in s.items() if k.startswith('backbone.')},
            ['0 of the 12', 'the backbone is in it alone'],
        ),
        (
            lambda s: s | {'head.bias': torch.full((3,), torch.nan)},
            ['NaN or infinity in head.bias'],
        ),
        (
            lambda s: s | {'neck.bias': torch.full((8,), torch.inf)},
            ['NaN or infinity in neck.bias'],
        ),
    ],
    ids=[
        'classes',
        'one entry',
        'prefix',
        'compiled',
        'nested',
        'backbone alone',
        'NaN',
        'infinity',
    ],
)
def test_every_entry_must_fit(change: Callable[[State], State], words: list[str]) -> None:
    state = change(network().state_dict())
    with pytest.raises(UserError) as caught:
        require_fit(network(), {'state_dict': state}, 'a.pth')
    assert all(word in str(caught.value) for word in ('a.pth', *words)), caught.value


def test_a_start_from_other_classes_is_counted() -> None:
    line = require_fit(network(), {'state_dict': network(4).state_dict()}, 'a.pth', least=0.5)
    assert line == (
        'Loading 10 of the 12 entries of the model from a.pth; left out, as they differ: head.'
    )


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp('model')
    data = tool_runs.tiny_shapes(root / 'shapes')
    return trained('seg', root / 'seg', tool_runs.options('seg', data))


def changed(model: Trained, path: Path, change: Callable[[State], State]) -> Path:
    content = torch.load(model.checkpoint, weights_only=True)
    torch.save(content | {'state_dict': change(content['state_dict'])}, path)
    return path


def other_classes(state: State) -> State:
    return {k: v[:-1] if 'decode_head.conv_seg' in k else v for k, v in state.items()}


def diverged(state: State) -> State:
    return {k: v * torch.nan if 'conv_seg.bias' in k else v for k, v in state.items()}


def run(tool: Callable, model: Trained, *arguments: Any, cwd: Path) -> tuple[int, str]:
    done = tool_runs.run_here(tool, model.config, *arguments, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.compat
@pytest.mark.slow
def test_the_tools_refuse_what_would_be_loaded_in_part(model: Trained, tmp_path: Path) -> None:
    heads = changed(model, tmp_path / 'heads.pth', other_classes)
    nan = changed(model, tmp_path / 'nan.pth', diverged)
    alone = changed(
        model,
        tmp_path / 'alone.pth',
        lambda state: {k[9:]: v for k, v in state.items() if k.startswith('backbone.')},
    )
    for path, words in (
        (heads, 'decode_head.conv_seg.weight'),
        (nan, 'NaN or infinity in decode_head.conv_seg.bias'),
        (alone, 'the backbone is in it alone'),
    ):
        code, output = run(evaluate_main, model, path, *model.options, cwd=tmp_path)
        assert (code, words in output) == (1, True), output
        with pytest.raises(ModelError, match=words):
            save_whole_model(model.config, path, tmp_path / 'out')
    steps = [*model.options, 'train_cfg.max_iters=1']
    for path in (nan, alone):
        code, output = run(train_main, model, *steps, f'load_from={path}', cwd=tmp_path)
        assert (code, str(path) in output) == (1, True), output
    fused, _ = save_whole_model(model.config, model.checkpoint, tmp_path / 'fused')
    code, output = run(train_main, model, *steps, f'load_from={fused}', cwd=tmp_path)
    assert (code, "fused with plan 'full'" in output) == (1, True), output
    code, output = run(train_main, model, *steps, f'load_from={heads}', cwd=tmp_path)
    assert code == 0, output
    assert f'entries of the model from {heads}' in output

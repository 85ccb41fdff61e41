"""A checkpoint of another run than the one that reads it: classes, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from repnext_mm.deploy.errors import ModelError
from repnext_mm.deploy.source import load_source
from repnext_mm.deploy.whole_model import save_whole_model
from repnext_mm.engine.cli import evaluate_main, train_main
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.literals import assigned, literal
from repnext_mm.engine.stored import (
    checkpoints_classes,
    config_classes,
    require_classes,
    require_optimizer,
    resume_note,
)

SHAPES = ('disc', 'ring', 'square', 'triangle', 'star', 'sky', 'ground')
SWAPPED = ('ring', 'disc', *SHAPES[2:])


# --- classes


@pytest.mark.parametrize(
    'meta, classes',
    [
        ({'dataset_meta': {'classes': ('a', 'b')}}, ('a', 'b')),
        ({'dataset_meta': {'CLASSES': ['a', 'b ']}}, ('a', 'b')),
        ({'CLASSES': ('a', 'b')}, ('a', 'b')),
        ({'CLASSES': 'person'}, ('person',)),
        ({'dataset_meta': {}}, None),
        ({'dataset_meta': None}, None),
        ({'dataset_meta': {'classes': None}}, None),
        ({'dataset_meta': {'classes': [1, 2]}}, None),
        ('text', None),
    ],
)
def test_where_a_checkpoint_names_its_classes(meta: Any, classes: tuple | None) -> None:
    assert checkpoints_classes({'meta': meta}) == classes
    assert checkpoints_classes({'state_dict': {}}) is None


@pytest.mark.parametrize(
    'classes, given',
    [
        (('b', 'a'), ["class 0 is 'a' in the checkpoint and 'b' in the config", 'another order']),
        (('a', 'c'), ["'b' in the checkpoint and 'c'"]),
        (('a',), ['2 classes (a, b)', '1 (a)']),
        (('a', 'b', 'c'), ['2 classes', '3 (a, b, c)']),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], given: list[str]) -> None:
    content = {'meta': {'dataset_meta': {'classes': ('a', 'b')}}}
    with pytest.raises(UserError) as caught:
        require_classes(content, classes, 'x.pth')
    assert all(words in str(caught.value) for words in ['x.pth', *given])
    require_classes(content, ('a', 'b'), 'x.pth')
    require_classes(content, None, 'x.pth')
    require_classes({'meta': {}}, classes, 'x.pth')


def test_classes_of_a_config() -> None:
    dataset = dict(type='CocoDataset', metainfo=dict(classes=('a',)))
    nested = dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dataset]))
    assert config_classes(Config(dict(test_dataloader=dict(dataset=nested)))) == ('a',)
    assert config_classes(Config(dict(test_dataloader=None))) is None


# --- the optimizer


def state_of(kind: type, model: nn.Module, **settings: Any) -> dict:
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def network(width: int = 3, layers: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), *(nn.Linear(width, width) for _ in range(layers)))


@pytest.mark.parametrize(
    'kind, settings, model, given',
    [
        (torch.optim.SGD, {'momentum': 0.9}, network(), ['momentum', 'AdamW', 'betas']),
        (torch.optim.AdamW, {}, network(layers=2), ['6 parameters', '4']),
        (torch.optim.AdamW, {}, network(width=5), ['(5, 4)', '(3, 4)']),
    ],
    ids=['type', 'number', 'shape'],
)
def test_the_state_of_another_optimizer_is_refused(
    kind: type, settings: dict, model: nn.Module, given: list[str]
) -> None:
    wrapper = OptimWrapper(torch.optim.AdamW(network().parameters()))
    content = {'optimizer': state_of(kind, model, **settings)}
    with pytest.raises(UserError) as caught:
        require_optimizer(content, wrapper, Config({}), 'x.pth')
    assert all(words in str(caught.value) for words in ['x.pth', *given]), caught.value
    right = {'optimizer': state_of(torch.optim.AdamW, network())}
    require_optimizer(right, wrapper, Config({}), 'x.pth')

    text = "optim_wrapper = dict(optimizer=dict(lr=0.1, type='Adam'), type='OptimWrapper')"
    own = Config(dict(optim_wrapper=dict(optimizer=dict(type='AdamW'))))
    with pytest.raises(UserError, match=r'Adam .*AdamW'):
        require_optimizer(right | {'meta': {'cfg': text}}, wrapper, own, 'x.pth')


def test_what_stays_on_resuming_is_said() -> None:
    stored = Config(
        dict(
            train_cfg=dict(max_epochs=12),
            param_scheduler=[dict(type='MultiStepLR', milestones=[8, 11])],
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4, fused=True)),
        )
    )
    content = {'meta': {'cfg': stored.pretty_text}}
    assert resume_note(content, stored) is None
    assert resume_note({'meta': {}}, stored) is None
    changed = {
        'train_cfg.max_epochs': 24,
        'param_scheduler.0.milestones': [16, 22],
        'optim_wrapper.optimizer.lr': 2e-4,
        'optim_wrapper.optimizer.fused': False,
    }
    now = Config(stored.to_dict())
    now.merge_from_dict(changed)
    line = resume_note(content, now)
    for words in (
        '[8, 11] (config: [16, 22])',
        'lr 0.0001 (config: 0.0002)',
        '24 (checkpoint: 12)',
    ):
        assert words in line
    assert 'fused' not in line


# --- texts of configs


@pytest.mark.parametrize(
    'text, value',
    [
        ("dict(type='X', a=-1, b=[1, (2, None)])", {'type': 'X', 'a': -1, 'b': [1, (2, None)]}),
        ("{'a': {'b': 1e-3}}", {'a': {'b': 1e-3}}),
        ('[dict(a=True), {}]', [{'a': True}, {}]),
    ],
)
def test_literals(text: str, value: Any) -> None:
    assert literal(text) == value
    assert assigned(f'x = 1\ny = {text}\nimport os', ['y']) == {'y': value}


@pytest.mark.parametrize(
    'text',
    [
        "__import__('os').system('true')",
        'dict(a=open("/etc/passwd"))',
        'dict(**{})',
        'dict(1)',
        '{1: 2}',
        'dict(a=',
        '(' * 5000,
        '[' * 60 + ']' * 60 + '.x',
        "dict(a='x' * 10**9)",
        '',
    ],
)
def test_what_is_no_literal_is_refused_and_not_run(text: str) -> None:
    with pytest.raises(ValueError, match=r'literal|keys|malformed'):
        literal(text)
    assert assigned(f'y = {text}', ['y']) == {}


# --- the tools


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes')


@pytest.fixture(scope='module')
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, averaged weights included."""
    folder = tmp_path_factory.mktemp('run')
    config = folder / 'run.py'
    config.write_text(
        f'_base_ = {str(tool_runs.CONFIGS["seg"])!r}\ncustom_hooks = [dict(type="EMAHook")]\n'
    )
    options = tool_runs.options('seg', data)
    tool_runs.succeed_here(
        train_main, config, '--iters', 2, '--work-dir', folder / 'run', *options, cwd=folder
    )
    return folder / 'run' / 'iter_2.pth'


@pytest.fixture
def fails(trained: Path, data: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a tool with the trained run's config and more settings; returns its one sentence."""

    def run(tool: Callable, *arguments: Any, settings: tuple[str, ...] = ()) -> str:
        options = [*tool_runs.options('seg', data), *settings]
        done = tool_runs.run_here(
            tool, trained.with_name('run.py'), *arguments, *options, cwd=tmp_path
        )
        assert done.returncode == 1, done.stdout
        lines = [line for line in done.stderr.splitlines() if line.startswith('error')]
        assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
        return lines[0]

    return run


def classes(names: tuple[str, ...], *splits: str) -> tuple[str, ...]:
    return tuple(f'{split}_dataloader.dataset.metainfo.classes={names}' for split in splits)


@pytest.mark.compat
@pytest.mark.slow
def test_the_tools_refuse_classes_in_another_order(
    fails: Callable[..., str], trained: Path, data: Path, tmp_path: Path
) -> None:
    there = "class 0 is 'disc' in the checkpoint and 'ring' in the config"
    assert there in fails(evaluate_main, trained, settings=classes(SWAPPED, 'test'))
    swapped = classes(SWAPPED, 'train', 'val', 'test')
    assert there in fails(train_main, '--resume', trained, '--iters', 3, settings=swapped)

    options = [*tool_runs.options('seg', data), *swapped, f'load_from={trained}']
    output = tool_runs.succeed_here(
        train_main, tool_runs.CONFIGS['seg'], '--iters', 1, *options, cwd=tmp_path
    )
    assert f'warning: {trained}' in output and there in output

    config = tmp_path / 'swapped.py'
    config.write_text(
        f'_base_ = {str(trained.with_name("run.py"))!r}\n'
        f'test_dataloader = dict(dataset=dict(metainfo=dict(classes={SWAPPED!r})))\n'
    )
    # A refused run does not replace the config beside the checkpoint.
    with pytest.raises(ModelError, match='class 0'):
        save_whole_model(config, trained, tmp_path / 'out')
    with pytest.raises(ModelError, match='class 0'):
        load_source(str(config), str(trained))
    assert load_source(str(trained.with_name('run.py')), str(trained)).weights == 'checkpoint'


@pytest.mark.compat
@pytest.mark.slow
def test_resuming_with_another_optimizer(fails: Callable[..., str], trained: Path) -> None:
    sgd = "optim_wrapper.optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9)"
    sentence = fails(train_main, '--resume', trained, '--iters', 3, settings=(sgd,))
    assert 'AdamW' in sentence and 'SGD' in sentence and f'load_from={trained}' in sentence


@pytest.mark.compat
@pytest.mark.slow
def test_a_stored_config_is_not_run(trained: Path, data: Path, tmp_path: Path) -> None:
    """mmengine runs the text under meta.config, for a check that mmengine's files do not need."""
    content = torch.load(trained, weights_only=True)
    content['meta']['config'] = f'open({str(tmp_path / "ran")!r}, "w")\na = 1\n'
    content['meta']['cfg'] += f'\ntrain_cfg = open({str(tmp_path / "ran")!r}, "w")\n'
    torch.save(content, tmp_path / 'iter_2.pth')
    tool_runs.succeed_here(
        train_main, trained.with_name('run.py'), '--resume', 'iter_2.pth', '--iters', 3,
        '--work-dir', 'on', *tool_runs.options('seg', data), cwd=tmp_path,
    )  # fmt: skip
    assert not (tmp_path / 'ran').exists()


@pytest.mark.compat
@pytest.mark.slow
def test_averaged_weights_that_are_no_numbers(
    fails: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    content = torch.load(trained, weights_only=True)
    key = 'module.decode_head.conv_seg.bias'
    content['ema_state_dict'][key] = content['ema_state_dict'][key] * torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    sentence = fails(train_main, '--resume', tmp_path / 'nan.pth', '--iters', 3)
    assert 'decode_head.conv_seg.bias' in sentence

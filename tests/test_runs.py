"""Runs that go wrong, are ended, or follow each other: nothing is lost and nothing passes."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tool_runs import CONFIGS, options, run_here, start, succeed_here

from repnext_mm.engine.cli import evaluate_main, train_main
from repnext_mm.engine.config_file import load_config
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.rescue import no_ground_truth
from repnext_mm.engine.resume import other_classes, require_optimizer
from repnext_mm.engine.run_folder import LOCK
from repnext_mm.engine.schedule import batch_hint, set_length

FEW = [
    'train_cfg.val_interval=99',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=2',
]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes', train=8)


@pytest.fixture(scope='module')
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work dir with the checkpoints of four iterations."""
    folder = tmp_path_factory.mktemp('trained')
    succeed_here(
        train_main, CONFIGS['seg'], '--iters', 4, *options('seg', shapes, *FEW), cwd=folder
    )
    return folder / 'work_dirs' / CONFIGS['seg'].stem


def train(shapes: Path, cwd: Path, *args: Any, settings: list[str] | None = None) -> Any:
    return run_here(
        train_main, CONFIGS['seg'], *args, *options('seg', shapes, *FEW, *(settings or [])), cwd=cwd
    )


def evaluate(shapes: Path, cwd: Path, *args: Any, settings: list[str] | None = None) -> Any:
    return run_here(
        evaluate_main, CONFIGS['seg'], *args, *options('seg', shapes, *(settings or [])), cwd=cwd
    )


# --- numbers


@pytest.mark.compat
def test_training_stops_at_a_loss_that_is_no_number(shapes: Path, tmp_path: Path) -> None:
    rate = ['optim_wrapper.optimizer.lr=1e12', 'param_scheduler=None']
    done = train(shapes, tmp_path, '--iters', 8, settings=rate)
    assert done.returncode == 1
    error = done.stderr
    last = error.splitlines()[-1]
    assert re.search(r'loss=(nan|inf).* in iteration \d .*lr 1000000000000\.0', last), last
    assert 'Traceback' not in error
    for path in tmp_path.rglob('*.pth'):
        state = torch.load(path, weights_only=True)['state_dict']
        assert all(torch.isfinite(v).all() for v in state.values())


@HOOKS.register_module(force=True)
class SpoilWeights(Hook):
    """Makes a weight NaN after iteration 1, where the loss was still finite."""

    def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        if runner.iter == 1:
            next(runner.model.parameters()).data.fill_(float('nan'))


@pytest.mark.compat
def test_weights_that_are_no_numbers_are_not_saved(shapes: Path, tmp_path: Path) -> None:
    hook = ["custom_hooks=[dict(type='SpoilWeights',priority='HIGHEST')]"]
    done = train(shapes, tmp_path, '--iters', 4, settings=hook)
    assert done.returncode == 1
    assert 'no checkpoint is written' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob('*.pth'))


def spoiled(trained: Path, tmp_path: Path, part: str) -> Path:
    content = torch.load(trained / 'iter_4.pth', weights_only=True)
    if part == 'state_dict':
        next(iter(content['state_dict'].values())).fill_(float('inf'))
    else:
        state = content['optimizer']['state'][0]
        next(v for v in state.values() if v.dim()).fill_(float('nan'))
    torch.save(content, tmp_path / 'iter_4.pth')
    return tmp_path / 'iter_4.pth'


@pytest.mark.compat
@pytest.mark.parametrize('part', ['state_dict', 'optimizer'])
def test_nothing_continues_from_numbers_that_are_none(
    part: str, shapes: Path, trained: Path, tmp_path: Path
) -> None:
    path = spoiled(trained, tmp_path, part)
    done = train(shapes, tmp_path, '--iters', 6, '--resume', path)
    assert done.returncode == 1
    assert f'{path} has NaN or infinity' in done.stderr.splitlines()[-1]
    if part == 'state_dict':
        assert evaluate(shapes, tmp_path, path).returncode == 1


@pytest.mark.parametrize(
    'metrics, value',
    [
        ({'coco/bbox_mAP': -1.0, 'coco/bbox_mAP_s': -1.0}, 'coco/bbox_mAP=-1'),
        ({'mIoU': float('nan'), 'aAcc': float('nan')}, 'mIoU=nan'),
        ({'coco/bbox_mAP': 0.0, 'coco/bbox_mAP_l': -1.0}, None),
        ({'mIoU': 30.0}, None),
        ({}, None),
    ],
)
def test_metric_without_ground_truth(metrics: dict[str, float], value: str | None) -> None:
    sentence = no_ground_truth(metrics)
    assert (value in sentence) if value else sentence is None


# --- the length of a run


def length_of(config: str, epochs: int | None, iters: int | None, **settings: Any) -> Config:
    cfg = load_config(config, settings, None, 'none')
    set_length(cfg, epochs, iters)
    return cfg


def test_everything_follows_the_length_in_epochs() -> None:
    cfg = length_of('mask_rcnn_repnext_m4_coco', 3, None)
    warm_up, steps = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == 3
    assert steps.milestones == [2, 3] or steps.milestones == [2]
    assert warm_up.end == 125  # 500 of 12 epochs
    assert steps.end == 3


def test_everything_follows_the_length_in_iterations() -> None:
    cfg = length_of('semantic_fpn_repnext_m4_ade20k', None, 800)
    assert cfg.train_cfg.max_iters == 800
    assert cfg.train_cfg.val_interval <= 800
    assert cfg.default_hooks.checkpoint.interval <= 800
    assert {s.get('end') for s in cfg.param_scheduler} == {800}


@pytest.mark.parametrize(
    'config, epochs, iters, value',
    [
        ('mask_rcnn_repnext_m4_coco', None, 100, '--iters 100'),
        ('semantic_fpn_repnext_m4_ade20k', 3, None, '--epochs 3'),
        ('mask_rcnn_repnext_m4_coco', 0, None, '0'),
    ],
)
def test_length_that_does_not_fit(
    config: str, epochs: int | None, iters: int | None, value: str
) -> None:
    with pytest.raises(UserError, match=value):
        length_of(config, epochs, iters)


@pytest.mark.compat
def test_schedule_that_does_not_fit_the_run(shapes: Path, tmp_path: Path) -> None:
    schedule = (
        "param_scheduler=[dict(type='LinearLR',start_factor=0.1,by_epoch=False,begin=0,end=3),"
        "dict(type='MultiStepLR',by_epoch=False,milestones=[2,9])]"
    )
    done = train(shapes, tmp_path, '--check-only', settings=['train_cfg.max_iters=4', schedule])
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith('warning: ')]
    assert any('LinearLR lasts until 3' in note for note in notes), done.stdout
    assert any('never reaches the milestones [9]' in note for note in notes)
    assert not list(tmp_path.rglob('*.pth'))
    report = next((tmp_path / 'work_dirs').rglob('preflight_*.json'))
    content = json.loads(report.read_text())
    assert [part['split'] for part in content['data']] == ['train', 'val']
    assert content['data'][0]['images'] == 8


# --- the batch and the rate


@pytest.mark.parametrize(
    'batch, world, counts, told', [(1, 1, 4, False), (4, 1, 1, False), (1, 2, 1, True)]
)
def test_hint_counts_accumulation(batch: int, world: int, counts: int, told: bool) -> None:
    settings = {
        'train_dataloader.batch_size': batch,
        'optim_wrapper.accumulative_counts': counts,
        'auto_scale_lr.base_batch_size': 4,
    }
    hint = batch_hint(load_config(str(CONFIGS['seg']), settings, None, 'none'), world)
    assert bool(hint) == told
    assert not told or '1 x 2 = 2 images' in hint


@pytest.mark.compat
@pytest.mark.parametrize('counts, factor', [(4, 1.0), (1, 0.25)])
def test_scaled_rate_counts_accumulation(
    counts: int, factor: float, shapes: Path, tmp_path: Path
) -> None:
    settings = [
        'train_dataloader.batch_size=1',
        f'optim_wrapper.accumulative_counts={counts}',
        'auto_scale_lr.base_batch_size=4',
        'param_scheduler=None',
        'optim_wrapper.optimizer.lr=1e-3',
    ]
    done = train(shapes, tmp_path, '--iters', 4, '--auto-scale-lr', settings=settings)
    assert done.returncode == 0, done.stderr
    scalars = next(tmp_path.rglob('scalars.json')).read_text().splitlines()
    assert json.loads(scalars[0])['lr'] == pytest.approx(1e-3 * factor)


# --- one folder, one run


@pytest.mark.compat
def test_second_run_leaves_the_first_alone(shapes: Path, trained: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(trained, tmp_path / 'run'))
    before = {p: p.read_bytes() for p in first.iterdir() if p.is_file()}
    done = train(shapes, tmp_path, '--iters', 2, '--work-dir', first)
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in first.iterdir() if p.is_file()} == before
    second = tmp_path / 'run_2'
    assert str(second) in done.stdout
    assert (second / 'iter_2.pth').is_file()
    assert not (second / LOCK).exists()
    assert str(Path('run_2', 'iter_2.pth')) in done.stdout.splitlines()[-1]


def test_folder_of_a_run_at_work(shapes: Path, trained: Path, tmp_path: Path) -> None:
    """A process holds the lock, as a training run does; killed, it holds it no longer."""
    folder = tmp_path / 'run'
    folder.mkdir()
    holder = subprocess.Popen(
        [
            tool_runs.sys.executable,
            '-c',
            'import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); '
            'lock.acquire(); open(sys.argv[1], "w").write("4242"); print("held", flush=True); '
            'time.sleep(600)',
            str(folder / LOCK),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        done = train(shapes, tmp_path, '--resume', trained / 'iter_4.pth', '--work-dir', folder)
        assert done.returncode == 1
        assert '4242' in done.stderr.splitlines()[-1]
        done = train(shapes, tmp_path, '--iters', 2, '--work-dir', folder)
        assert done.returncode == 0
        assert (tmp_path / 'run_2' / 'iter_2.pth').is_file()
    finally:
        holder.kill()
        holder.wait()
    done = train(shapes, tmp_path, '--iters', 2, '--work-dir', folder)
    assert (folder / 'iter_2.pth').is_file()


@pytest.mark.compat
def test_test_leaves_the_config_of_the_training_alone(
    shapes: Path, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / 'run'))
    config = folder / CONFIGS['seg'].name
    before = config.read_bytes()
    done = evaluate(
        shapes, tmp_path, folder / 'iter_4.pth', '--work-dir', folder,
        settings=['test_dataloader.batch_size=2'],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert config.read_bytes() == before
    named = tmp_path / done.stdout.splitlines()[-1].split('next: ')[1].split()[2]
    assert Config.fromfile(named).test_dataloader.batch_size == 2


# --- checkpoints


def test_classes_are_compared_in_their_order() -> None:
    content = {'meta': {'dataset_meta': {'classes': ('disc', 'ring')}}}
    assert other_classes(content, ['disc', 'ring'], 'a.pth') is None
    assert other_classes({'meta': {}}, ['disc'], 'a.pth') is None
    assert "label 0 is 'disc' there and 'ring' here" in str(
        other_classes(content, ['ring', 'disc'], 'a.pth')
    )
    assert '2 classes' in str(other_classes(content, ['disc', 'ring', 'star'], 'a.pth'))


@pytest.mark.compat
def test_checkpoint_of_other_classes(shapes: Path, trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / 'iter_4.pth', weights_only=True)
    classes = [*content['meta']['dataset_meta']['classes']]
    content['meta']['dataset_meta']['classes'] = [classes[1], classes[0], *classes[2:]]
    path = tmp_path / 'iter_4.pth'
    torch.save(content, path)
    for done in (
        evaluate(shapes, tmp_path, path),
        train(shapes, tmp_path, '--iters', 6, '--resume', path),
    ):
        assert done.returncode == 1
        assert f'label 0 is {classes[1]!r} there' in done.stderr.splitlines()[-1]
    done = train(shapes, tmp_path, '--iters', 2, settings=[f'load_from={path}'])
    assert done.returncode == 0  # fine-tuning on other classes is usual, and is said
    assert f'label 0 is {classes[1]!r} there' in done.stdout


@pytest.mark.compat
@pytest.mark.parametrize(
    'settings, value',
    [
        ("optim_wrapper.optimizer=dict(type='SGD',lr=0.1,momentum=0.9,_delete_=True)", 'SGD'),
        ('optim_wrapper.paramwise_cfg=dict(norm_decay_mult=0.5)', 'groups'),
    ],
)
def test_state_of_another_optimizer(
    settings: str, value: str, shapes: Path, trained: Path, tmp_path: Path
) -> None:
    done = train(
        shapes, tmp_path, '--iters', 6, '--resume', trained / 'iter_4.pth', settings=[settings]
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert value in last
    assert 'iter_4.pth' in last


def test_shapes_of_another_optimizer_state() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    require_optimizer(Wrapper(optimizer), {'optimizer': state}, 'a.pth')
    other = Wrapper(torch.optim.AdamW(torch.nn.Linear(3, 4).parameters()))
    with pytest.raises(UserError, match=r'\(2, 3\)'):
        require_optimizer(other, {'optimizer': state}, 'a.pth')


@pytest.mark.compat
def test_resuming_says_what_stays(shapes: Path, trained: Path, tmp_path: Path) -> None:
    done = train(
        shapes, tmp_path, '--iters', 6, '--resume', trained / 'iter_4.pth',
        settings=['optim_wrapper.optimizer.lr=0.0123'],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'learning rate of the checkpoint stays' in done.stdout
    assert '0.0123' in done.stdout
    assert 'schedule of the checkpoint stays' in done.stdout


# --- options


def test_options_with_dicts() -> None:
    from repnext_mm.engine.cli import _parser

    parser = _parser('train', '')
    given = parser.parse_args(
        [
            'config', '--cfg-options', "a=dict(type='X',b=[1,2])", "c={'d': (1, 2)}",
            'e={"f": true}', 'g=[1,2]', 'h=text', "i=[dict(type='Y')]",
        ]
    ).cfg_options  # fmt: skip
    assert given == {
        'a': {'type': 'X', 'b': [1, 2]},
        'c': {'d': (1, 2)},
        'e': {'f': True},
        'g': [1, 2],
        'h': 'text',
        'i': [{'type': 'Y'}],
    }


@pytest.mark.parametrize('pair', ['a', '=1', "a={'b'", "a=dict(b=open('x'))", 'a=[(1,2]'])
def test_options_that_cannot_be_read(pair: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_main(['config', '--cfg-options', pair])
    assert stopped.value.code == 2
    assert pair in capsys.readouterr().err


def test_no_workers_with_settings_for_workers() -> None:
    settings = {
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': True,
        'train_dataloader.prefetch_factor': 4,
    }
    loader = load_config(str(CONFIGS['seg']), settings, None, 'none').train_dataloader
    assert not {'persistent_workers', 'prefetch_factor'} & set(loader)


# --- the end of a process


def wait_for(path: Path, text: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()[-2000:]
        assert time.monotonic() < end, path.read_text()[-2000:]
        time.sleep(0.1)


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_sigterm_in_training(workers: int, shapes: Path, tmp_path: Path) -> None:
    process = start(
        'train.py', CONFIGS['seg'], '--iters', 10000,
        *options('seg', shapes, *FEW, f'train_dataloader.num_workers={workers}'), cwd=tmp_path,
    )  # fmt: skip
    output = tmp_path / 'output.txt'
    wait_for(output, 'Iter(train) [    5/', process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    text = output.read_text()
    assert 'Traceback' not in text
    assert text.splitlines()[-1] == 'terminated'
    for path in tmp_path.rglob('*.pth'):
        torch.load(path, weights_only=True)


@HOOKS.register_module(force=True)
class EndInTest(Hook):
    """Sends this process a signal after some batches of a test."""

    def __init__(self, after: int, number: int) -> None:
        self.after, self.number = after, number

    def after_test_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        if batch_idx == self.after:
            signal.raise_signal(self.number)


@pytest.mark.compat
def test_sigterm_in_a_test_keeps_what_is_finished(
    shapes: Path, trained: Path, tmp_path: Path
) -> None:
    hook = f"custom_hooks=[dict(type='EndInTest',after=0,number={int(signal.SIGTERM)})]"
    done = evaluate(
        shapes, tmp_path, trained / 'iter_4.pth',
        settings=['test_dataloader.batch_size=1', hook],
    )  # fmt: skip
    assert done.returncode == 143
    assert 'Stopped after 1 of 2 images' in done.stderr
    assert done.stderr.splitlines()[-1] == 'terminated'
    kept = next((tmp_path / 'work_dirs').rglob('*_unfinished.json'))
    assert json.loads(kept.read_text())['finished_images'] == 1


@HOOKS.register_module(force=True)
class FillDisk(Hook):
    """From the end of the test on, no file of this process may get longer than some bytes."""

    priority = 'VERY_HIGH'

    def after_test_epoch(self, runner: Any, metrics: Any = None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))


@pytest.fixture
def usual_limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.compat
def test_full_disk_keeps_the_metrics(
    shapes: Path, trained: Path, tmp_path: Path, usual_limits: None
) -> None:
    hook = "custom_hooks=[dict(type='FillDisk')]"
    done = evaluate(shapes, tmp_path, trained / 'iter_4.pth', settings=[hook])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r'\.json .*\d+ bytes are needed.*"mIoU": \d', last), last
    assert not list((tmp_path / 'work_dirs').glob('*/*/*.json'))

"""A run that is killed continues as if it had not been, and never from a half-written file."""

from __future__ import annotations

import itertools
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from repnext_mm.checkpoints import RunCheckpoint
from repnext_mm.engine.cli import evaluate_main, train_main
from repnext_mm.engine.resume import (
    SkipSeenData,
    checkpoints_newest_first,
    read_resumable,
)
from repnext_mm.files import AtomicLocalBackend

CONFIG = """
_base_ = [{base!r}]
custom_imports = dict(imports=['repnext_mm', 'tool_runs'], allow_failed_imports=False)
custom_hooks = [dict(type='Probe', path={probe!r}, dies_writing={dies_writing!r})]
"""
# 8 images one by one, validated at the very end; a schedule that changes at every iteration.
EPOCHS = [
    'train_dataloader.batch_size=1',
    'train_cfg.max_epochs=3',
    'train_cfg.val_interval=3',
    'param_scheduler.0.end=100',
]
ITERATIONS = [
    'train_dataloader.batch_size=2',
    'train_cfg.max_iters=10',
    'train_cfg.val_interval=10',
    'default_hooks.checkpoint.interval=3',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes')


def write_config(folder: Path, task: str, dies_writing: str | None = None) -> Path:
    config = folder / 'run.py'
    text = CONFIG.format(
        base=str(tool_runs.CONFIGS[task]),
        probe=str(folder / 'probe.jsonl'),
        dies_writing=dies_writing,
    )
    config.write_text(text)
    return config


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], folder: Path) -> None:
    """SIGKILL as soon as `condition` holds; it must hold before the process ends by itself."""
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, (folder / 'output.txt').read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / 'output.txt').read_text()[-3000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def state(record: dict) -> dict:
    return {k: v for k, v in record.items() if k != 'event'}


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize('task, settings', [('det', EPOCHS), ('seg', ITERATIONS)])
def test_killed_between_checkpoints(
    task: str, settings: list[str], data: Path, tmp_path: Path
) -> None:
    config, probe = write_config(tmp_path, task), tmp_path / 'probe.jsonl'
    arguments = ['--work-dir', 'run', *tool_runs.options(task, data, *settings)]
    first = tool_runs.start('train.py', config, *arguments, cwd=tmp_path)

    def past_second_checkpoint() -> bool:
        saved = tool_runs.records(probe, 'save')
        last = tool_runs.records(probe, 'iter')[-1:]
        return len(saved) >= 2 and bool(last) and last[0]['iter'] > saved[1]['iter']

    kill_when(first, past_second_checkpoint, tmp_path)
    before = tool_runs.records(probe, 'iter')
    saved = tool_runs.records(probe, 'save')
    assert len(saved) == 2
    assert before[-1]['iter'] > saved[-1]['iter']  # there is work to lose

    output = tool_runs.succeed_here(train_main, config, '--resume', *arguments, cwd=tmp_path)
    name = f'epoch_{saved[-1]["epoch"]}' if task == 'det' else f'iter_{saved[-1]["iter"]}'
    assert f'Resuming from run/{name}.pth.' in output

    resumed = tool_runs.records(probe, 'start')[-1]
    assert state(resumed) == state(saved[-1])
    again = tool_runs.records(probe, 'iter')[len(before) :]
    assert again[0]['iter'] == saved[-1]['iter']
    lost = next(r for r in before if r['iter'] == again[0]['iter'])
    assert again[0] == lost  # same iteration, epoch, place in the epoch, images and learning rate
    assert again[-1]['iter'] + 1 == (24 if task == 'det' else 10)
    # The config that lies beside the checkpoint now says that the run was resumed.
    last = shlex.split(output.splitlines()[-1].split('next: python tools/test.py ')[1])
    assert 'Wrote ' in tool_runs.succeed_here(evaluate_main, *last, cwd=tmp_path)


@pytest.mark.compat
@pytest.mark.slow
def test_killed_in_the_middle_of_writing_a_checkpoint(data: Path, tmp_path: Path) -> None:
    config, probe = write_config(tmp_path, 'det', 'epoch_2.pth'), tmp_path / 'probe.jsonl'
    work_dir = tmp_path / 'run'
    arguments = ['--work-dir', 'run', *tool_runs.options('det', data, *EPOCHS)]
    first = tool_runs.run('train.py', config, *arguments, cwd=tmp_path)
    assert first.returncode == -signal.SIGKILL, first.stderr[-3000:]
    assert [p.name for p in work_dir.glob('*.pth')] == ['epoch_1.pth']
    assert len(list(work_dir.glob('*.tmp'))) == 1

    # What a run without the atomic hook would leave, and a pointer cut in the middle of a path.
    whole = (work_dir / 'epoch_1.pth').read_bytes()
    (work_dir / 'epoch_3.pth').write_bytes(whole[: len(whole) * 2 // 3])
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_')[:-3])
    write_config(tmp_path, 'det')
    settings = [*EPOCHS, 'train_cfg.max_epochs=2', 'train_cfg.val_interval=5']
    arguments = ['--work-dir', 'run', *tool_runs.options('det', data, *settings)]
    output = tool_runs.succeed_here(train_main, config, '--resume', *arguments, cwd=tmp_path)
    line = next(line for line in output.splitlines() if line.startswith('Resuming from'))
    assert line.startswith('Resuming from run/epoch_1.pth (skipped: epoch_3.pth ')

    saved, resumed = (
        tool_runs.records(probe, 'save')[0],
        tool_runs.records(probe, 'start')[-1],
    )
    assert state(resumed) == state(saved)
    assert resumed['epoch'] == 1
    assert not list(work_dir.glob('*.tmp'))
    assert isinstance(read_resumable(work_dir / 'epoch_2.pth'), RunCheckpoint)


RUN_NUMBERS = itertools.count()


class OneWeight(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor, mode: str = 'loss') -> dict[str, torch.Tensor]:
        return {'loss': (self.weight * inputs).sum()}


def small_run(work_dir: Path, epochs: int, by_epoch: bool = True, **settings: Any) -> Runner:
    """A runner with one weight, one iteration an epoch and a checkpoint after each."""
    keep = settings.pop('max_keep_ckpts', -1)
    checkpoint = dict(
        type='AtomicCheckpointHook', interval=1, by_epoch=by_epoch, max_keep_ckpts=keep
    )
    defaults = dict(
        model=OneWeight(),
        work_dir=str(work_dir),
        train_dataloader=DataLoader([{'inputs': torch.ones(1)}]),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        default_hooks=dict(checkpoint=checkpoint),
        experiment_name=f'{work_dir.name}_{next(RUN_NUMBERS)}',
        log_level='ERROR',
    )
    return Runner(**defaults | settings)


@pytest.mark.compat
def test_the_only_checkpoint_outlives_a_failed_successor(
    tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    small_run(tmp_path, epochs=1, max_keep_ckpts=1).train()
    runner = small_run(tmp_path, epochs=2, max_keep_ckpts=1)
    runner._resume, runner._load_from = True, str(tmp_path / 'epoch_1.pth')
    small_files_only(2048)
    with pytest.raises(OSError, match='File too large'):
        runner.train()
    assert [p.name for p in tmp_path.glob('*.pth*')] == ['epoch_1.pth']
    assert isinstance(read_resumable(tmp_path / 'epoch_1.pth'), RunCheckpoint)


@pytest.mark.compat
def test_outdated_checkpoints_go_and_temporaries_too(tmp_path: Path) -> None:
    (tmp_path / 'epoch_9.pth.4711.tmp').write_bytes(b'half')
    small_run(tmp_path, epochs=4, max_keep_ckpts=2).train()
    assert sorted(p.name for p in tmp_path.glob('*.pth*')) == ['epoch_3.pth', 'epoch_4.pth']


class Watched(Dataset):
    """Seven samples; it knows which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {'inputs': torch.ones(1)}


@pytest.mark.compat
def test_seen_data_is_not_read_again(tmp_path: Path) -> None:
    def run(iterations: int) -> tuple[Runner, list[int]]:
        data = Watched()
        runner = small_run(
            tmp_path,
            epochs=iterations,
            by_epoch=False,
            train_dataloader=DataLoader(data, batch_size=2, sampler=InfiniteSampler(data, seed=0)),
            train_cfg=dict(by_epoch=False, max_iters=iterations),
        )
        return runner, data.read

    whole, order = run(12)
    whole.train()
    assert len(order) == 12 * 2
    resumed, read = run(12)
    resumed._resume, resumed._load_from = True, str(tmp_path / 'iter_9.pth')
    resumed.register_hook(SkipSeenData())
    resumed.train()
    assert resumed.iter == 12
    assert read == order[9 * 2 :]


@pytest.mark.compat
def test_what_is_not_resumable_says_why(tmp_path: Path) -> None:
    small_run(tmp_path, epochs=1).train()
    good = tmp_path / 'epoch_1.pth'
    whole = good.read_bytes()
    assert isinstance(read_resumable(good), RunCheckpoint)

    cut = tmp_path / 'cut.pth'
    for share in (0, 0.3, 0.9):
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert 'cut.pth' in read_resumable(cut)
    flipped = bytearray(whole)
    flipped[whole.index(b'experiment_name') + 2] ^= 1  # the length and the directory stay right
    cut.write_bytes(flipped)
    assert 'checksum' in read_resumable(cut)
    torch.save({'state_dict': {}, 'meta': {}}, cut)
    assert read_resumable(cut) == 'cut.pth lacks message_hub, optimizer'
    assert 'absent.pth' in read_resumable(tmp_path / 'absent.pth')


def test_newest_first_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    for name in ('epoch_10.pth', 'epoch_9.pth', 'epoch_2.pth', 'best_bbox_epoch_11.pth', 'x.pth'):
        (tmp_path / name).touch()
    found = [p.name for p in checkpoints_newest_first(tmp_path, {'by_epoch': True})]
    assert found == ['epoch_10.pth', 'epoch_9.pth', 'epoch_2.pth']
    assert list(checkpoints_newest_first(tmp_path, {'by_epoch': False})) == []
    assert list(checkpoints_newest_first(tmp_path / 'absent', {})) == []

    elsewhere = tmp_path / 'out' / 'run'
    elsewhere.mkdir(parents=True)
    (elsewhere / 'model-5.pth').touch()
    hook = {'out_dir': str(tmp_path / 'out'), 'filename_tmpl': 'model-{}.pth'}
    assert list(checkpoints_newest_first('work_dirs/run', hook)) == [elsewhere / 'model-5.pth']


def test_backend_writes_whole_or_not_at_all(
    tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    backend, target = AtomicLocalBackend(), tmp_path / 'new' / 'file.txt'
    backend.put_text('first', target)
    small_files_only(2048)
    with pytest.raises(OSError, match='File too large'):
        backend.put(b'x' * 20000, target)
    assert target.read_text() == 'first'
    assert [p.name for p in target.parent.iterdir()] == ['file.txt']

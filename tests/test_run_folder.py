"""No run writes over another, whatever starts, ends or runs beside it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from repnext_mm.engine.cli import evaluate_main, train_main
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.run_folder import claim_folder, next_folder, release_folders

HOLD = """
import sys, time
from mmengine.config import Config
from repnext_mm.engine.run_folder import claim_folder
claim_folder(Config(dict(work_dir=sys.argv[1])))
print('held', flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release_folders()


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes')


def claimed(folder: Path, **arguments: Any) -> tuple[str, str | None]:
    cfg = Config(dict(work_dir=str(folder), default_hooks=dict(checkpoint=dict(by_epoch=True))))
    line = claim_folder(cfg, **arguments)
    return Path(cfg.work_dir).name, line


def with_checkpoints(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_with_checkpoints_belongs_to_their_run(tmp_path: Path) -> None:
    assert claimed(tmp_path / 'new') == ('new', None)
    run = with_checkpoints(tmp_path / 'run', 'epoch_1.pth', 'epoch_2.pth')
    name, line = claimed(run)
    assert name == 'run_2'
    assert str(run) in line and 'run_2' in line and '--resume' in line
    with_checkpoints(tmp_path / 'other', 'best_mIoU_iter_3.pth')
    with_checkpoints(tmp_path / 'other_2', 'iter_9.pth')
    assert claimed(tmp_path / 'other')[0] == 'other_3'
    assert next_folder(tmp_path / 'other', {}) == str(tmp_path / 'other_3')


def test_a_continued_run_stays_unless_it_would_replace_newer_checkpoints(tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path / 'run', 'epoch_1.pth', 'epoch_2.pth')
    assert claimed(run, stay=True) == ('run', None)
    assert claimed(run, resumed=str(run / 'epoch_2.pth')) == ('run', None)
    assert claimed(run, resumed=str(run / 'epoch_1.pth'))[0] == 'run_2'
    assert claimed(run, resumed=str(tmp_path / 'elsewhere.pth'))[0] == 'run_2'


def test_checkpoints_in_a_folder_of_their_own(tmp_path: Path) -> None:
    hook = {'out_dir': str(tmp_path / 'out')}
    (tmp_path / 'out').mkdir()
    with_checkpoints(tmp_path / 'out' / 'run', 'epoch_1.pth')
    assert next_folder(tmp_path / 'run', hook) == str(tmp_path / 'run_2')


@pytest.mark.skipif(sys.platform == 'win32', reason='needs POSIX locks')
def test_two_at_once(tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    command = [sys.executable, '-c', HOLD, str(folder)]
    env = tool_runs.environment()
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert other.stdout.readline() == 'held\n'
        assert claimed(folder)[0] == 'run_2'
        with pytest.raises(UserError, match=re.escape(str(folder))):
            claimed(folder, stay=True)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    release_folders()
    assert claimed(folder)[0] == 'run'  # a lock ends with its process, even with a killed one


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.compat
@pytest.mark.slow
def test_nothing_of_a_run_changes(data: Path, tmp_path: Path) -> None:
    """Training again, and testing with other settings, leave all of it; each command works."""
    config, options = tool_runs.CONFIGS['seg'], tool_runs.options('seg', data)
    again = [config, '--iters', 2, '--work-dir', 'a run', *options]
    first = tool_runs.succeed_here(train_main, *again, cwd=tmp_path)
    before = contents(tmp_path / 'a run')
    second = tool_runs.succeed_here(train_main, *again, cwd=tmp_path)
    assert 'a run contains another run, so this one writes to a run_2' in second
    assert contents(tmp_path / 'a run') == before

    command = shlex.split(first.splitlines()[-1].split('next: ')[1])
    assert command[:2] == ['python', 'tools/test.py']
    options.append('model.decode_head.dropout_ratio=0.3')
    for _ in range(2):  # in one second, perhaps
        tested = tool_runs.succeed_here(evaluate_main, *command[2:], *options, cwd=tmp_path)
    after = contents(tmp_path / 'a run')
    assert {name: after[name] for name in before} == before
    command = shlex.split(tested.splitlines()[-1].split('next: ')[1])
    assert Config.fromfile(tmp_path / command[2]).model.decode_head.dropout_ratio == 0.3
    output = tool_runs.succeed_here(evaluate_main, *command[2:], cwd=tmp_path)
    assert list((tmp_path / 'pictures').rglob('*.png'))
    command = shlex.split(output.splitlines()[-1].split('Again: ')[1])
    assert Path(tmp_path, command[2]).is_file() and Path(tmp_path, command[3]).is_file()


@pytest.mark.compat
@pytest.mark.slow
def test_a_run_that_is_complete(data: Path, tmp_path: Path) -> None:
    command = [tool_runs.CONFIGS['seg'], '--iters', 2, *tool_runs.options('seg', data)]
    first = tool_runs.succeed_here(train_main, *command, cwd=tmp_path)
    before = contents(tmp_path)
    again = tool_runs.succeed_here(train_main, *command[:3], '--resume', *command[3:], cwd=tmp_path)
    assert 'Nothing is left to train' in again.splitlines()[-1]
    assert again.split('next: ')[-1] == first.split('next: ')[-1]
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in before if name.endswith('.pth'))


# --- a full disk


@HOOKS.register_module()
class FullDisk(Hook):
    """From some point of a test on, files have no space."""

    def __init__(self, within: bool) -> None:
        self.within = within

    def after_test_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        resource = pytest.importorskip('resource')
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        if self.within:
            Path(runner.log_dir, 'picture.png').write_bytes(bytes(1000))


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize('within', [False, True], ids=['at the end', 'in the middle'])
def test_a_full_disk_keeps_what_can_be_kept(
    within: bool, data: Path, tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    config, options = tool_runs.CONFIGS['seg'], tool_runs.options('seg', data)
    trained = tool_runs.succeed_here(train_main, config, '--iters', 1, *options, cwd=tmp_path)
    checkpoint = shlex.split(trained.splitlines()[-1])[-1]
    full = tmp_path / 'full.py'
    full.write_text(
        f'_base_ = {str(config)!r}\ncustom_hooks = [dict(type="FullDisk", within={within})]\n'
    )
    done = tool_runs.run_here(
        evaluate_main, full, checkpoint, '--work-dir', 'test', *options, cwd=tmp_path
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert len(errors) == 1 and 'Traceback' not in done.stderr
    assert re.search(r'test\S* cannot be written: File too large.* MiB are free', errors[0])
    if within:
        assert re.search(r'Stopped after 2 of .*bytes are needed\): {.*"mIoU": ', done.stderr)
    else:
        assert re.search(r'\d+ bytes are needed', errors[0])
        assert 'mIoU: ' in done.stdout + done.stderr
    assert not list((tmp_path / 'test').rglob('*.json'))


# --- signals


def children(process: int) -> set[int]:
    found = set()
    for status in Path('/proc').glob('[0-9]*/stat'):
        try:
            text = status.read_text()
        except OSError:
            continue
        if int(text.rpartition(')')[2].split()[1]) == process:
            found.add(int(status.parent.name))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks for processes in /proc')
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason='one core leaves none for a data worker')
@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_sigterm_ends_a_run_in_order(tool: str, data: Path, tmp_path: Path) -> None:
    config, options = tool_runs.CONFIGS['seg'], tool_runs.options('seg', data)
    workers = [f'{split}_dataloader.num_workers=1' for split in ('train', 'test')]
    workers += ['test_dataloader.batch_size=1', 'default_hooks.logger.interval=1']
    if tool == 'train.py':
        command = ['--iters', 100000]
        workers += ['default_hooks.checkpoint.interval=1']
    else:
        trained = tool_runs.succeed_here(train_main, config, '--iters', 1, *options, cwd=tmp_path)
        command = [shlex.split(trained.splitlines()[-1])[-1]]
        text = 'custom_imports = dict(imports=["repnext_mm", "tool_runs"])\n'
        text += "custom_hooks = [dict(type='Slow')]\n"
        base = f'_base_ = {str(config)!r}\n'
        config = tmp_path / 'slow.py'
        config.write_text(base + text)
    process = tool_runs.start(tool, config, *command, *options, *workers, cwd=tmp_path)
    output = tmp_path / 'output.txt'
    sign = 'Saving checkpoint at 2' if tool == 'train.py' else 'one image'
    deadline = time.monotonic() + 200
    while sign not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.01)
    below = children(process.pid)
    assert below  # a data worker
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, output.read_text()[-3000:]
    text = output.read_text()
    assert text.splitlines()[-1] == 'terminated'
    assert 'Traceback' not in text
    deadline = time.monotonic() + 20
    while any(map(alive, below)):
        assert time.monotonic() < deadline, 'a data worker is left'
        time.sleep(0.1)
    if tool == 'train.py':
        saved = list((tmp_path / 'work_dirs').rglob('*.pth*'))
        assert saved
        for path in saved:
            assert 'state_dict' in torch.load(path, weights_only=True)
    else:
        assert re.search(r'Stopped after 1 of 2 images; .* in (\S+\.json)', text)

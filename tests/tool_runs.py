"""Running the real tools on a tiny generated data set, here or in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import REPO, forget_runs
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from repnext_mm import files
from repnext_mm.datasets import shapes

CONFIGS = {
    'det': REPO / 'configs' / 'mask_rcnn_repnext_m0_shapes.py',
    'seg': REPO / 'configs' / 'semantic_fpn_repnext_m0_shapes.py',
}
#: Which tool calls a function, for `run_here`.
TOOLS = {
    'train_main': 'train.py',
    'evaluate_main': 'test.py',
    'deploy_main': 'deploy.py',
    'demo_main': 'demo.py',
}
FOLDERS = {'det': 'coco', 'seg': 'ade'}


def tiny_shapes(root: Path, train: int = 8, val: int = 2) -> Path:
    """A few small scenes, in both layouts."""
    return shapes.generate(root, shapes.Spec(train=train, val=val, size=64))


def options(task: str, data: Path, *more: str) -> list[str]:
    """The --cfg-options that move a sample config to `data`, and `more`."""
    moved = [f'sample_data_root={data}', f'data_root={data / FOLDERS[task]}']
    return ['--cfg-options', *moved, *more]


def environment(**more: str) -> dict[str, str]:
    paths = [str(REPO), str(REPO / 'tests'), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in paths if p)}
    return (
        env | {'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'PYTHON': sys.executable} | more
    )


def start(tool: str, *args: Any, cwd: Path, **env: str) -> subprocess.Popen:
    """A running tool; its output goes to `cwd`/output.txt."""
    command = [str(REPO / 'tools' / tool), *map(str, args)]
    if tool.endswith('.py'):
        command.insert(0, sys.executable)
    with open(cwd / 'output.txt', 'w') as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**env),
            stdout=output,
            stderr=subprocess.STDOUT,
            # Jobs in the background of a script ignore Ctrl-C, and what they start does too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def run(tool: str, *args: Any, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A finished tool, with its output apart from its errors."""
    command = [str(REPO / 'tools' / tool), *map(str, args)]
    if tool.endswith('.py'):
        command.insert(0, sys.executable)
    return subprocess.run(
        command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=500
    )


def run_here(
    main: Callable[[Sequence[str]], int], *args: Any, cwd: Path, **env: str
) -> subprocess.CompletedProcess:
    """As `run`, in this process, which has imported everything already."""
    command = [*map(str, args)]
    tool = str(REPO / 'tools' / TOOLS.get(main.__name__, ''))
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    forget_runs()
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, before)
        stack.enter_context(mock.patch.dict(os.environ, {'LOCAL_RANK': '0', **env}))
        for name in {'RANK', 'REPNEXT_MM_TRACEBACK'} - env.keys():
            os.environ.pop(name, None)
        # Loggers of earlier runs write to streams that are closed by now.
        stack.enter_context(mock.patch.object(logging, 'raiseExceptions', False))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.object(sys, 'argv', [tool, *command]))
        os.chdir(cwd)
        try:
            code = main(command)
        except SystemExit as stop:  # argparse
            code = stop.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def script(tool: str) -> Callable[[Sequence[str]], int]:
    """A tool for `run_here`, from its first line to its last."""

    def main(argv: Sequence[str]) -> int:
        with mock.patch.object(sys, 'argv', [str(REPO / 'tools' / tool), *argv]):
            runpy.run_path(str(REPO / 'tools' / tool), run_name='__main__')
        return 0

    return main


def ended_well(done: subprocess.CompletedProcess) -> str:
    """Its output."""
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


def succeed(tool: str, *args: Any, cwd: Path, **env: str) -> str:
    """Output of a tool that must end well in a process of its own."""
    return ended_well(run(tool, *args, cwd=cwd, **env))


def succeed_here(main: Callable[[Sequence[str]], int], *args: Any, cwd: Path, **env: str) -> str:
    """Output of a tool that must end well in this process."""
    return ended_well(run_here(main, *args, cwd=cwd, **env))


@HOOKS.register_module()
class Probe(Hook):
    """Writes down, line by line, what a run must carry over a kill.

    Args:
        path: Where to; a new run adds to what an earlier one wrote.
        dies_writing: The process ends half-way through a file of this name, as if it were killed.
    """

    priority = 'VERY_LOW'  # after the checkpoint hook, and the schedulers

    def __init__(self, path: str, dies_writing: str | None = None) -> None:
        self.path = path
        if dies_writing is not None:
            files.open = functools.partial(_open, dies_writing)

    def _write(self, **record: Any) -> None:
        with open(self.path, 'a') as file:
            file.write(json.dumps(record) + '\n')

    def before_train(self, runner: Any) -> None:
        self._write(
            event='start',
            iter=runner.iter,
            epoch=runner.epoch,
            weights=digest(runner.model.state_dict()),
            optimizer=digest(runner.optim_wrapper.state_dict()),
            schedulers=[s.last_step for s in runner.param_schedulers],
        )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._write(
            event='iter',
            iter=runner.iter,
            epoch=runner.epoch,
            batch=batch_idx,
            images=[Path(sample.img_path).name for sample in data_batch['data_samples']],
            lr=runner.optim_wrapper.get_lr()['lr'][0],
        )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self._write(
            event='save',
            iter=checkpoint['meta']['iter'],
            epoch=checkpoint['meta']['epoch'],
            weights=digest(checkpoint['state_dict']),
            optimizer=digest(checkpoint['optimizer']),
            schedulers=[s['last_step'] for s in checkpoint['param_schedulers']],
        )


@HOOKS.register_module()
class Slow(Hook):
    """Says when an image is evaluated, and waits."""

    def after_test_iter(self, *_: Any, **__: Any) -> None:
        print('one image', flush=True)
        time.sleep(1)


class _Fatal(io.FileIO):
    """A file that takes half of what is written, and then the process is killed."""

    def write(self, data: bytes) -> int:
        super().write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError('not reached')


def _open(fatal: str, path: Path, mode: str) -> Any:
    """`open`, except for files whose names begin with `fatal`."""
    return (_Fatal if path.name.startswith(fatal) else open)(path, mode)


def digest(state: Any) -> str:
    """Hash of everything in a nested state, to compare it bit by bit."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode())

    add(state)
    return total.hexdigest()


def records(path: Path, event: str) -> list[dict]:
    """Whole lines of a probe's file; a kill may have cut the last one."""
    if not path.exists():
        return []
    lines = path.read_text().split('\n')[:-1]
    return [r for r in map(json.loads, lines) if r['event'] == event]

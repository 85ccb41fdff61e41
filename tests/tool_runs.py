"""Running the real tools in processes of their own, on a tiny generated data set."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import REPO
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from repnext_mm.datasets import shapes

CONFIGS = {
    'det': REPO / 'configs' / 'mask_rcnn_repnext_m0_shapes.py',
    'seg': REPO / 'configs' / 'semantic_fpn_repnext_m0_shapes.py',
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


def succeed(tool: str, *args: Any, cwd: Path, **env: str) -> str:
    """Output of a tool that must end well."""
    done = run(tool, *args, cwd=cwd, **env)
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@HOOKS.register_module()
class Probe(Hook):
    """Writes down, line by line, what a run must carry over a kill.

    Args:
        path: Where to; a new run adds to what an earlier one wrote.
        ballast_from: From this epoch on checkpoints are big, so that writing them takes a while.
    """

    priority = 'VERY_LOW'  # after the checkpoint hook, and the schedulers

    def __init__(self, path: str, ballast_from: int | None = None) -> None:
        self.path = path
        self.ballast_from = ballast_from

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
        if self.ballast_from is not None and checkpoint['meta']['epoch'] >= self.ballast_from:
            checkpoint['ballast'] = torch.zeros(75_000_000)  # 300 MB


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

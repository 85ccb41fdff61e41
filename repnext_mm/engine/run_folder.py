"""The folder of a run: one run each, so that none overwrites another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock
from mmengine.config import Config

from ..files import FolderBusy, hold, let_go, lock_owner
from .errors import UserError

LOCK = '.training.lock'


@contextmanager
def claimed(cfg: Config, resumes: bool) -> Iterator[str | None]:
    """In this context, `cfg.work_dir` is a folder of this run alone.

    A folder in which another run has checkpoints or is at work is left as it is, and the next free
    one of NAME_2, NAME_3, ... is used, unless the run continues it. Gives a line for the user if
    so. The system frees the folder of a process that was killed.

    Raises:
        UserError: The run that is to be continued is still at work there, or the folder cannot be
            written.
    """
    asked = Path(cfg.work_dir)
    first = int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0
    lock: FileLock | None = None
    for folder in numbered(asked):
        if not resumes and has_checkpoints(cfg, folder):
            continue
        lock = _hold(folder) if first else None
        if lock or not first:
            break
        if resumes:
            raise UserError(
                f'another run is at work in {asked} ({lock_owner(asked / LOCK)}); wait until it '
                'ends, or give another --work-dir.'
            )
    cfg.work_dir = str(folder)
    line = None
    if folder != asked:
        line = (
            f'{asked} belongs to another run and stays as it is; this run goes to {folder} '
            '(--resume would continue the other).'
        )
    try:
        yield line
    finally:
        if lock is not None:
            let_go(lock)


def numbered(folder: Path) -> Iterator[Path]:
    """`folder`, then NAME_2, NAME_3 and so on beside it."""
    yield folder
    for number in count(2):
        yield folder.with_name(f'{folder.name}_{number}')


def has_checkpoints(cfg: Mapping[str, Any], folder: Path) -> bool:
    """Whether a run has left checkpoints in `folder`, or where its checkpoint hook puts them."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [folder]
    if hook.get('out_dir'):
        folders.append(Path(hook['out_dir']) / folder.name)  # as CheckpointHook does
    return any(any(f.glob('*.pth')) for f in folders)


def _hold(folder: Path) -> FileLock | None:
    """The lock of `folder`, held; None if another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / LOCK)
    except FolderBusy:
        return None
    except OSError as error:
        raise UserError(
            f'--work-dir {folder} cannot be written ({error.strerror}); give another folder.'
        ) from error

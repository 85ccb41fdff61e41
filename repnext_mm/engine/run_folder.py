"""The folder of a run: no other run writes into it."""

from __future__ import annotations

import errno
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, init_dist, is_distributed, is_main_process

from .errors import UserError

#: In the folder of a training that runs, locked until its process ends, however it ends.
LOCK = '.training'
_held: dict[Path, int] = {}


def claim_folder(cfg: Config, resumed: str | None = None, stay: bool = False) -> str | None:
    """Choose the folder that a training writes to, and set `cfg.work_dir` to it.

    It is the given one, unless checkpoints of another run are in it or another process trains in
    it: then the next free of `FOLDER_2`, `FOLDER_3` and so on, as no run replaces what another one
    wrote. The first of several processes chooses for all.

    Args:
        cfg: The config of the run.
        resumed: The checkpoint that the run continues from, if any. It may write beside this one,
            unless newer checkpoints are there.
        stay: The run continues whatever is in the given folder.

    Returns:
        A line for the user if it is another folder.

    Raises:
        UserError: The run must stay in its folder, and another process trains there; or the folder
            cannot be written.
    """
    chosen: list[Any] = [cfg.work_dir, None, None]
    if is_main_process():
        try:
            chosen[:2] = _choose(cfg, resumed, stay)
        except UserError as error:
            chosen[2] = str(error)
    broadcast_object_list(chosen)
    cfg.work_dir, line, reason = chosen
    if reason is not None:
        raise UserError(reason)
    return line


def join_processes(cfg: Config) -> None:
    """Connect the processes of a run, as mmengine's runner otherwise does when it is built."""
    if cfg.launcher != 'none' and not is_distributed():
        init_dist(cfg.launcher, **(cfg.get('env_cfg') or {}).get('dist_cfg', {}))


def _choose(cfg: Config, resumed: str | None, stay: bool) -> tuple[str, str | None]:
    given = cfg.work_dir
    hook_cfg = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if stay or _may_write(given, hook_cfg, resumed):
        if _lock(given):
            return given, None
        if stay or resumed is not None:
            raise UserError(
                f'another process trains in {given}; wait for its end, or give another --work-dir.'
            )
    folder = next_folder(given, hook_cfg, lock=True)
    line = f'{given} contains another run, so this one writes to {folder}'
    return folder, line + ('.' if resumed else f'; --resume continues the one in {given}.')


def next_folder(given: str | os.PathLike[str], hook_cfg: dict, lock: bool = False) -> str:
    """`given`, or the next of `given_2`, `given_3` and so on without a run in it."""
    stem = str(given).rstrip('/')
    for folder in itertools.chain([stem], (f'{stem}_{number}' for number in itertools.count(2))):
        if _may_write(folder, hook_cfg, None) and (not lock or _lock(folder)):
            return folder
    raise AssertionError('numbers are endless')


def _may_write(folder: str, hook_cfg: dict, resumed: str | None) -> bool:
    """Whether a run may write there: nothing of another one would be replaced."""
    checkpoints = _checkpoints(folder, hook_cfg)
    if not checkpoints or resumed is None:
        return not checkpoints
    newest = next(checkpoints_newest_first(folder, hook_cfg), None)
    return newest is not None and Path(resumed).resolve() == newest.resolve()


def _checkpoints(folder: str, hook_cfg: dict) -> list[Path]:
    places = {Path(folder), _checkpoint_folder(folder, hook_cfg)}
    return [path for place in places if place.is_dir() for path in place.glob('*.pth')]


def make_folder(folder: str) -> None:
    """Make the folder of a run.

    Raises:
        UserError: It cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'--work-dir {folder} cannot be written ({error.strerror}); give another folder.'
        ) from error


def _lock(folder: str) -> bool:
    """Whether this process, until it ends, is the only one that trains in `folder`."""
    make_folder(folder)
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return True
    path = Path(folder, LOCK).resolve()
    while path not in _held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike that of flock, this lock does not pass to data workers, which outlive a kill.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            # Any other error: a file system without locks.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        if _is_file(descriptor, path):
            _held[path] = descriptor
        else:  # its last owner has just removed it
            os.close(descriptor)
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def release_folders() -> None:
    """Let others write to the folders that this process holds; the end of the process does, too."""
    while _held:
        path, descriptor = _held.popitem()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def checkpoints_newest_first(work_dir: str | os.PathLike[str], hook_cfg: dict) -> Iterator[Path]:
    """The regular checkpoints of a run, found by the numbers in their names.

    `last_checkpoint`, which mmengine follows, is not read: a kill can leave it empty, half-written
    or one behind.
    """
    folder = _checkpoint_folder(work_dir, hook_cfg)
    by_epoch = hook_cfg.get('by_epoch', True)
    template = hook_cfg.get('filename_tmpl') or ('epoch_{}.pth' if by_epoch else 'iter_{}.pth')
    name = re.compile(re.escape(template).replace(re.escape('{}'), r'(\d+)'))
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := name.fullmatch(path.name))
    }
    for number in sorted(found, reverse=True):
        yield found[number]


def _checkpoint_folder(work_dir: str | os.PathLike[str], hook_cfg: dict) -> Path:
    folder = Path(work_dir)
    if hook_cfg.get('out_dir'):
        return Path(hook_cfg['out_dir']) / folder.name  # as CheckpointHook does
    return folder

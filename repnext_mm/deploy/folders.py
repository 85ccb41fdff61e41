"""Writing into the output folder: completely or not at all, and one sentence where that fails."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..files import FULL, TEMPORARY_SUFFIX, FolderBusy, hold, let_go
from .errors import ExportError, UsageError

PARTIAL = '.partial-'
LOCK = '.deploy.lock'
#: Less than this is as good as nothing: libraries that write in C++ do not say why they failed.
SPARE_BYTES = 1 << 20


def make_folder(path: Path) -> None:
    """Make the output folder and see that it can be written.

    Raises:
        UsageError: It cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f'--work-dir {path} cannot be written ({error.strerror}); give another folder.'
        ) from error


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """In this context, no other process writes into the output folder.

    Raises:
        UsageError: One does already; it is named.
    """
    make_folder(folder)
    try:
        lock = hold(folder / LOCK)
    except FolderBusy as busy:
        raise UsageError(
            f'another run writes into {folder} ({busy.owner}); wait until it ends, or give another '
            '--work-dir.'
        ) from busy
    try:
        yield
    finally:
        let_go(lock)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the results for what is not complete yet; removed however this ends.

    The folder is `owned`, so what is left of others is of processes that were killed.
    """
    for left in folder.iterdir():
        temporary = re.search(rf'\.\d+{re.escape(TEMPORARY_SUFFIX)}$', left.name)
        if temporary or left.name.startswith(PARTIAL):
            remove(left)
    with tempfile.TemporaryDirectory(
        prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn whatever comes of a full disk into one sentence."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        full = isinstance(error, OSError) and error.errno in FULL
        if full or free < SPARE_BYTES:
            why = error.strerror if isinstance(error, OSError) else 'No space left on device'
            raise ExportError(
                f'{folder} has no space for the files ({why}; {free / 1e6:.0f} MB are free); free '
                'some space, or give another --work-dir.'
            ) from error
        if isinstance(error, PermissionError):
            raise ExportError(
                f'{error.filename} cannot be written ({error.strerror}); give another --work-dir.'
            ) from error
        raise


def place(written: Path, target: Path) -> None:
    """Move a complete artifact to where it belongs, in place of an older one."""
    if target.is_dir():  # which cannot be replaced in one step
        old = written.with_name(f'{written.name}.old')
        os.replace(target, old)
    os.replace(written, target)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def shown(path: Path) -> str:
    """A path as short as it can be written, quoted where a shell needs it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith(os.pardir) else relative)

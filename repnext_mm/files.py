"""Files that are complete under their name, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

BACKEND = 'atomic_local'
TEMPORARY_SUFFIX = '.tmp'


@contextmanager
def replacing(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to, which then replaces `path`.

    After an error it is removed, and `path` is what it was. An error that names no file, such as
    that of a full disk, then names `path`, and `size` in bytes where it is given.
    """
    target = Path(path)
    temporary = target.with_name(f'{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}')
    try:
        yield temporary
        with temporary.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            name_file(error, target, size)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with replacing(path, len(text.encode())) as temporary:
        temporary.write_text(text, 'utf-8', newline='\n')


def name_file(error: OSError, path: str | Path, size: int | None = None) -> None:
    """Add to an error of the system, which may name no file, what was to be written."""
    if error.filename is None:
        error.filename = str(path)
        if size is not None:
            error.strerror = f'{error.strerror}, {size} bytes are needed'


@register_backend(BACKEND)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local backend, except that a file is complete under its name or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write `obj` to a temporary file beside `filepath`, to the disk, and rename it."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with replacing(filepath, len(obj)) as temporary, open(temporary, 'wb') as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """As `put`, for text."""
        self.put(obj.encode(encoding), filepath)

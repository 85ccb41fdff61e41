"""Files that are complete under their name, or not there at all; locks; bounded reading."""

from __future__ import annotations

import codecs
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mmengine.fileio import LocalBackend, register_backend

BACKEND = 'atomic_local'
TEMPORARY_SUFFIX = '.tmp'
#: Bytes of the largest JSON file that is read: reports have some thousands.
MOST_JSON = 64 << 20


#: Byte-order marks and the encodings that they mean; UTF-32 before UTF-16, which it begins with.
MARKS = (
    (codecs.BOM_UTF8, 'utf-8', 'a UTF-8 byte-order mark'),
    (codecs.BOM_UTF32_LE, 'utf-32-le', 'UTF-32'),
    (codecs.BOM_UTF32_BE, 'utf-32-be', 'UTF-32'),
    (codecs.BOM_UTF16_LE, 'utf-16-le', 'UTF-16'),
    (codecs.BOM_UTF16_BE, 'utf-16-be', 'UTF-16'),
)


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


#: Errors of a full disk, a quota and a limit on file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


#: Seconds that the holder of a lock may take to write whose it is.
OWNER_S = 2.0


class FolderBusy(OSError):
    """Another process works in a folder; `owner` is what it wrote about itself."""

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(f'{path} is held by another process ({owner})')
        self.owner = owner


def hold(path: str | Path, timeout: float = 0) -> FileLock:
    """Take the lock file `path` for this process, and write into it whose it is.

    The system frees the lock of a process that was killed. `let_go` frees it. `timeout` is how
    long another process is waited for, in s; for ever where it is negative.

    Raises:
        FolderBusy: Another process holds it.
        OSError: It cannot be written.
    """
    path = Path(path)
    while True:
        lock = FileLock(path, timeout=timeout)
        try:
            lock.acquire()
        except Timeout as error:
            owner = lock_owner(path)
            if owner is None:
                continue  # its holder has just let it go
            raise FolderBusy(path, owner) from error
        if path.exists():
            break
        lock.release()  # of a file that its holder removed as we opened it
    path.write_text(
        f'process {os.getpid()} on {platform.node()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n',
        'utf-8',
    )
    return lock


def let_go(lock: FileLock) -> None:
    """Free a lock that `hold` took, and remove its file."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def lock_owner(path: str | Path) -> str | None:
    """What the holder of a lock wrote about itself: just after it took the lock.

    None if the file is no longer there.
    """
    until = time.monotonic() + OWNER_S
    while time.monotonic() < until:
        try:
            owner = Path(path).read_text('utf-8').strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            break
        if owner:
            return owner
        time.sleep(0.01)
    return 'unknown'


def free_folder(asked: str | Path) -> Path:
    """The folder, or the next of FOLDER_2, FOLDER_3 and so on, that is empty or not there."""
    path, number = Path(asked), 1
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        number += 1
        path = Path(asked).with_name(f'{Path(asked).name}_{number}')
    return path


def require_regular(path: str | Path) -> Path:
    """`path`, if it is a regular file: opening a pipe or a device could wait for ever.

    Raises:
        ValueError: It is something else.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = 'folder' if path.is_dir() else 'pipe or device'
        raise ValueError(f'{path} is a {kind}, not a regular file.')
    return path


def read_text(path: Path) -> tuple[str, str | None]:
    """The text of a regular file, and what had to be understood to read it (None: plain UTF-8).

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, or not text.
    """
    if path.exists() and not path.is_file():
        raise ValueError('it is not a regular file')
    data = path.read_bytes()
    for mark, encoding, said in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding), f'the text had {said}'
    if data[1:2] == b'\0' or data[:1] == b'\0':  # UTF-16 without its mark
        encoding = 'utf-16-be' if data[:1] == b'\0' else 'utf-16-le'
        return data.decode(encoding), 'the text was in UTF-16'
    return data.decode('utf-8'), None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file in UTF-8, bounded in size, and without NaN and infinity.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON of at most `MOST_JSON` bytes, or no regular file.
    """
    path = require_regular(path)
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f'{path} has {size} bytes, and at most {MOST_JSON} are read.')
    return parse_json(path.read_text('utf-8'))


def parse_json(text: str) -> Any:
    """The value of a JSON text, without NaN and infinity.

    Raises:
        ValueError: It is not JSON, too deep, or has numbers that no file of ours has.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is not a number of JSON')


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

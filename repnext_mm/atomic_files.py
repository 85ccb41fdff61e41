"""Files that are whole under their name, or not there at all."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

BACKEND = 'atomic_local'
TEMPORARY_SUFFIX = '.tmp'


@register_backend(BACKEND)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local backend, except that a file appears whole under its name or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write `obj` to a temporary file beside `filepath`, to the disk, and rename it."""
        target = Path(filepath)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f'{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}')
        try:
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """As `put`, for text."""
        self.put(obj.encode(encoding), filepath)

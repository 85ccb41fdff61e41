"""Checkpoints of training runs, read once and passed on to mmengine's runner."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmengine.runner import CheckpointLoader

from .errors import CheckpointError
from .fetching import fetch
from .reading import File, file_kind, read_checkpoint


@dataclass
class RunCheckpoint:
    """The complete content of a checkpoint of a run, and the SHA-256 of its file.

    `content` is None once `passed_on` has passed it on: a run must not keep it in memory.
    """

    path: str
    content: Any = field(repr=False)
    sha256: str


def read_run(checkpoint: str | os.PathLike[str]) -> RunCheckpoint:
    """Read a checkpoint that MMEngine's runner is to start from.

    The onedl stack answers a refused load by loading again without protection. What is read here
    was accepted by safe loading, and `passed_on` spares the runner a load of its own.

    Raises:
        CheckpointError: No such checkpoint, it is damaged, or it contains more than data.
    """
    file = fetch(checkpoint)
    kind = file_kind(file)
    if kind != 'torch checkpoint':
        raise CheckpointError(
            f'{file.path} is a {kind}, which a run cannot start from; give a checkpoint of a run, '
            "or load it into the backbone: init_cfg=dict(type='Pretrained', checkpoint=...)."
        )
    return RunCheckpoint(str(file.path), read_checkpoint(file), file.sha256)


@contextmanager
def passed_on(checkpoint: RunCheckpoint | None) -> Iterator[None]:
    """In this context, mmengine gets the content of `checkpoint` instead of reading its file again.

    It gets it once, and `checkpoint` keeps it no longer; if it asks again, the file is read again,
    safely.
    """
    if checkpoint is None:
        yield
        return

    def load_from_local(filename: str, map_location: Any) -> Any:  # mmengine logs this name
        content, checkpoint.content = checkpoint.content, None
        return read_checkpoint(File.read(filename)) if content is None else content

    CheckpointLoader.register_scheme(f'{re.escape(checkpoint.path)}$', load_from_local, force=True)
    try:
        yield
    finally:
        checkpoint.content = None

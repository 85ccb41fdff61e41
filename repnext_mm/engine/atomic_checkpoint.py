"""Checkpoints that survive a kill at any moment: whole under their name, or not there at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoints.errors import CheckpointError
from ..checkpoints.reading import check_crc, read_checkpoint

BACKEND = 'atomic_local'
TEMPORARY_SUFFIX = '.tmp'
#: What a checkpoint holds that training can continue from.
RESUMABLE = ('meta', 'state_dict', 'message_hub', 'optimizer')


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


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against a kill in the middle of its work.

    It writes through `AtomicLocalBackend`, removes an outdated checkpoint only after its successor
    is whole, and at the start of training clears away what a killed run left half-written.
    """

    def __init__(self, *args: Any, backend_args: dict | None = None, **kwargs: Any) -> None:
        super().__init__(*args, backend_args=backend_args or {'backend': BACKEND}, **kwargs)

    def before_train(self, runner: Runner) -> None:
        """Set up the output folder, and clear temporary files of killed runs from it."""
        super().before_train(runner)
        self._remove_temporaries()

    @master_only
    def _remove_temporaries(self) -> None:
        for path in Path(self.out_dir).glob(f'*.pth.*{TEMPORARY_SUFFIX}'):
            path.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # mmengine removes first and saves then: a kill in between leaves one less, or none at all.
        outdated = None
        if self.max_keep_ckpts > 0:
            kept = self.keep_ckpt_ids
            if len(kept) == self.max_keep_ckpts and kept[-1] != step:
                outdated = kept.popleft()
        super()._save_checkpoint_with_step(runner, step, meta)
        if outdated is not None and is_main_process():
            name = self.filename_tmpl.format(outdated)
            path = self.file_backend.join_path(self.out_dir, name)
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)


def resumable_problem(path: str | Path) -> str | None:
    """Why training cannot continue from this checkpoint, or None if it can.

    The whole file is read: a truncated or damaged one must not be taken for a checkpoint.
    """
    path = Path(path)
    try:
        check_crc(path, path.name)
        checkpoint = read_checkpoint(path, path.name)
    except (CheckpointError, OSError) as error:
        return str(error).rstrip('.')
    missing = [key for key in RESUMABLE if key not in checkpoint]
    return f'{path.name} lacks {", ".join(missing)}' if missing else None


def checkpoints_newest_first(work_dir: str | Path, hook_cfg: dict) -> Iterator[Path]:
    """The regular checkpoints of a run, told by the numbers in their names.

    `last_checkpoint`, which mmengine follows, is not read: a kill can leave it empty, half-written
    or one behind.
    """
    folder = Path(work_dir)
    if hook_cfg.get('out_dir'):
        folder = Path(hook_cfg['out_dir']) / folder.name  # as CheckpointHook does
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

"""Checkpoints that survive a kill at any moment: complete under their name, or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..files import BACKEND, TEMPORARY_SUFFIX
from .finite import require_finite_run


@HOOKS.register_module(force=True)  # replaces its stand-in of `lazy`
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against a kill in the middle of its work.

    It writes through `AtomicLocalBackend`, removes an outdated checkpoint only after its successor
    is complete, and at the start of training removes what a killed run left half-written.
    Weights that are NaN or infinite are not saved: training stops, and what was saved before stays.
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

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best:
            require_finite_run(runner, runner.iter)
        super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        require_finite_run(runner, meta['iter'])
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

"""Compiling the backbone of a run, and nothing else of it."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module(force=True)  # replaces its stand-in of `lazy`
class CompileBackbone(Hook):
    """Runs the model's backbones through `torch.compile`, in training and evaluation.

    MMEngine's own `compile` option compiles the complete training step, heads and losses with their
    changing shapes included. This one has the same keys, for the part whose shapes repeat:
    `custom_hooks = [dict(type='CompileBackbone', mode='max-autotune')]`.

    Args:
        options: Those of `torch.compile`: `backend`, `mode`, `dynamic`, `disable` and so on.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def before_run(self, runner: Any) -> None:
        from ..optimization import optimize

        optimize(runner.model, compile=self.options or True)

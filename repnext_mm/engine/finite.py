"""A loss or weights that are NaN or infinite end the training, before they end up in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from .errors import UserError


class StopAtNonFinite(Hook):
    """Stop at the first loss that is NaN or infinite, and save no such weights.

    It runs before the checkpoint hook of the same iteration. mmengine reads the loss of every
    iteration anyway, so looking at it costs nothing.
    """

    priority = 'HIGH'

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Look at the losses of the iteration.

        Raises:
            UserError: One is NaN or infinite.
        """
        wrong = {
            name: float(value)
            for name, value in (outputs or {}).items()
            if 'loss' in name and not _is_finite(value)
        }
        if wrong:
            losses = ', '.join(f'{name}={value}' for name, value in wrong.items())
            raise UserError(f'training diverged: {losses} {_where(runner)}; {_kept(runner)}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Look at the weights.

        Raises:
            UserError: One is NaN or infinite.
        """
        name = first_non_finite(checkpoint.get('state_dict') or {})
        if name is not None:
            raise UserError(
                f'training diverged: {name} is NaN or infinite {_where(runner)}, and no checkpoint '
                f'is written; {_kept(runner)}'
            )


def first_non_finite(node: Any) -> str | None:
    """The name of the first tensor in nested dicts and lists that has NaN or infinity."""
    return next(_non_finite(node), None)


def _non_finite(node: Any, path: str = '') -> Iterator[str]:
    if isinstance(node, Tensor):
        if node.is_floating_point() and not bool(torch.isfinite(node).all()):
            yield path
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _non_finite(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _non_finite(value, f'{path}.{number}')


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


def _where(runner: Runner) -> str:
    rates = runner.optim_wrapper.get_lr()
    rate = next((values[0] for values in rates.values() if values), None)
    return f'in iteration {runner.iter + 1} (epoch {runner.epoch + 1}, lr {rate})'


def _kept(runner: Runner) -> str:
    hook = next((h for h in runner.hooks if isinstance(h, CheckpointHook)), None)
    last = getattr(hook, 'last_ckpt', None)
    kept = f'the last checkpoint is {last}' if last else 'there is no checkpoint yet'
    if last and not Path(last).exists():
        kept = f'the last checkpoint was {last}'
    return (
        f'{kept}; lower optim_wrapper.optimizer.lr, add optim_wrapper.clip_grad, or warm up for '
        'longer, and look at the data with --check-only.'
    )

"""Training stops at numbers that are none, and its checkpoints contain none of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from .errors import UserError
from .run_folder import checkpoints_newest_first

#: So many losses in a row may be NaN or infinite where a loss scaler leaves out their steps.
TOLERATED = 10


def first_non_finite(state: Any, name: str = '') -> str | None:
    """Name of the first tensor in a nested state that has NaN or infinity, if any."""
    for key, value in _tensors(state, name):
        if not bool(torch.isfinite(value).all()):
            return key
    return None


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f'{name}.{key}' if name else str(key))
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _tensors(value, f'{name}.{number}' if name else str(number))
    elif isinstance(state, Tensor):
        yield name, state


def require_finite_run(runner: Runner, iteration: int) -> None:
    """Refuse to go on with weights or an optimizer state that are NaN or infinite.

    All processes must call it, and all stop if one of them has to.

    Args:
        runner: In training.
        iteration: The last one that is done, counted from 1, for the message.

    Raises:
        UserError: The message names the entry and the newest checkpoint, which is from before.
    """
    found = first_non_finite(_state(runner))
    if _in_any_process(found is not None):
        where = found or 'the weights of another process'
        raise UserError(
            f'training diverged: {where} is NaN or infinite after iteration '
            f'{iteration} ({_rate(runner)}); {_way_back(runner)}'
        )


class StopAtNonFiniteLoss(Hook):
    """Stop training when the loss is NaN or infinite.

    With float16 a loss scaler leaves out the step of an iteration whose gradient is not finite,
    as it does at the start of each run while it looks for its scale. The loss itself is not
    scaled. If it overflows once, the weights stay as they are; if it does so `TOLERATED` times in
    a row, or if statistics of a norm took it in, the run is lost.
    """

    priority = 'VERY_HIGH'  # before the log and the checkpoint of this iteration

    def __init__(self) -> None:
        self.in_a_row = 0

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Look at what is written, for hooks that do not do so in all processes.

        Raises:
            UserError: Something in it is NaN or infinite.
        """
        if found := first_non_finite(checkpoint):
            raise UserError(
                f'training diverged: {found} is NaN or infinite at the checkpoint of iteration '
                f'{checkpoint["meta"]["iter"]} ({_rate(runner)}); {_way_back(runner)}'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Look at the losses of one iteration, in all processes together.

        Raises:
            UserError: The message has the iteration, the losses, the learning rate, and the
                newest checkpoint, which is from before.
        """
        losses = {
            name: float(value.detach()) if isinstance(value, Tensor) else float(value)
            for name, value in (outputs or {}).items()
            if 'loss' in name.lower()
        }
        wrong = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if not _in_any_process(bool(wrong)):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row < TOLERATED and _skips_steps(runner):
            require_finite_run(runner, runner.iter + 1)
            return
        shown = ', '.join(f'{name}={value}' for name, value in wrong.items())
        raise UserError(
            f'training diverged: at iteration {runner.iter + 1} '
            f'{shown or "a loss of another process is NaN or infinite"} ({_rate(runner)}); '
            f'{_way_back(runner)}'
        )


def _skips_steps(runner: Runner) -> bool:
    scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
    return scaler is not None and scaler.is_enabled()


def _state(runner: Runner) -> dict[str, Any]:
    state: dict[str, Any] = {
        'weights': getattr(runner.model, 'module', runner.model).state_dict(),
        'optimizer': runner.optim_wrapper.state_dict(),
    }
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            state['ema'] = hook.ema_model.state_dict()
    return state


def _in_any_process(condition: bool) -> bool:
    flag = torch.tensor(int(condition))
    all_reduce(flag, op='max')
    return bool(flag)


def _rate(runner: Runner) -> str:
    rates = runner.optim_wrapper.get_lr()
    values = next(iter(rates.values()))
    return f'learning rate {values[0]:.4g}'


def _way_back(runner: Runner) -> str:
    hook_cfg = (runner.cfg.get('default_hooks') or {}).get('checkpoint') or {}
    kept = next(checkpoints_newest_first(runner.work_dir, hook_cfg), None)
    if kept is None and runner.cfg.get('load_from'):
        kept = runner.cfg.load_from
    last = f'the last finite checkpoint is {kept}' if kept else 'no checkpoint was written before'
    return (
        f'{last}; lower optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad, or lengthen the '
        'warm-up with --cfg-options.'
    )


class SayWhatWasNotMeasured(Hook):
    """A metric without ground truth, or without a prediction, in a sentence.

    Args:
        stop: Raise it instead of printing it, for a test, whose result is the metric.
    """

    priority = 'VERY_HIGH'  # before a file of metrics is written that are none

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Look at the metrics of a validation."""
        self._look('val', runner.val_evaluator, metrics or {})

    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Look at the metrics of a test."""
        self._look('test', runner.test_evaluator, metrics or {})

    def _look(self, split: str, evaluator: Evaluator, metrics: dict[str, Any]) -> None:
        if unmeasured := without_truth(metrics):
            sentence = (
                f'{", ".join(unmeasured)}: the annotations of {split}_dataloader contain no object '
                'and no pixel of the classes, so nothing was measured; check its ann_file, '
                'data_prefix, metainfo and reduce_zero_label.'
            )
            if self.stop:
                raise UserError(sentence)
        elif not metrics and not any(getattr(m, 'format_only', False) for m in evaluator.metrics):
            sentence = (
                f'The model predicted nothing on the images of {split}_dataloader, so there is no '
                'metric; read it as 0.'
            )
        else:
            return
        if is_main_process():
            print(f'warning: {sentence}', flush=True)


def without_truth(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics, as `name=value`, that had nothing to compare with: NaN, or COCO's -1.

    Parts may well have none: COCO's AP of small objects (`bbox_mAP_s`, a part of `bbox_mAP`) and
    that of a single class (`NAME_precision`) are left out.
    """
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) and not name.endswith('_precision')
    }
    return [
        f'{name}={value:g}'
        for name, value in numbers.items()
        if (math.isnan(value) or value == -1)
        and not any(name.startswith(f'{other}_') for other in numbers)
    ]

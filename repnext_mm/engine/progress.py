"""One line per epoch on the screen, and one progress bar; all else is in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .quiet import mute

#: Metrics of evaluations as a line calls them, and what they are divided by to be percent.
METRICS: dict[str, tuple[str, float]] = {
    'coco/bbox_mAP': ('box AP', 0.01),
    'coco/bbox_mAP_50': ('box AP50', 0.01),
    'coco/segm_mAP': ('mask AP', 0.01),
    'mIoU': ('mIoU', 1.0),
    'mAcc': ('mean accuracy', 1.0),
    'accuracy/top1': ('top-1', 1.0),
}


@HOOKS.register_module(force=True)  # replaces its stand-in of `lazy`
class EpochLines(Hook):
    """Prints a line after each epoch in the place of MMEngine's log, which goes to its file alone.

    Args:
        monitor: The metric of which the best is kept in the line.
    """

    priority = 'VERY_LOW'

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self.best: tuple[float, int] | None = None
        self._losses: list[float] = []
        self._line = ''
        self._started = self._first = 0.0
        self._bar: Any = None
        self._task: Any = None

    def before_train(self, runner: Runner) -> None:
        """From here on, MMEngine's own lines go to the log file alone."""
        for handler in runner.logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)
        self._started, self._first = time.monotonic(), runner.epoch

    def before_train_epoch(self, runner: Runner) -> None:
        """A new bar."""
        self._losses.clear()
        if is_main_process() and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Remaining

            text = TextColumn('{task.description}')
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), Remaining(),
                                 transient=True)  # fmt: skip
            self._bar.start()
            total = len(runner.train_dataloader)
            title = f'epoch {runner.epoch + 1}/{runner.max_epochs}'
            self._task = self._bar.add_task(title, total=total)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Count, and keep the loss."""
        if outputs and 'loss' in outputs:
            self._losses.append(float(outputs['loss']))
        if self._bar is not None:
            self._bar.advance(self._task)

    def after_train_epoch(self, runner: Runner) -> None:
        """Print the line, unless an evaluation follows whose metrics are to be in it."""
        self._stop_bar()
        loss = sum(self._losses) / max(len(self._losses), 1)
        rate = runner.optim_wrapper.get_lr()
        lr = rate.get('base_lr', next(iter(rate.values())))[-1]
        width = len(str(runner.max_epochs))
        epoch = runner.epoch + 1
        self._line = f'epoch {epoch:>{width}}/{runner.max_epochs}  loss {loss:.4f}  lr {lr:.2e}'
        loop: Any = runner.train_loop
        evaluated = runner.val_loop is not None and (
            epoch >= loop.val_begin
            and (epoch % loop.val_interval == 0 or epoch == runner.max_epochs)
        )
        if not evaluated:
            self._say(runner, epoch)

    def before_val_epoch(self, runner: Runner) -> None:
        """The evaluators print tables, which are in the log file too."""
        mute(bool(self._line))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the line with the metrics."""
        mute(False)
        if not self._line:  # an evaluation on its own
            return
        found = metrics or {}
        for key, (name, unit) in METRICS.items():
            if key in found:
                self._line += f'  {name} {found[key] / unit:.1f}'
        if self.monitor in found:
            value = float(found[self.monitor])
            if self.best is None or value > self.best[0]:
                self.best = (value, runner.epoch)
        if self.best is not None:
            unit = METRICS.get(self.monitor or '', ('', 1.0))[1]
            self._line += f'  best {self.best[0] / unit:.1f} (epoch {self.best[1]})'
        self._say(runner, runner.epoch)

    def after_train(self, runner: Runner) -> None:
        """Leave the screen as it was."""
        self._stop_bar()

    def after_run(self, runner: Runner) -> None:
        """Leave the screen as it was, after an error too."""
        self._stop_bar()

    def _say(self, runner: Runner, epoch: int) -> None:
        done = epoch - self._first
        spent = time.monotonic() - self._started
        left = spent / max(done, 1) * (runner.max_epochs - epoch)
        if is_main_process():
            print(f'{self._line}  {duration(left)} left', flush=True)
        self._line = ''

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """'45 s', '3 min 20 s' or '2 h 5 min'."""
    total = round(seconds)
    if total < 60:
        return f'{total} s'
    if total < 3600:
        return f'{total // 60} min {total % 60} s'
    return f'{total // 3600} h {total % 3600 // 60} min'


def known_metrics(metrics: dict[str, float], keys: Sequence[str] = ()) -> dict[str, float]:
    """The metrics that a person reads, in percent, by the name that a line gives them."""
    wanted = keys or METRICS
    return {METRICS[key][0]: metrics[key] / METRICS[key][1] for key in wanted if key in metrics}

"""The schedule of a run: moved to another length, and looked at before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.config import Config

from .errors import UserError

#: An `end` of this or more is mmengine's for "never".
NEVER = 10**9
#: They reach their target one step before `end`, so that this step follows the length of the run.
LINEAR = ('Linear', 'Poly')
WARM_UPS = ('Linear', 'Constant')
#: They bring a value to its target at their `end`.
COURSES = ('CosineAnnealing', 'Linear', 'Poly', 'OneCycle')
#: Settings of hooks that count epochs or iterations of the run.
HOOK_SETTINGS = {
    'switch_epoch': True,
    'num_last_epochs': True,
    'begin_epoch': True,
    'warmup_epochs': True,
    'cooldown_epochs': True,
    'begin_iter': False,
}


class Length(NamedTuple):
    """How long a run is: so many epochs, or iterations."""

    by_epoch: bool
    steps: int

    @property
    def key(self) -> str:
        return 'max_epochs' if self.by_epoch else 'max_iters'

    @property
    def unit(self) -> str:
        return 'epoch' if self.by_epoch else 'iteration'

    def __str__(self) -> str:
        return f'{self.steps} {self.unit}{"s" if self.steps != 1 else ""}'


def length_of(train_cfg: Any) -> Length | None:
    """The length that a `train_cfg` gives."""
    for by_epoch, key in ((True, 'max_epochs'), (False, 'max_iters')):
        if isinstance(count := (train_cfg or {}).get(key), int | float):
            return Length(by_epoch, int(count))
    return None


def schedulers_of(param_scheduler: Any) -> Iterator[dict[str, Any]]:
    """Each scheduler of a config, of one optimizer or of several."""
    if isinstance(param_scheduler, list | tuple):
        for one in param_scheduler:
            yield from schedulers_of(one)
    elif isinstance(param_scheduler, dict):
        if 'type' in param_scheduler:
            yield param_scheduler
        else:
            yield from schedulers_of([*param_scheduler.values()])


def name_of(built: Mapping[str, Any]) -> str:
    """The name of the class that a part of a config builds."""
    kind = built.get('type')
    return getattr(kind, '__name__', None) or str(kind).rpartition('.')[2]


# --- another length


def rescale(cfg: Config, epochs: int | None, iterations: int | None) -> str | None:
    """Change the length of a run, and all that follows it, in place.

    Warm-up, milestones and the ends of schedulers keep their shares of the run. Intervals of
    validation and checkpoints stay, unless they are longer than the run.

    Returns:
        A line for the user, or None if no other length is asked for.

    Raises:
        UserError: The length is given in another unit than the config's.
    """
    if epochs is None and iterations is None:
        return None
    old = length_of(cfg.get('train_cfg'))
    if old is None:
        raise UserError('the config has no train_cfg.max_epochs or max_iters to change.')
    new = Length(epochs is not None, epochs or iterations or 0)
    option = '--epochs' if new.by_epoch else '--iters'
    if new.by_epoch != old.by_epoch:
        raise UserError(
            f'{option} {new.steps} does not fit the config, which trains for {old}; give '
            f'{"--epochs" if old.by_epoch else "--iters"} N.'
        )
    change = _Change(old, new)
    changes: list[str] = []
    for scheduler in schedulers_of(cfg.get('param_scheduler')):
        changes += change.scheduler(scheduler)
    _rescale_loop(cfg, change)
    for hook in [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]:
        for key, by_epoch in HOOK_SETTINGS.items():
            if isinstance(hook, dict) and isinstance(hook.get(key), int):
                hook[key] = change.step(hook[key], by_epoch)
    if cfg.get(old.key) == old.steps:
        cfg[old.key] = new.steps
    note = f': {", ".join(changes)}' if changes else ''
    return f'The schedule of {old} is rescaled to {new}{note}.'


def _rescale_loop(cfg: Config, change: _Change) -> None:
    old, new = change.old, change.new
    loop = cfg.train_cfg
    loop[old.key] = new.steps
    for key in ('val_interval', 'val_begin'):
        if key in loop:
            loop[key] = min(loop[key], new.steps)
    if loop.get('dynamic_intervals'):
        loop.dynamic_intervals = [
            (change.step(start, old.by_epoch), min(interval, new.steps))
            for start, interval in loop.dynamic_intervals
        ]
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if (
        checkpoint.get('interval', 0) > new.steps
        and checkpoint.get('by_epoch', True) == new.by_epoch
    ):
        checkpoint['interval'] = new.steps


class _Change(NamedTuple):
    """From one length to another."""

    old: Length
    new: Length

    def step(self, value: float, by_epoch: bool, last: int | None = None) -> int:
        """A step of the run at the same share of it, at least 0 and at most `last`."""
        moved = math.floor(value * self.new.steps / self.old.steps + 0.5)
        if by_epoch == self.old.by_epoch:
            moved = min(moved, self.new.steps if last is None else last)
        return max(moved, 0)

    def scheduler(self, scheduler: dict[str, Any]) -> list[str]:
        """Change one scheduler in place; returns what the user should see of it."""
        by_epoch = scheduler.get('by_epoch', True)
        kind = name_of(scheduler)
        changes = []
        for key in ('begin', 'T_max', 'step_size', 'total_steps', 'end'):
            value = scheduler.get(key)
            if isinstance(value, int | float) and 0 < value < NEVER:
                if key == 'begin':
                    moved = self.step(value, by_epoch)
                elif key == 'end':
                    moved = max(self._end(value, by_epoch, kind), scheduler.get('begin', 0) + 1)
                else:
                    moved = max(self.step(value, by_epoch), 1)
                if moved != value:
                    changes.append(f'{kind}.{key} {value} -> {moved}')
                scheduler[key] = moved
        if periods := scheduler.get('periods'):
            scheduler['periods'] = [max(self.step(period, by_epoch), 1) for period in periods]
        if 'milestones' in scheduler:
            milestones = self._milestones(scheduler['milestones'], by_epoch)
            changes.append(f'{kind}.milestones {[*scheduler["milestones"]]} -> {milestones}')
            scheduler['milestones'] = milestones
        if kind.startswith('Exponential') and 'gamma' in scheduler:
            scheduler['gamma'] **= self.old.steps / self.new.steps
        return changes

    def _end(self, value: float, by_epoch: bool, kind: str) -> int:
        if by_epoch == self.old.by_epoch and value in (self.old.steps, self.old.steps + 1):
            return self.new.steps + int(value - self.old.steps)
        if by_epoch:
            return self.step(value, by_epoch)
        # Two: a linear course of one step divides by zero.
        return (
            max(self.step(value - 1, by_epoch) + 1, 2)
            if kind.startswith(LINEAR)
            else (self.step(value, by_epoch))
        )

    def _milestones(self, milestones: Any, by_epoch: bool) -> list[int]:
        """Each once, inside the run: two that fall together are one drop, not two at once."""
        last = self.new.steps - 1 if by_epoch == self.old.by_epoch else None
        return sorted({self.step(m, by_epoch, last) for m in milestones} - {0})


# --- what looks wrong


def schedule_warnings(cfg: Config, epoch_length: int | None) -> list[str]:
    """Sentences about a schedule that does not fit the length of its run.

    Args:
        cfg: The config of the run.
        epoch_length: Iterations of an epoch. Without it, only what counts in the unit of the run
            is looked at.
    """
    run = length_of(cfg.get('train_cfg'))
    if run is None:
        return []
    rate = [s for s in schedulers_of(cfg.get('param_scheduler')) if _is_rate(s)]
    steps = _Steps(run, epoch_length)
    if steps.total is None:
        return []
    warm_up = max((steps.of(s, 'end') or 0 for s in rate if _warms_up(s)), default=0)
    return [
        *_about_warm_up(warm_up, steps),
        *_about_milestones(rate, warm_up, steps),
        *_about_the_end(rate, steps),
    ]


class _Steps:
    """Steps of a run in iterations where the length of an epoch is known, else in its own unit."""

    def __init__(self, run: Length, epoch_length: int | None) -> None:
        self.run = run
        self.epoch_length = epoch_length
        if run.by_epoch:
            self.total: int | None = run.steps * (epoch_length or 1)
        else:
            self.total = run.steps

    def of(self, scheduler: dict[str, Any], key: str) -> float | None:
        """A setting of a scheduler; None if it has none, or if units do not compare."""
        value = scheduler.get(key)
        if not isinstance(value, int | float) or value >= NEVER:
            return None
        return self.scaled(value, scheduler.get('by_epoch', True))

    def scaled(self, value: float, by_epoch: bool) -> float | None:
        if self.epoch_length is not None:
            return value * self.epoch_length if by_epoch else value
        return value if by_epoch == self.run.by_epoch else None

    def shown(self, value: float) -> str:
        unit = 'iterations' if self.epoch_length is not None else f'{self.run.unit}s'
        return f'{value:g} {unit}' if value != 1 else f'1 {unit[:-1]}'


def _is_rate(scheduler: dict[str, Any]) -> bool:
    return not name_of(scheduler).endswith(('Momentum', 'WeightDecay'))


def _warms_up(scheduler: dict[str, Any]) -> bool:
    kind = name_of(scheduler)
    if scheduler.get('begin', 0) > 0 or not kind.startswith(WARM_UPS):
        return False
    start = scheduler.get('start_factor', scheduler.get('factor', 1 / 3))
    return bool(start < scheduler.get('end_factor', 1.0))


def _about_warm_up(warm_up: float, steps: _Steps) -> Iterator[str]:
    assert steps.total is not None
    if warm_up > steps.total / 2:
        yield (
            f'the warm-up takes {steps.shown(warm_up)} of the {steps.shown(steps.total)} of the '
            'run; shorten it (param_scheduler.0.end), or move the whole schedule to this length '
            'with --epochs N or --iters N.'
        )


def _about_milestones(rate: list[dict[str, Any]], warm_up: float, steps: _Steps) -> Iterator[str]:
    assert steps.total is not None
    for scheduler in rate:
        end = min(steps.total, steps.of(scheduler, 'end') or steps.total)
        never, early = [], []
        for milestone in scheduler.get('milestones') or ():
            step = steps.scaled(milestone, scheduler.get('by_epoch', True))
            if step is not None and step >= end:
                never.append(milestone)
            elif step is not None and step <= max(warm_up, steps.total / 10):
                early.append(milestone)
        for found, words in ((never, 'never reached'), (early, 'reached early')):
            if found:
                yield (
                    f'milestones {found} of {name_of(scheduler)} are {words}: the run has '
                    f'{steps.shown(steps.total)}, {steps.shown(warm_up)} of them warm-up; '
                    '--epochs N or --iters N moves them along with the length.'
                )


def _about_the_end(rate: list[dict[str, Any]], steps: _Steps) -> Iterator[str]:
    assert steps.total is not None
    ends = []
    for scheduler in rate:
        if not name_of(scheduler).startswith(COURSES) or _warms_up(scheduler):
            continue
        begin, end = steps.of(scheduler, 'begin') or 0, steps.of(scheduler, 'end')
        if length := steps.of(scheduler, 'T_max') or steps.of(scheduler, 'total_steps'):
            end = begin + length
        ends.append((end, name_of(scheduler)))
    if not ends or any(end is None for end, _ in ends):
        return
    end, kind = max((end, kind) for end, kind in ends if end is not None)
    if end < 0.9 * steps.total:
        words = 'long before the end of the run'
    elif end > 1.1 * steps.total:
        words = 'which the run does not reach'
    else:
        return
    yield (
        f'{kind} ends at {steps.shown(end)}, {words}, at {steps.shown(steps.total)}; '
        '--epochs N or --iters N moves it along with the length.'
    )

"""The length of a run, and what follows it: milestones, warm-up, intervals, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from .errors import UserError

#: Settings of a scheduler that are a place in the run.
PLACES = ('begin', 'end', 'T_max', 'step_size', 'total_steps', 'T_0')
#: Schedulers that raise the rate at the start unless their factors say otherwise.
WARM_UPS = ('LinearLR', 'ConstantLR', 'LinearParamScheduler', 'ConstantParamScheduler')
#: A last milestone before this share of the run is early, and a warm-up beyond it long.
HALF = 0.5


def set_length(cfg: Config, epochs: int | None, iters: int | None) -> None:
    """Train for so many epochs or iterations, and move everything in `cfg` that depends on it.

    Milestones, warm-up and the end of schedulers keep their place in the run; intervals of
    validation and checkpoints get no longer than the run.

    Raises:
        UserError: The config counts in the other unit, or the number is not positive.
    """
    if epochs is None and iters is None:
        return
    training = cfg.get('train_cfg') or {}
    by_epoch = 'max_epochs' in training
    given, option = (epochs, '--epochs') if epochs is not None else (iters, '--iters')
    assert given is not None
    if by_epoch != (epochs is not None):
        counts, use = ('epochs', '--epochs N') if by_epoch else ('iterations', '--iters N')
        raise UserError(
            f'{option} {given} does not fit the config, which counts in {counts}; give {use}.'
        )
    if given < 1:
        raise UserError(f'{option} is {given}; give 1 or more.')
    key = 'max_epochs' if by_epoch else 'max_iters'
    factor = given / training[key]
    training[key] = given
    for scheduler in _schedulers(cfg):
        _rescale(scheduler, factor)
    hooks = cfg.get('default_hooks') or {}
    for node, name in ((training, 'val_interval'), (hooks.get('checkpoint') or {}, 'interval')):
        if node.get(name, 1) > given and node.get('by_epoch', by_epoch) == by_epoch:
            node[name] = given


def _schedulers(cfg: Mapping[str, Any]) -> list[Any]:
    given = cfg.get('param_scheduler') or []
    return [given] if isinstance(given, dict) else list(given)


def _rescale(scheduler: Any, factor: float) -> None:
    for name in PLACES:
        value = scheduler.get(name)
        if isinstance(value, int) and value > 0:
            scheduler[name] = max(1, round(value * factor))
    if milestones := scheduler.get('milestones'):
        scheduler['milestones'] = sorted({max(1, round(m * factor)) for m in milestones})


def schedule_notes(runner: Runner) -> Iterator[str]:
    """What is probably not meant in the schedulers of a run whose data is loaded."""
    loop: Any = runner.train_loop
    length = len(loop.dataloader)
    by_epoch = hasattr(loop, '_max_epochs') and type(loop).__name__.startswith('Epoch')
    total = loop.max_epochs * length if by_epoch else loop.max_iters
    unit = 'epochs' if by_epoch else 'iterations'
    end_of_run = f'the run of {loop.max_epochs if by_epoch else total} {unit}'
    for scheduler in _schedulers(runner.cfg):
        kind = scheduler.get('type')
        step = length if scheduler.get('by_epoch', True) else 1
        counted = 'epochs' if scheduler.get('by_epoch', True) else 'iterations'
        begin, end = scheduler.get('begin', 0) * step, scheduler.get('end')
        end = math.inf if end is None else end * step
        if kind in WARM_UPS and scheduler.get('start_factor', scheduler.get('factor', 1 / 3)) < 1:
            if begin < total and min(end, total) - begin > HALF * total:
                yield (
                    f'the warm-up {kind} lasts until {scheduler.get("end")} {counted}, more than '
                    f'half of {end_of_run}; shorten it by --cfg-options param_scheduler.N.end=...'
                )
        elif milestones := scheduler.get('milestones'):
            late = [m for m in milestones if begin + m * step >= total]
            if late:
                yield (
                    f'{end_of_run} never reaches the milestones {late} of {milestones} ({counted}) '
                    f'of {kind}; --epochs or --iters moves them with the length.'
                )
            elif max(milestones) * step < HALF * total:
                yield (
                    f'{kind} has reached its last milestone, {max(milestones)} {counted}, in the '
                    f'first half of {end_of_run}; --epochs or --iters moves them with the length.'
                )
        elif end < math.inf and begin < total:
            if end > total * 1.1:
                yield (
                    f'{kind} ends at {scheduler.get("end")} {counted}, after {end_of_run}, so the '
                    'rate never gets to its end; --epochs or --iters moves it with the length.'
                )
            elif end < total * 0.9 and not _followed(runner.cfg, end, length):
                yield (
                    f'{kind} ends at {scheduler.get("end")} {counted}, before {end_of_run}; the '
                    'rate stays what it is then.'
                )


def _followed(cfg: Config, end: float, length: int) -> bool:
    """Whether another scheduler begins where one ends."""
    return any(
        s.get('begin', 0) * (length if s.get('by_epoch', True) else 1) >= end
        for s in _schedulers(cfg)
    )


# --- the batch and the learning rate


def batch_of_step(cfg: Config, world_size: int) -> int | None:
    """Images of one step of the optimizer: batch size x processes x accumulated batches."""
    batch = (cfg.get('train_dataloader') or {}).get('batch_size')
    return batch and batch * world_size * accumulated(cfg)


def accumulated(cfg: Config) -> int:
    """Batches whose gradients are added up for one step of the optimizer."""
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


def batch_hint(cfg: Config, world_size: int) -> str | None:
    """A line if the learning rate is that of another batch than the optimizer will see."""
    scale = cfg.get('auto_scale_lr') or {}
    base, seen = scale.get('base_batch_size'), batch_of_step(cfg, world_size)
    if not seen or not base or seen == base or scale.get('enable'):
        return None
    factors = [str(cfg.train_dataloader.batch_size), str(world_size)]
    factors += [str(accumulated(cfg))] if accumulated(cfg) > 1 else []
    return (
        f'The batch is {" x ".join(factors)} = {seen} images and the learning rate is that for '
        f'{base}; --auto-scale-lr fits it.'
    )

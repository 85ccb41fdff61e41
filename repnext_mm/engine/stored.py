"""What a checkpoint says of the run that wrote it, compared with the run that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS
from torch import Tensor

from .errors import UserError
from .finite import first_non_finite
from .literals import assigned
from .schedule import name_of

#: Settings that one optimizer has and another one has not.
TELLING = frozenset(
    ('betas', 'momentum', 'alpha', 'rho', 'lambd', 'etas', 'lr_decay', 'beta2_decay')
)
#: How an optimizer computes, not what.
IMPLEMENTATION = ('fused', 'foreach', 'capturable', 'differentiable')
#: What in a checkpoint a run computes on with.
NUMBERS = ('state_dict', 'ema_state_dict', 'optimizer')

# --- numbers


def require_finite(content: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint with NaN or infinity in its weights, averaged weights or optimizer.

    Raises:
        UserError: The message names the first such entry.
    """
    parts = {key: content[key] for key in NUMBERS if key in content} or content
    for key, part in parts.items():
        if found := first_non_finite(part, '' if key == 'state_dict' else key):
            raise UserError(
                f'{path} has NaN or infinity in {found.removeprefix("module.")}; use a checkpoint '
                'from before the training diverged.'
            )


# --- classes


def checkpoints_classes(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint of a run was trained on, in their order.

    None if it does not say. Those of mmdet 2 and mmseg 0 are found as well.
    """
    meta = content.get('meta') if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get('dataset_meta')
    for place in (dataset, meta):
        for key in ('classes', 'CLASSES'):
            if isinstance(place, Mapping) and (names := _names(place.get(key))):
                return names
    return None


def config_classes(cfg: Config, split: str = 'test') -> tuple[str, ...] | None:
    """The names of the classes of a config, without building its data set; None if unknown."""
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
    while isinstance(dataset, Mapping):
        if names := _names((dataset.get('metainfo') or {}).get('classes')):
            return names
        inner = dataset.get('dataset') or dataset.get('datasets')
        if inner is None:
            built = registered(dataset, cfg.get('default_scope'))
            return _names(getattr(built, 'METAINFO', {}).get('classes'))
        dataset = inner[0] if isinstance(inner, Sequence) else inner
    return None


def registered(dataset: Mapping[str, Any], scope: str | None) -> Any:
    """The class of a data set, if its framework is imported already."""
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    name = kind.rpartition('.')[2]
    registries = [r for r in (DATASETS.children.get(scope), DATASETS) if r is not None]
    return next((r.module_dict[name] for r in registries if name in r.module_dict), None)


def require_classes(content: Mapping[str, Any], classes: Sequence[str] | None, path: str) -> None:
    """Refuse a checkpoint of other classes, or of the same in another order.

    Nothing is known, and nothing refused, where the checkpoint or the config names none.

    Args:
        content: A checkpoint of a run.
        classes: The names of the config's classes.
        path: The file of the checkpoint, for the message.

    Raises:
        UserError: The message has the first class that differs.
    """
    if difference := classes_difference(content, classes, path):
        raise UserError(
            f'{difference}; set metainfo.classes of the data set to those of the checkpoint, in '
            'their order, or use the checkpoint of this config.'
        )


def classes_difference(
    content: Mapping[str, Any], classes: Sequence[str] | None, path: str
) -> str | None:
    """In what the classes of a checkpoint differ from those of a config, without a full stop."""
    stored, own = checkpoints_classes(content), _names(classes)
    if stored is None or own is None or stored == own:
        return None
    if len(stored) != len(own):
        return (
            f'{path} was trained on {len(stored)} classes ({_first(stored)}) and the config has '
            f'{len(own)} ({_first(own)})'
        )
    number = next(i for i, names in enumerate(zip(stored, own, strict=True)) if len({*names}) > 1)
    order = ' in another order' if sorted(stored) == sorted(own) else ''
    return (
        f'{path} was trained on other classes than those of the config{order}: class {number} is '
        f'{stored[number]!r} in the checkpoint and {own[number]!r} in the config'
    )


def _names(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(name.strip() for name in value) or None


def _first(names: Sequence[str], count: int = 5) -> str:
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


# --- the optimizer


def require_optimizer(
    content: Mapping[str, Any], wrapper: BaseOptimWrapper, cfg: Config, path: str
) -> None:
    """Refuse to continue with the state of another optimizer, or of other parameters.

    torch would take it, and fail later or compute with what does not belong together.

    Raises:
        UserError: The message has what the checkpoint holds and what the config asks for.
    """
    wrappers = dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {'': wrapper}
    states = content['optimizer'] if '' not in wrappers else {'': content['optimizer']}
    stored = _optimizer_config(_settings(content).get('optim_wrapper'))
    own = _optimizer_config(cfg.get('optim_wrapper'))
    fault = None
    if stored and own and name_of(stored) != name_of(own):
        fault = f'the state of {name_of(stored)}', name_of(own)
    elif states.keys() != wrappers.keys():
        fault = f'optimizers {", ".join(states)}', ', '.join(wrappers)
    else:
        for name, one in wrappers.items():
            fault = fault or _misfit(states[name], one.optimizer)
    if fault:
        raise UserError(
            f'training cannot continue from {path}: it holds {fault[0]} and the config asks for '
            f'{fault[1]}; use the config beside the checkpoint, or start a new run from its '
            f'weights, without --resume: --cfg-options load_from={path}'
        )


def _misfit(state: Mapping[str, Any], optimizer: Any) -> tuple[str, str] | None:
    """What a state has and what an optimizer needs, if they do not belong together."""
    stored, own = state.get('param_groups', []), optimizer.param_groups
    kinds = [TELLING.intersection(*(group.keys() for group in groups)) for groups in (stored, own)
             if groups]  # fmt: skip
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        settings = [', '.join(sorted(kind)) or 'none of its own' for kind in kinds]
        return (
            f'the state of an optimizer with the settings {settings[0]}',
            f'{type(optimizer).__name__} ({settings[1]})',
        )
    sizes = [[len(group['params']) for group in groups] for groups in (stored, own)]
    if len(sizes[0]) != len(sizes[1]):
        return f'{len(sizes[0])} groups of parameters', str(len(sizes[1]))
    if sizes[0] != sizes[1]:
        number = next(i for i, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b)
        return (
            f'{sizes[0][number]} parameters in group {number} of the optimizer',
            str(sizes[1][number]),
        )
    numbers = [number for group in stored for number in group['params']]
    parameters = [parameter for group in own for parameter in group['params']]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state.get('state', {}).get(number, {}).items():
            # Only these have the shape of their parameter in every optimizer.
            same = key.startswith(('exp_avg', 'max_exp_avg', 'momentum_buffer', 'square_avg'))
            if same and isinstance(value, Tensor) and value.shape != parameter.shape:
                return (
                    f'{key} of shape {tuple(value.shape)} for parameter {number}',
                    str(tuple(parameter.shape)),
                )
    return None


# --- the schedule


def resume_note(content: Mapping[str, Any], cfg: Config) -> str | None:
    """What a continued run takes from its checkpoint although the config says something else.

    mmengine restores the optimizer's settings and the schedulers of the checkpoint; the length of
    the run is the config's.
    """
    stored = _settings(content)
    own = cfg.to_dict()
    kept = [
        f'{path} {old} (config: {new})'
        for key in ('param_scheduler', 'optim_wrapper')
        if key in stored and key in own
        for path, old, new in _differences(key, stored[key], own[key])
        if key == 'param_scheduler' or path.startswith('optim_wrapper.optimizer.')
        if path.rpartition('.')[2] not in IMPLEMENTATION
    ]
    changed = [
        f'{path} {new} (checkpoint: {old})'
        for path, old, new in _differences(
            'train_cfg', stored.get('train_cfg', {}), own.get('train_cfg') or {}
        )
        if path in ('train_cfg.max_epochs', 'train_cfg.max_iters') and 'train_cfg' in stored
    ]
    notes = []
    if kept:
        notes.append(f'of the checkpoint stay {", ".join(kept)}')
    if changed:
        notes.append(f'of the config applies {", ".join(changed)}')
    if changed and not kept:
        notes.append('the schedulers stay as they are')
    return f'On resuming, {"; ".join(notes)}.' if notes else None


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule in the text of the config that mmengine stores with a checkpoint.

    The text is Python, and is not run.
    """
    meta = content.get('meta')
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    names = ('train_cfg', 'param_scheduler', 'optim_wrapper')
    return assigned(text, names) if isinstance(text, str) else {}


def _optimizer_config(wrapper: Any) -> dict[str, Any]:
    optimizer = wrapper.get('optimizer') if isinstance(wrapper, Mapping) else None
    return dict(optimizer) if isinstance(optimizer, Mapping) and 'type' in optimizer else {}


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f'{path}.{key}', old.get(key), new.get(key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) == len(new) and any(isinstance(one, Mapping) for one in old):
            for number, pair in enumerate(zip(old, new, strict=True)):
                yield from _differences(f'{path}.{number}', *pair)
        elif [*old] != [*new]:
            yield path, old, new
    elif old != new:
        yield path, old, new

"""Keywords of a config that nothing reads, and keywords of what stood there before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ...text import closest
from .findings import Finding, error

#: Registries in which the type of a part of a config is looked up.
REGISTRIES = (
    'MODELS',
    'DATASETS',
    'TRANSFORMS',
    'HOOKS',
    'LOOPS',
    'METRICS',
    'PARAM_SCHEDULERS',
    'TASK_UTILS',
    'DATA_SAMPLERS',
    'VISUALIZERS',
)
#: Parts whose keywords a builder takes out before it calls the type, as heads do for their losses.
BUILT_OTHERWISE = (
    'norm_cfg',
    'conv_cfg',
    'act_cfg',
    'init_cfg',
    'upsample_cfg',
    'optim_wrapper',
    'paramwise_cfg',
    'plugins',
    'roi_layer',
    'dcn',
)
#: Keywords that builders add to any type, and of a scheduler.
ALWAYS = {
    'type',
    '_scope_',
    '_delete_',
    'convert_to_iter_based',
    'by_epoch',
    'backend_args',
    'priority',  # of a hook
    'requires_grad',  # of a norm
}
#: What a free variable of a config must resemble to be a slip.
ALIKE = 0.9
#: A shorter variable may resemble a setting by chance, as `models` does.
SHORTEST = 8
#: Keywords of torchvision-like backbones, which stay where a dict is merged instead of replaced.
OF_ANOTHER_BACKBONE = ('depth', 'num_stages', 'style', 'pretrained', 'deep_stem', 'dcn')


def check_keywords(cfg: Config) -> list[Finding]:
    """Find what is misspelled or left over in `cfg`, before anything is built."""
    findings = list(_check_variables(cfg))
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        registries = _registries(scope)
        findings += _check_pretrained(cfg, registries)
        for key in sorted(cfg.keys()):
            if key not in BUILT_OTHERWISE:
                findings += _check_node(cfg[key], key, registries)
    return findings


def _registries(scope: str) -> list[Registry]:
    try:
        module = import_module(f'{scope}.registry')
    except ImportError:
        module = mmengine_registry
    return [getattr(module, name) for name in REGISTRIES if hasattr(module, name)]


def _check_variables(cfg: Config) -> Iterator[Finding]:
    """A config may have variables of any name, but hardly one that is nearly a setting."""
    known = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
    known |= {'auto_scale_lr', 'find_unused_parameters', 'runner_type', 'sample_data_root'}
    for key in cfg:
        if len(key) >= SHORTEST and key not in known and (meant := closest(key, known, ALIKE)):
            yield error(f'the config sets {key}, which nothing reads; did you mean {meant}?')
    loader = _keywords(DataLoader)
    assert loader is not None
    for split in ('train', 'val', 'test'):
        given = cfg.get(f'{split}_dataloader') or {}
        keywords = Keywords(loader.names | {'num_batch_per_epoch'}, False)
        yield from _unknown(given, keywords, f'{split}_dataloader')
    training = cfg.get('train_cfg')
    if isinstance(training, Mapping) and 'type' not in training:
        loops = [_keywords(EpochBasedTrainLoop), _keywords(IterBasedTrainLoop)]
        names = frozenset[str]().union(*(loop.names for loop in loops if loop))
        yield from _unknown(training, Keywords(names, False), 'train_cfg')


def _check_pretrained(cfg: Config, registries: list[Registry]) -> Iterator[Finding]:
    for path, node in (('model', cfg.model), ('model.backbone', cfg.model.get('backbone') or {})):
        weights = node.get('pretrained')
        backbone = cfg.model.get('backbone')
        if not weights or not isinstance(backbone, Mapping):
            continue
        known = _keywords(_look_up(backbone.get('type'), registries))
        if known is not None and not known.any and 'pretrained' not in known.names:
            yield error(
                f'{path}.pretrained is {weights!r}, and {backbone.get("type")} takes no such '
                f'argument; set {path}.pretrained=None, and for weights of its own '
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...)."
            )


def _check_node(node: Any, path: str, registries: list[Registry]) -> Iterator[Finding]:
    if isinstance(node, list | tuple):
        for number, item in enumerate(node):
            yield from _check_node(item, f'{path}.{number}', registries)
        return
    if not isinstance(node, Mapping):
        return
    if 'type' in node:
        known = _keywords(_look_up(node['type'], registries))
        if known is not None:
            if path == 'model.backbone':  # named by `_check_pretrained`
                known = Keywords(known.names | {'pretrained'}, known.any)
            yield from _unknown(node, known, path, str(node['type']))
    for key, value in node.items():
        if not key.startswith('loss') and key not in BUILT_OTHERWISE:
            yield from _check_node(value, f'{path}.{key}', registries)


def _unknown(
    node: Mapping[str, Any], known: Keywords, path: str, kind: str | None = None
) -> Iterator[Finding]:
    unknown = [
        key
        for key in node
        if isinstance(key, str)
        and key not in known.names | ALWAYS
        and (not known.any or closest(key, known.names, ALIKE))
    ]
    if not unknown:
        return
    what = f'{path} (type={kind!r})' if kind else path
    left = [key for key in unknown if key in OF_ANOTHER_BACKBONE]
    if left and path.endswith('backbone'):
        yield error(
            f'{what} has the arguments {", ".join(unknown)} of another backbone, with which it was '
            'merged; add _delete_=True to the dict that exchanges the backbone.'
        )
        return
    key = unknown[0]
    meant = closest(key, known.names)
    hint = f'did you mean {meant}?' if meant else f'it takes {", ".join(sorted(known.names))}.'
    yield error(f'{what} has no argument {key!r} (given {key}={_shown(node[key])}); {hint}')


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _look_up(kind: Any, registries: list[Registry]) -> Any:
    """The class or function of a type, if exactly one registry has it."""
    if not isinstance(kind, str):
        return kind if inspect.isclass(kind) else None
    found = {id(got): got for registry in registries if (got := _get(registry, kind)) is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def _get(registry: Registry, kind: str) -> Any:
    try:
        return registry.get(kind)
    except Exception:  # a registry of a package that is not there
        return None


@dataclass(frozen=True)
class Keywords:
    """What a class takes by name; `any` if it passes further ones on, nobody knows where."""

    names: frozenset[str]
    any: bool


def _keywords(cls: Any) -> Keywords | None:
    """The keywords of `cls`, with those of its bases where it takes any."""
    if not inspect.isclass(cls):
        return None
    cls = getattr(cls, 'import_class', lambda: cls)()  # ours are imported when they are needed
    names: set[str] = set()
    passes_on = False
    for base in inspect.getmro(cls):
        if base in (object, torch.nn.Module):
            break
        if '__init__' not in vars(base):
            continue
        try:
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        except ValueError:
            return None
        names |= {
            p.name
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != 'self'
        }
        passes = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not passes:
            break
        passes_on = True
    return Keywords(frozenset(names), passes_on)

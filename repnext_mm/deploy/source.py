"""What to deploy: MODEL and CHECKPOINT of the command line, as a model with weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import FAMILIES, PyramidBackbone, names
from ..checkpoints import CheckpointError, fetch, load_pretrained, read_weights
from ..checkpoints.matching import find_fit
from ..checkpoints.reading import Weights
from ..classification.tested import is_classifier, known_classes, tested_normalization, tested_size
from ..configs import is_config_name
from ..engine.errors import UserError
from ..network import Network, Plan
from ..text import closest
from .calibration import config_loader
from .errors import ModelError, UsageError

#: Every name that MODEL may be, with its family and arch.
NAMES = names()
WEIGHT_SUFFIXES = ('.pth', '.pt', '.tar', '.safetensors', '.bin')


@dataclass
class Source:
    """A model to deploy.

    Args:
        name: What its artifacts are called.
        model: The model as its checkpoint holds it, in eval mode: what all else is compared with.
        weights: 'random' or 'checkpoint'.
        scope: 'backbone', or 'model' for a complete detector or segmentor.
        checkpoint: Where the weights are from.
        checkpoint_sha256: Of that file.
        container: Under which key of it they were.
        config: The config it is from.
        cfg: The same, read.
        preprocessor: The config's `data_preprocessor`.
        classes: The names of the config's classes.
        loader: How the config loads images, for `read_image`.
    """

    name: str
    model: Any
    weights: str
    scope: str = 'backbone'
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    container: str = ''
    config: str | None = None
    cfg: Any = None
    preprocessor: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    loader: dict[str, Any] | None = None

    @property
    def family(self) -> str:
        """The class of the network, or of the complete model."""
        network = getattr(self.model, 'network', None)
        return type(self.model if network is None else network).__name__

    @property
    def size(self) -> tuple[int, int]:
        """The size of images to export at, where none is asked for."""
        if self.cfg is not None and is_classifier(self.cfg):
            return tested_size(self.cfg)
        return 512, 512

    @property
    def arch(self) -> str | dict[str, Any]:
        """What `arch=` builds this network, or the backbone of this model, from."""
        network = self.model if self.scope == 'backbone' else network_in(self.model)
        if not isinstance(network, PyramidBackbone):
            return type(network).__name__
        return network.arch if network.arch in network.arch_zoo else network.settings

    @property
    def plan(self) -> str | None:
        """The plan that its backbone was fused with already."""
        plans = [m.plan for m in self.model.modules() if isinstance(m, Network)]
        return next((plan for plan in plans if plan is not None), None)


def load_source(
    name: str,
    checkpoint: str | None = None,
    *,
    out_indices: tuple[int, ...] | None = None,
    allow_partial: bool = False,
    seed: int = 0,
    scope: str | None = None,
) -> Source:
    """Build the model `name` (arch name, config, or weight file) and load its weights.

    Args:
        scope: 'backbone', or 'model' for all of a config's detector or segmentor; None is 'model'
            for a config with a checkpoint of a complete model.

    Raises:
        ModelError: There is no such model, or the checkpoint cannot be used for it.
    """
    try:
        is_config = name not in NAMES and is_config_name(name)
        if scope == 'model' and not (is_config and checkpoint):
            raise UsageError('--scope model needs the config of a training and its checkpoint.')
        if is_config and checkpoint and scope != 'backbone' and out_indices is None:
            complete = read_weights(fetch(checkpoint))
            if scope == 'model' or _is_complete(complete) or is_classifier(_config(name)):
                return _load_complete(name, complete, allow_partial)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            source, weights = _build_source(name, checkpoint is None, out_indices)
        if checkpoint is not None:
            weights = read_weights(fetch(checkpoint))
        if weights is None:
            draw_weights(source.model, seed)
        else:
            _load(source, weights, allow_partial)
    except (ModelError, UsageError):
        raise
    except (ValueError, UserError) as error:
        text = str(error).replace('allow_partial=True', '--allow-partial')
        raise ModelError(text) from error
    source.model.eval()
    return source


def _build_source(
    name: str, alone: bool, out_indices: tuple[int, ...] | None
) -> tuple[Source, Weights | None]:
    """The network `name` as initialized, and its weights if it is a weight file.

    `alone` says that no checkpoint for it is given.
    """
    if name in NAMES:
        family, arch = NAMES[name]
        return Source(name, _build(family, {'arch': arch}, out_indices), 'random'), None
    if is_config_name(name):
        return _from_config(name, out_indices), None
    if name.endswith(WEIGHT_SUFFIXES) and alone:
        weights = read_weights(fetch(name))
        return _from_weights(weights, out_indices), weights
    close = closest(name.lower(), NAMES)
    hint = f' Did you mean {close!r}?' if close else ''
    raise ModelError(
        f'there is no model {name!r}.{hint} Give a config (.py), a weight file, or one of '
        f'{", ".join(NAMES)}.'
    )


def _build(
    family: type[PyramidBackbone], arguments: dict[str, Any], out_indices: tuple[int, ...] | None
) -> PyramidBackbone:
    if out_indices is not None:
        arguments = arguments | {'out_indices': out_indices}
    return family(**arguments)


def _config(path: str) -> Any:
    from ..engine.config_file import load_config

    return load_config(path, {}, None, 'none')


def network_in(model: Any) -> Any:
    """The backbone of a detector or segmentor, or the network of a classifier."""
    return model.backbone if hasattr(model, 'backbone') else model.network


def _from_config(path: str, out_indices: tuple[int, ...] | None) -> Source:
    from mmengine.registry import MODELS

    from ..engine.stored import config_classes

    cfg = _config(path)
    if is_classifier(cfg):
        raise ModelError(f'{path} is of a classifier; give its checkpoint as well.')
    settings = dict(cfg.model.get('backbone') or {})
    kind = settings.pop('type', None)
    family = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(family, type) and issubclass(family, PyramidBackbone)):
        raise ModelError(
            f'the backbone of {path} is {kind!r}, which this package cannot deploy; it deploys '
            f'{", ".join(f.__name__ for f in FAMILIES.values())}.'
        )
    for training_only in ('init_cfg', 'deploy', 'with_cp', 'drop_path_rate', 'frozen_stages'):
        settings.pop(training_only, None)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    return Source(
        Path(path).stem,
        _build(family, settings, out_indices),
        'random',
        config=path,
        cfg=cfg,
        preprocessor=dict(preprocessor) if preprocessor else None,
        classes=config_classes(cfg),
        loader=config_loader(cfg),
    )


def _from_weights(weights: Weights, out_indices: tuple[int, ...] | None) -> Source:
    fit = find_fit({key: tensor.shape for key, tensor in weights.tensors.items()})
    if fit is None or fit.arch is None:
        raise ModelError(
            f'{weights.label} fits no network of this package; give the config or the arch name, '
            'then the checkpoint.'
        )
    name, (family, arch) = next(
        (name, row) for name, row in NAMES.items() if row == (fit.family, fit.arch)
    )
    return Source(name, _build(family, {'arch': arch}, out_indices), 'random')


def _load(source: Source, weights: Weights, allow_partial: bool) -> None:
    """Load into the network; a fused file makes it the fused network of that plan."""
    from ..engine.stored import require_classes

    require_classes({'meta': weights.meta}, source.classes, weights.label)
    model = source.model
    fit = find_fit({key: tensor.shape for key, tensor in weights.tensors.items()}, like=model)
    if fit is not None and fit.plan is not None and fit.family is type(model):
        model = type(model)(source.arch, out_indices=model.out_indices, deploy=fit.plan)
    report = load_pretrained(model, weights, allow_partial=allow_partial)
    if report.non_finite:
        raise CheckpointError(
            f'{weights.label} has NaN or infinity in {report.non_finite[0]}; give a checkpoint '
            'from before the training diverged.'
        )
    source.model = model
    _note(source, weights)


def _note(source: Source, weights: Weights) -> None:
    """Say in the source where its weights are from."""
    source.weights = 'checkpoint'
    source.checkpoint, source.checkpoint_sha256 = weights.label, weights.sha256
    source.container = weights.container


# --- complete models


def _is_complete(weights: Weights) -> bool:
    """Whether a file has more than a backbone, by the names of its tensors."""
    return any(re.search(r'(^|\.)\w*head\.', key) for key in weights.tensors) and any(
        re.search(r'(^|\.)backbone\.', key) for key in weights.tensors
    )


def _load_complete(path: str, weights: Weights, allow_partial: bool) -> Source:
    """The detector or segmentor of a config, with the weights of a file."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope

    from ..engine.frameworks import import_framework
    from ..engine.preflight import check_config, require
    from ..engine.preflight.model import check_model
    from ..engine.resume import require_fit
    from ..engine.stored import config_classes, require_classes

    cfg = _config(path)
    classifies = is_classifier(cfg)
    import_framework(cfg.get('default_scope'))
    require(check_config(cfg))
    tensors = {_plain(key): tensor for key, tensor in weights.tensors.items()}
    if classifies and not any(key.startswith('network.') for key in tensors):
        tensors = {f'network.{key}': tensor for key, tensor in tensors.items()}  # a published file

    def build(plan: Plan | None) -> Any:
        settings = copy.deepcopy(cfg.model)
        if 'pretrained' in settings:
            settings.pretrained = None
        for backbone in backbone_configs(settings):
            backbone.init_cfg = None
            if plan is not None:
                backbone.deploy = plan
        if classifies:
            settings.update(teacher=None, pretrained=False, **({'deploy': plan} if plan else {}))
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            return revert_sync_batchnorm(MODELS.build(settings)).eval()

    model = build(None)
    if plan := _fused_with(tensors, model):
        model = build(plan)
    classes = config_classes(cfg)
    require_classes({'meta': weights.meta}, classes, weights.label)
    content = {'state_dict': tensors, 'meta': weights.meta}
    require_fit(model, content, weights.label, least=0.0 if allow_partial else 1.0)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fitting = {k: v for k, v in tensors.items() if shapes.get(k) == v.shape}
    model.load_state_dict(fitting, strict=False)
    require(check_model(model, classes))
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    if classifies:
        preprocessor = tested_normalization(cfg)
        classes = classes or _meta_classes(weights) or known_classes(model.num_classes)
    source = Source(
        Path(path).stem,
        model.eval(),
        'checkpoint',
        scope='model',
        config=path,
        cfg=cfg,
        preprocessor=dict(preprocessor) if preprocessor else None,
        classes=classes or _meta_classes(weights),
        loader=config_loader(cfg),
    )
    _note(source, weights)
    return source


def _plain(key: str) -> str:
    """A key without what wrappers (DDP, averages, torch.compile) put before it."""
    return re.sub(r'^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.', '', key)


def _fused_with(tensors: Mapping[str, torch.Tensor], model: Any) -> Plan | None:
    """The plan that the backbone in a file is fused with, where it is this package's."""
    backbone = network_in(model)
    if not isinstance(backbone, Network) or backbone.plan is not None:
        return None
    prefix = 'backbone.' if hasattr(model, 'backbone') else 'network.'
    shapes = {k: t.shape for k, t in tensors.items() if k.startswith(prefix)}
    fit = find_fit(shapes, prefix, like=backbone) if shapes else None
    return fit.plan if fit is not None else None


def _meta_classes(weights: Weights) -> tuple[str, ...] | None:
    from ..engine.stored import checkpoints_classes

    return checkpoints_classes({'meta': weights.meta})


def backbone_configs(node: Any) -> Iterator[Any]:
    """Every part of a model's config that builds one of this package's backbones."""
    from mmengine.registry import MODELS

    if isinstance(node, dict):
        kind = node.get('type')
        family = MODELS.get(kind) if isinstance(kind, str) else kind
        if isinstance(family, type) and issubclass(family, Network):
            yield node
        for value in node.values():
            yield from backbone_configs(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from backbone_configs(value)


# --- random weights


@torch.no_grad()
def draw_weights(model: PyramidBackbone, seed: int = 0) -> None:
    """Random weights for which a comparison means something, in place.

    As initialised, norms are identities and biases and layer scales next to nothing, which would
    hide mistakes of fusion and export. Here they are drawn, and the norms' statistics are measured
    on noise, so that signals keep their size through any depth.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.copy_(uniform(module.bias, -0.5, 0.5))
    for name, parameter in model.named_parameters():
        if name.endswith('gamma'):  # layer scale
            parameter.copy_(uniform(parameter, 0.3, 0.7))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
        norm.bias.copy_(uniform(norm.bias, -0.5, 0.5))
    side = 2 * max(model.strides)
    model.train()
    model(torch.randn(4, 3, side, side, generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()

"""What to deploy: MODEL and CHECKPOINT of the command line, as a network with weights."""

from __future__ import annotations

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
from ..configs import is_config_name
from ..engine.errors import UserError
from ..text import closest
from .calibration import config_loader
from .errors import ModelError

#: Every name that MODEL may be, with its family and arch.
NAMES = names()
WEIGHT_SUFFIXES = ('.pth', '.pt', '.tar', '.safetensors', '.bin')


@dataclass
class Source:
    """A network to deploy.

    Args:
        name: What its artifacts are called.
        model: The network as its checkpoint holds it, in eval mode: what all else is compared with.
        weights: 'random' or 'checkpoint'.
        checkpoint: Where the weights are from.
        checkpoint_sha256: Of that file.
        config: The config it is from.
        preprocessor: The config's `data_preprocessor`.
        classes: The names of the config's classes.
        loader: How the config loads images, for `read_image`.
    """

    name: str
    model: PyramidBackbone
    weights: str
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    config: str | None = None
    preprocessor: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    loader: dict[str, Any] | None = None

    @property
    def arch(self) -> str | dict[str, Any]:
        """What `arch=` builds this network from."""
        named = self.model.arch in self.model.arch_zoo
        return self.model.arch if named else self.model.settings


def load_source(
    name: str,
    checkpoint: str | None = None,
    *,
    out_indices: tuple[int, ...] | None = None,
    allow_partial: bool = False,
    seed: int = 0,
) -> Source:
    """Build the network `name` (arch name, config, or weight file) and load its weights.

    Raises:
        ModelError: There is no such model, or the checkpoint cannot be used for it.
    """
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            source, weights = _build_source(name, checkpoint is None, out_indices)
        if checkpoint is not None:
            weights = read_weights(fetch(checkpoint))
        if weights is None:
            draw_weights(source.model, seed)
        else:
            _load(source, weights, allow_partial)
    except ModelError:
        raise
    except (ValueError, UserError) as error:
        raise ModelError(str(error)) from error
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


def _from_config(path: str, out_indices: tuple[int, ...] | None) -> Source:
    from mmengine.registry import MODELS

    from ..engine.config_file import load_config
    from ..engine.stored import config_classes

    cfg = load_config(path, {}, None, 'none')
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
    source.weights = 'checkpoint'
    source.checkpoint = weights.label
    source.checkpoint_sha256 = weights.sha256


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

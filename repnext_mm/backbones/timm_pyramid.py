"""Any network of timm as a backbone, under the contract of this package's own.

So that "is it better than what I have" is one line of a config: the rivals of the papers' table 4,
such as RepViT, FastViT, EfficientFormerV2, SwiftFormer and ConvNeXt, are built with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints import CheckpointError, fetch, read_weights
from .timm_names import require_timm_name

#: Where in a checkpoint the network is: of timm, of a classifier, of a detector or segmentor.
PREFIXES = ('', 'network.', 'backbone.network.', 'module.', 'model.')


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class TimmPyramid(BaseModule):
    """A network of timm as a feature pyramid.

    Args:
        model_name: timm's name, with its tag where there are several weights.
        pretrained: Load timm's weights. `init_cfg` is for weights of other places.
        out_indices: Levels of the network to return, increasing; None for the last four. Level i
            of most networks has the stride 4 * 2^i or 2 * 2^i: `out_strides` says which.
        frozen_stages: -1 freezes nothing, 0 what comes before the first level, k the first k
            levels too.
        norm_eval: Keep every BatchNorm in eval mode while training.
        with_cp: Recompute activations in backward, where the network can.
        **kwargs: Further arguments of `timm.create_model`, such as `drop_path_rate`.

    Attributes:
        out_channels: Channels of each returned level.
        out_strides: Its stride with respect to the image.

    Raises:
        ValueError: timm has no such network, or it has not these levels.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        require_timm_name(model_name)
        self.model_name = model_name
        levels = _levels(model_name, kwargs)
        chosen = tuple(range(len(levels)))[-4:] if out_indices is None else tuple(out_indices)
        allowed = range(len(levels))
        if not chosen or any(i not in allowed for i in chosen) or sorted(set(chosen)) != [*chosen]:
            shown = ', '.join(f'{i} (stride {stride})' for i, stride in enumerate(levels))
            raise ValueError(
                f'out_indices={chosen} must be increasing levels of {model_name}: {shown}.'
            )
        if frozen_stages not in range(-1, len(levels) + 1):
            raise ValueError(
                f'frozen_stages={frozen_stages} is not allowed; -1 freezes nothing, 0 what comes '
                f'before the first level, 1 to {len(levels)} so many levels too.'
            )
        self.out_indices, self.frozen_stages, self.norm_eval = chosen, frozen_stages, norm_eval
        self.network = timm.create_model(
            model_name, pretrained=pretrained, features_only=True, out_indices=chosen, **kwargs
        )
        if with_cp:
            self.network.set_grad_checkpointing()
        info = self.network.feature_info
        self.out_channels: tuple[int, ...] = tuple(info.channels())
        self.out_strides: tuple[int, ...] = tuple(info.reduction())
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`(N, 3, H, W)` to one `(N, C_i, H / stride_i, W / stride_i)` per level."""
        outs = self.network(x)
        if str(getattr(self.network, 'output_fmt', 'NCHW')).endswith('NHWC'):
            outs = [out.permute(0, 3, 1, 2).contiguous() for out in outs]
        return tuple(outs)

    def init_weights(self) -> None:
        """Load what `init_cfg` names; timm has initialized the network otherwise.

        MMEngine would call the `init_weights` of timm's parts, which draws new weights.
        """
        cfg = self.init_cfg
        if self.is_init or not isinstance(cfg, dict):
            return
        if cfg.get('type') != 'Pretrained':
            raise ValueError(f'init_cfg type {cfg.get("type")!r} is not allowed; give Pretrained.')
        weights = read_weights(fetch(cfg['checkpoint']), container=cfg.get('container'))
        own = self.network.state_dict()

        def below(prefix: str) -> dict[str, Tensor]:
            pairs = {}
            for key, value in own.items():
                for name in (prefix + key, prefix + _unflattened(key)):
                    given = weights.tensors.get(name)
                    if given is not None and given.shape == value.shape:
                        pairs[key] = given
            return pairs

        fitting = max((below(prefix) for prefix in PREFIXES), key=len)
        if len(fitting) < 0.99 * len(own):
            raise CheckpointError(
                f'{cfg["checkpoint"]} does not fit TimmPyramid({self.model_name!r}): '
                f'{len(fitting)} of {len(own)} entries match.'
            )
        self.network.load_state_dict(fitting, strict=False)
        print_log(
            f'TimmPyramid({self.model_name!r}) <- {weights.label} ({weights}): {len(fitting)} of '
            f'{len(own)} entries.',
            'current',
        )
        self._is_init = True

    def train(self, mode: bool = True) -> TimmPyramid:
        """Set the mode; frozen levels, and with `norm_eval` all BatchNorms, stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        """The parts of the network up to the end of the last frozen level."""
        if self.frozen_stages < 0:
            return []
        ends = [level['module'] for level in _info(self.network)]
        flat = {end.replace('.', '_') for end in ends}
        found, done = [], 0
        for name, module in _parts(self.network, ends):
            ended = name.replace('.', '_') in flat
            done += ended
            if done > self.frozen_stages:
                break
            found.append(module)
            if ended and done == self.frozen_stages:
                break
        return found


def _info(network: Any) -> list[dict[str, Any]]:
    return network.feature_info.info


def _parts(network: nn.Module, ends: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network in order, each whole unless a level ends inside of it."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f'{prefix}{name}'
            if any(end.startswith(f'{path}.') for end in ends):
                yield from walk(child, f'{path}.')
            else:
                yield path, child

    # A network behind hooks is called `model` in its wrapper.
    inner = getattr(network, 'model', network)
    yield from walk(inner, '')


def _levels(model_name: str, kwargs: dict[str, Any]) -> list[int]:
    """The stride of every level of a network."""
    with torch.device('meta'):
        network = timm.create_model(model_name, features_only=True, **kwargs)
    return [int(level['reduction']) for level in network.feature_info.info]


def _unflattened(key: str) -> str:
    """A key of a classifier, where timm's wrapper of features has put `stages_0` for `stages.0`."""
    return re.sub(r'^([a-z_]+?)_(\d+)\.', r'\1.\2.', key)

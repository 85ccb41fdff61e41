"""Models of the published configs of mmdet and mmseg, with an eighth of the channels."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

EIGHTH = {channels: channels // 8 for channels in (256, 384, 512, 1024, 2048)}


def narrow(value: Any, settings: dict[str, Any], channels: dict[int, int]) -> Any:
    """A config with other numbers of channels, without pretrained weights and processes."""
    if isinstance(value, dict):
        return {
            key: settings.get(key, narrow(item, settings, channels))
            for key, item in value.items()
            if key not in ('init_cfg', 'pretrained')
        }
    if isinstance(value, (list, tuple)):
        return type(value)(narrow(item, settings, channels) for item in value)
    if value == 'SyncBN':  # for CUDA
        return 'BN'
    return channels.get(value, value) if type(value) is int else value


def narrowed(
    package: Any,
    name: str,
    settings: dict[str, Any],
    changes: dict[str, Any],
    full: bool = False,
) -> Config:
    """The model of a published config, narrow; `settings` replace keys wherever they are."""
    folder = Path(package.__path__[0]) / '.mim' / 'configs'
    model = Config.fromfile(folder / f'{name}.py').model.to_dict()
    model = Config(narrow(model, settings, {} if full else EIGHTH))
    if 'ResNet' in model.backbone.type and not full:
        model.backbone.base_channels = 8
    model.merge_from_dict(changes)
    return model


def build(
    scope: str, name: str, changes: dict[str, Any] | None = None, full: bool = False
) -> tuple[Any, Any]:
    """A published model in eval mode with random weights, and its `data_preprocessor`'s config.

    With `full`, its channels are left as they are.
    """
    package = import_module(scope)
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    registry = import_module(f'{scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(scope), torch.random.fork_rng():
        torch.manual_seed(0)
        config = narrowed(package, name, {}, changes or {}, full)
        model = registry.build(config).eval()
    return model, config.data_preprocessor


#: Last layers of heads: standard deviation and mean of what they shall return.
LAST = {
    'rpn_cls': (2, -2), 'rpn_reg': (0.5, 0), 'fc_cls': (1.5, 0), 'fc_reg': (1, 0),
    'conv_logits': (2, 0), 'retina_cls': (1.2, -3), 'retina_reg': (0.5, 0), 'conv_cls': (1.2, -3),
    'conv_reg': (0.5, 1), 'conv_centerness': (1.5, 0), 'atss_cls': (1.2, -3),
    'atss_reg': (0.5, 0), 'atss_centerness': (1.5, 0), 'gfl_cls': (1.2, -3), 'gfl_reg': (1.5, 0),
    'rtm_cls': (1.2, -3), 'rtm_reg': (0.5, 1), 'rtm_kernel': (0.5, 0), 'conv_seg': (3, 0),
    'multi_level_conv_cls': (1.2, -3), 'multi_level_conv_reg': (0.5, 0),
    'multi_level_conv_obj': (1.5, 0), 'cls_score': (1.2, -2), 'object_pred': (1, 0),
    'bbox_pred': (0.5, 0),
}  # fmt: skip


@torch.no_grad()
def spread(model: Any, run: Any) -> None:
    """Random last layers, scaled so that scores and boxes vary and hardly two are equal.

    As initialized, a head gives every box nearly the same score, and the order of equals is left
    to chance.

    Args:
        run: Predicts once, so that the layers can be measured.
    """
    generator = torch.Generator().manual_seed(5)
    seen: set[str] = set()

    def scaled(name: str, key: str) -> Any:
        std, mean = LAST[key]

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name in seen:
                return None
            seen.add(name)
            # Classes of pixels vary from place to place, and not only from class to class.
            axes = (0, 2, 3) if key == 'conv_seg' else tuple(range(output.ndim))
            factor = std / output.std(axes).clamp(min=1e-9)
            shift = mean - factor * output.mean(axes)
            module.weight.mul_(factor.reshape(-1, *[1] * (module.weight.ndim - 1)))
            rank = (-1, 1, 1) if key == 'conv_seg' else ()
            if module.bias is None:
                return output * factor.reshape(rank)
            module.bias.mul_(factor).add_(shift)
            return output * factor.reshape(rank) + shift.reshape(rank)

        return hook

    hooks = []
    for name, module in model.named_modules():
        key = next((part for part in name.split('.') if part in LAST), None)
        if key is not None and isinstance(module, nn.Conv2d | nn.Linear):
            drawn = torch.randn(module.weight.shape, generator=generator)
            module.weight.copy_(0.05 * drawn)
            hooks.append(module.register_forward_hook(scaled(name, key)))
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()

"""The model against itself and against the data: channels, stages, strides, classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from .findings import Finding, error, some

#: Height and width of the image that goes through the network.
SIZE = 256
#: Heads whose number of classes is that of the data set.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
NORMS = (nn.modules.batchnorm._BatchNorm,)


def check_architecture(cfg: Config) -> list[Finding]:
    """Compare the outputs of the backbone of `cfg` with what neck and heads are set up for.

    The backbone is built without memory for weights (on torch's meta device), in a moment; what
    cannot be built so is left to `check_model`.
    """
    scope = cfg.get('default_scope')
    settings = cfg.model.get('backbone')
    if scope in (None, 'mmengine') or not isinstance(settings, Mapping) or 'type' not in settings:
        return []
    settings = copy.deepcopy(dict(settings))
    for key in ('init_cfg', 'pretrained'):
        settings.pop(key, None)
    models = import_module(f'{scope}.registry').MODELS
    try:
        with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
            backbone = models.build(settings).eval()
            channels = settings.get('in_channels', 3)
            with torch.no_grad():
                outputs = backbone(torch.zeros(1, channels, SIZE, SIZE))
    except Exception:  # building the model says why
        return []
    if not isinstance(outputs, list | tuple) or not all(isinstance(o, Tensor) for o in outputs):
        return []
    widths = [output.shape[1] for output in outputs]
    findings = [*_check_image_channels(cfg, settings), *_check_neck(cfg, settings, widths)]
    if not cfg.model.get('neck'):
        findings += _check_seg_heads(cfg, widths, str(settings['type']))
    elif not findings:
        findings += _check_seg_heads(cfg, *_neck_widths(cfg, len(widths)))
    return findings


def _check_image_channels(cfg: Config, backbone: Mapping[str, Any]) -> Iterator[Finding]:
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean, channels = preprocessor.get('mean'), backbone.get('in_channels', 3)
    if isinstance(mean, list | tuple) and isinstance(channels, int) and len(mean) != channels:
        yield error(
            f'model.backbone.in_channels is {channels}, and data_preprocessor.mean has {len(mean)} '
            "values, one for each channel of an image; set both alike (color_type='grayscale' in "
            'LoadImageFromFile gives images of one channel).'
        )


def _check_neck(cfg: Config, backbone: Mapping[str, Any], widths: list[int]) -> Iterator[Finding]:
    neck = cfg.model.get('neck')
    for place, part in enumerate(neck if isinstance(neck, list | tuple) else [neck]):
        if place or not isinstance(part, Mapping):
            return
        given = part.get('in_channels')
        if isinstance(given, int):
            given = [given]
            expected = widths[-1:]
        else:
            expected = widths
        if given is None or list(given) == expected:
            return
        path = 'model.neck' if neck is part else 'model.neck.0'
        stages = backbone.get('out_indices')
        which = f' with out_indices={tuple(stages)}' if stages is not None else ''
        yield error(
            f'{path}.in_channels is {list(given)}, and the backbone {backbone["type"]}{which} has '
            f'{len(widths)} outputs of {widths} channels; set {path}.in_channels={widths}, or '
            f'out_indices of the backbone for {len(given)} outputs.'
        )


def _neck_widths(cfg: Config, outputs: int) -> tuple[list[int] | None, str]:
    neck = cfg.model.neck
    width = neck.get('out_channels') if isinstance(neck, Mapping) else None
    if not isinstance(width, int):
        return None, ''
    return [width] * neck.get('num_outs', outputs), str(neck.get('type'))


def _check_seg_heads(cfg: Config, widths: list[int] | None, source: str) -> Iterator[Finding]:
    """The heads of mmseg take outputs by `in_index`."""
    if widths is None or cfg.get('default_scope') != 'mmseg':
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = cfg.model.get(name) or []
        for number, head in enumerate(heads if isinstance(heads, list | tuple) else [heads]):
            path = f'model.{name}' if head is heads else f'model.{name}.{number}'
            given, index = head.get('in_channels'), head.get('in_index', -1)
            if given is None or ('in_index' not in head and isinstance(given, list | tuple)):
                continue
            many = isinstance(index, list | tuple)
            indices = list(index) if many else [index]
            if any(not -len(widths) <= i < len(widths) for i in indices):
                yield error(
                    f'{path}.in_index is {index}, and {source} has {len(widths)} outputs; give '
                    f'numbers from 0 to {len(widths) - 1}.'
                )
                continue
            expected = [widths[i] for i in indices]
            if (list(given) if isinstance(given, list | tuple) else [given]) != expected:
                fix = expected if isinstance(given, list | tuple) else expected[0]
                yield error(
                    f'{path}.in_channels is {given}, and outputs {index} of {source} have '
                    f'{expected} channels; set {path}.in_channels={fix}.'
                )


# --- the model as it is built


def check_model(
    model: BaseModel,
    classes: Sequence[str] | None,
    batch_size: int | None = None,
    crop: tuple[int, int] | None = None,
) -> list[Finding]:
    """Compare a built model with the classes of its data, and its levels with each other.

    Args:
        model: A detector or segmentor; it is what it was afterwards.
        classes: Of the data set.
        batch_size: Images of one training step on one device; None if it is not trained.
        crop: Height and width of a training image, where `batch_size` is 1.
    """
    findings = list(_check_num_classes(model, classes)) if classes else []
    if hasattr(model, 'extract_feat'):
        levels = _levels(model)
        if levels is not None:
            findings += _check_strides(model, levels)
        if batch_size == 1 and crop is not None:
            findings += _check_norms(model, crop)
    return findings


def _check_num_classes(model: nn.Module, classes: Sequence[str]) -> Iterator[Finding]:
    if hasattr(model, 'language_model'):
        return  # its classes are words
    wrong = []
    for name, module in model.named_modules():
        parts = [part for part in name.split('.') if not part.isdecimal()]
        count = getattr(module, 'num_classes', None)
        if not parts or parts[-1] not in HEADS or not isinstance(count, int):
            continue
        if getattr(module, 'class_agnostic', False) or hasattr(module, 'num_things_classes'):
            continue
        if count != len(classes):
            wrong.append((f'model.{name}', count))
    if wrong:
        options = ' '.join(f'{path}.num_classes={len(classes)}' for path, _ in wrong)
        yield error(
            f'{wrong[0][0]} has num_classes={wrong[0][1]}, but the data has {len(classes)} classes '
            f'({some(classes)}); add --cfg-options {options}'
        )


@contextmanager
def _looked_at(model: nn.Module) -> Iterator[Tensor]:
    """An image for `model`, which is in eval mode, takes no gradient, and is left as it was."""
    modes = {module: module.training for module in model.modules()}
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield torch.zeros(1, 3, SIZE, SIZE, device=weight.device, dtype=weight.dtype)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _levels(model: BaseModel) -> list[Tensor] | None:
    """The feature maps for the heads; None for a network that takes something else."""
    with _looked_at(model) as image:
        try:
            levels = model.extract_feat(image)
        except Exception:  # no error of the user is left here: the first step of the run shows it
            return None
    if not isinstance(levels, list | tuple):
        return None
    levels = list(levels)
    return levels if all(isinstance(x, Tensor) and x.dim() == 4 for x in levels) else None


def _check_strides(model: nn.Module, levels: Sequence[Tensor]) -> Iterator[Finding]:
    measured = [SIZE // max(1, level.shape[-1]) for level in levels]
    for name in ('rpn_head', 'bbox_head'):
        head = getattr(model, name, None)
        generator = getattr(head, 'prior_generator', None)
        strides = _strides(getattr(generator, 'strides', None))
        # Other strides than powers of two, as SSD's, are not measured by one image.
        plain = strides and all(stride & (stride - 1) == 0 for stride in strides)
        if plain and strides != measured:
            yield error(
                f'model.{name} places its priors with the strides {strides}, and the feature maps '
                f'have the strides {measured}, so priors and objects do not meet; set out_indices '
                'of the backbone, and in_channels, start_level and num_outs of the neck, so that '
                'both are equal, or strides of the '
                f'{type(generator).__name__} to {measured}.'
            )
    for name, module in model.named_modules():
        strides = _strides(getattr(module, 'featmap_strides', None))
        if strides and strides != measured[: len(strides)]:
            yield error(
                f'model.{name}.featmap_strides is {strides}, and the feature maps have the strides '
                f'{measured}; set featmap_strides={measured[: len(strides)]}.'
            )
    head = getattr(model, 'decode_head', None)
    strides = _strides(getattr(head, 'feature_strides', None))
    index = getattr(head, 'in_index', None)
    if strides and isinstance(index, list | tuple):
        expected = [measured[i] for i in index if -len(measured) <= i < len(measured)]
        if len(expected) == len(index) and strides != expected:
            yield error(
                f'model.decode_head.feature_strides is {strides}, and its feature maps have the '
                f'strides {expected}; set feature_strides={expected}.'
            )


def _strides(given: Any) -> list[int] | None:
    """Strides along the width, as a list."""
    if not isinstance(given, list | tuple) or not given:
        return None
    flat = [s[0] if isinstance(s, list | tuple) else s for s in given]
    return [int(s) for s in flat] if all(isinstance(s, int | float) for s in flat) else None


def _check_norms(model: BaseModel, crop: tuple[int, int]) -> Iterator[Finding]:
    """A norm that is trained needs more than one value of a channel."""
    single: list[str] = []
    hooks = []
    model_modes = {module: module.training for module in model.modules()}
    model.train()
    trained = {module for module in model.modules() if module.training}
    for module, mode in model_modes.items():
        module.training = mode

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0] if inputs else None
            if isinstance(given, Tensor) and given.dim() >= 2 and given.numel() == given.shape[1]:
                single.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, NORMS) and module in trained:
            hooks.append(module.register_forward_pre_hook(look(name)))
    try:
        with _looked_at(model) as image:
            inputs = image.new_zeros(1, 3, *crop)
            levels = model.extract_feat(inputs)
            for part in ('decode_head', 'auxiliary_head'):
                heads = getattr(model, part, None)
                for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                    if head is not None:
                        head(levels)
    except Exception:  # what cannot be run so is left to the first step
        pass
    finally:
        for handle in hooks:
            handle.remove()
    if single:
        yield error(
            f'with train_dataloader.batch_size=1 and images of {crop[0]} x {crop[1]} pixels, '
            f'{len(single)} BatchNorm layers get a single value of each channel, the first is '
            f'model.{single[0]}; set train_dataloader.batch_size=2 or more, larger images, or '
            'norm_eval=True where that norm is in the backbone.'
        )

"""What the config of a classifier says of the images that it is tested on.

Only timm is imported, and only where it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..normalization import IMAGENET_MEAN, IMAGENET_STD

TYPE = 'TimmClassifier'
IMAGENET_CLASSES = 1000


class UnknownTransform(ValueError):
    """A transform that is not a resize, a crop at the center and a normalization."""


def is_classifier(cfg: Any) -> bool:
    """Whether the model of a config is a `TimmClassifier`."""
    kind = (cfg.get('model') or {}).get('type')
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', '')) == TYPE


def tested_transform(cfg: Any) -> dict[str, Any]:
    """The arguments of `timm.data.create_transform` of the test data."""
    loaders = (cfg.get(f'{split}_dataloader') for split in ('test', 'val'))
    loader: Mapping[str, Any] = next(filter(None, loaders), {})
    return {**((loader.get('dataset') or {}).get('transform') or {}), 'is_training': False}


def tested_size(cfg: Any) -> tuple[int, int]:
    """Height and width of the images that are tested."""
    size = tested_transform(cfg).get('input_size', 224)
    if isinstance(size, int):
        return size, size
    height, width = size[-2:]
    return int(height), int(width)


def tested_normalization(cfg: Any) -> dict[str, Any]:
    """What a file does to an image as OpenCV loads it, in the words of a data preprocessor."""
    transform = tested_transform(cfg)
    mean, std = (transform.get(key) for key in ('mean', 'std'))
    return {
        'mean': list(IMAGENET_MEAN if mean is None else (255 * value for value in mean)),
        'std': list(IMAGENET_STD if std is None else (255 * value for value in std)),
        'bgr_to_rgb': True,
    }


def tested_steps(cfg: Any) -> list[dict[str, Any]]:
    """Resize and crop of the test data: a short side and a filter, and a height and width.

    Raises:
        UnknownTransform: There is another one.
    """
    from timm.data import create_transform

    steps: list[dict[str, Any]] = []
    for step in create_transform(**tested_transform(cfg)).transforms:
        kind = type(step).__name__
        if kind == 'Resize' and isinstance(step.size, int):
            steps.append({'shorter': {'side': step.size, 'filter': step.interpolation.value}})
        elif kind == 'CenterCrop':
            height, width = (step.size, step.size) if isinstance(step.size, int) else step.size
            steps.append({'crop': [int(height), int(width)]})
        elif kind not in ('MaybeToTensor', 'ToTensor', 'Normalize'):
            raise UnknownTransform(
                f'the test transform has {kind}, which the predictor does not know'
            )
    return steps


def known_classes(count: int) -> tuple[str, ...] | None:
    """The names of ImageNet's classes, for a network with as many."""
    if count != IMAGENET_CLASSES:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo('imagenet-1k')
    return tuple(info.index_to_description(i).partition(',')[0] for i in range(count))

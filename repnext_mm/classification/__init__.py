"""ImageNet: training with distillation, and evaluation, of any network of timm.

Everything here is registered in MMEngine, so that configs name it and the tools of detection and
segmentation run it.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .data import RepeatedAugmentation, TimmDataset
    from .hooks import AdaptiveGradClip, KeepEMA, SeedEachEpoch, TimmCosine
    from .metrics import TopK
    from .model import TimmClassifier

#: Where each class is.
PARTS = {
    'AdaptiveGradClip': '.hooks',
    'KeepEMA': '.hooks',
    'RepeatedAugmentation': '.data',
    'SeedEachEpoch': '.hooks',
    'TimmClassifier': '.model',
    'TimmCosine': '.hooks',
    'TimmDataset': '.data',
    'TopK': '.metrics',
}

__all__ = [
    'AdaptiveGradClip',
    'KeepEMA',
    'RepeatedAugmentation',
    'SeedEachEpoch',
    'TimmClassifier',
    'TimmCosine',
    'TimmDataset',
    'TopK',
]

__getattr__ = lazy_attributes(__name__, PARTS)

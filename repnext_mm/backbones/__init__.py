"""The backbones, one file per family."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .inception_next import InceptionNeXt
    from .pyramid import PyramidBackbone
    from .recnext import RecNeXt
    from .repnext import RepNeXt

__all__ = ['InceptionNeXt', 'PyramidBackbone', 'RecNeXt', 'RepNeXt']

__getattr__ = lazy_attributes(
    __name__,
    {
        'InceptionNeXt': '.inception_next',
        'PyramidBackbone': '.pyramid',
        'RecNeXt': '.recnext',
        'RepNeXt': '.repnext',
    },
)

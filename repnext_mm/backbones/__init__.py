"""The backbones, one file per paper, and the list of them all."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .base import PyramidBackbone
    from .families import FAMILIES, build, look_up, names
    from .inception_next import InceptionNeXt
    from .recnext import RecNeXt
    from .repnext import RepNeXt

__all__ = [
    'FAMILIES',
    'InceptionNeXt',
    'PyramidBackbone',
    'RecNeXt',
    'RepNeXt',
    'build',
    'look_up',
    'names',
]

__getattr__ = lazy_attributes(
    __name__,
    {
        'FAMILIES': '.families',
        'InceptionNeXt': '.inception_next',
        'PyramidBackbone': '.base',
        'RecNeXt': '.recnext',
        'RepNeXt': '.repnext',
        'build': '.families',
        'look_up': '.families',
        'names': '.families',
    },
)

"""The backbones, one file per family."""

from .inception_next import InceptionNeXt
from .pyramid import PyramidBackbone
from .recnext import RecNeXt
from .repnext import RepNeXt

__all__ = ['InceptionNeXt', 'PyramidBackbone', 'RecNeXt', 'RepNeXt']

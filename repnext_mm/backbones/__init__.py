"""The backbones, one file per family."""

from .pyramid import PyramidBackbone
from .repnext import RepNeXt

__all__ = ['PyramidBackbone', 'RepNeXt']

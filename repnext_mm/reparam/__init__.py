"""Structural reparameterization: kernel algebra, fusion under a plan, and the proof of equality."""

from .equalization import equalize
from .fusion import Fusible, Note, fuse, reparameterize
from .verify import StageError, prove

__all__ = ['Fusible', 'Note', 'StageError', 'equalize', 'fuse', 'prove', 'reparameterize']

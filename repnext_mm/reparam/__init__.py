"""Structural reparameterization: kernel algebra, fusion plans, and the proof of equality."""

from .fusion import FusionReport, Rewrite, fuse_backbone, reparameterize
from .plans import PLANS, Plan
from .proof import StageError, prove

__all__ = [
    'PLANS',
    'FusionReport',
    'Plan',
    'Rewrite',
    'StageError',
    'fuse_backbone',
    'prove',
    'reparameterize',
]

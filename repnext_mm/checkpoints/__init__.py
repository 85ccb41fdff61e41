"""Weights: published names, safe reading of every file kind, and loading with a report."""

from .errors import CheckpointError
from .fetching import local_path
from .loading import LoadReport, ensure_safe, load_pretrained
from .published import PUBLISHED
from .reading import read_weights

__all__ = [
    'PUBLISHED',
    'CheckpointError',
    'LoadReport',
    'ensure_safe',
    'load_pretrained',
    'local_path',
    'read_weights',
]

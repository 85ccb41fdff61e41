"""Weights: published names, safe reading of every file kind, and loading with a report."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
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

__getattr__ = lazy_attributes(
    __name__,
    {
        'PUBLISHED': '.published',
        'CheckpointError': '.errors',
        'LoadReport': '.loading',
        'ensure_safe': '.loading',
        'load_pretrained': '.loading',
        'local_path': '.fetching',
        'read_weights': '.reading',
    },
)

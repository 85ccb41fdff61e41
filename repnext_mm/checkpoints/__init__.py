"""Weights: published names, safe reading of every file kind, and loading with a report."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .errors import CheckpointError
    from .fetching import fetch
    from .loading import LoadReport, load_pretrained
    from .published import PUBLISHED
    from .reading import File, read_checkpoint, read_weights
    from .runs import RunCheckpoint, read_run

__all__ = [
    'PUBLISHED',
    'CheckpointError',
    'File',
    'LoadReport',
    'RunCheckpoint',
    'fetch',
    'load_pretrained',
    'read_checkpoint',
    'read_run',
    'read_weights',
]

__getattr__ = lazy_attributes(
    __name__,
    {
        'PUBLISHED': '.published',
        'CheckpointError': '.errors',
        'File': '.reading',
        'LoadReport': '.loading',
        'RunCheckpoint': '.runs',
        'fetch': '.fetching',
        'load_pretrained': '.loading',
        'read_checkpoint': '.reading',
        'read_run': '.runs',
        'read_weights': '.reading',
    },
)

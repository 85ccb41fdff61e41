"""Exported models, each run in the runtime that its file is made for, all through one class."""

from .artifact import (
    EXTRAS,
    LEAST_SIDE,
    METADATA_KEY,
    MOST_SIDE,
    Artifact,
    ArtifactError,
    reason,
    shown_shape,
    unpadded,
)
from .opening import open_artifact

__all__ = [
    'EXTRAS',
    'LEAST_SIDE',
    'METADATA_KEY',
    'MOST_SIDE',
    'Artifact',
    'ArtifactError',
    'open_artifact',
    'reason',
    'shown_shape',
    'unpadded',
]

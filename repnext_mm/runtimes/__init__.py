"""Exported backbones, each run in the runtime that its file is made for, all through one class."""

from .artifact import METADATA_KEY, Artifact, ArtifactError, reason, shown_shape, unpadded
from .opening import open_artifact

__all__ = [
    'METADATA_KEY',
    'Artifact',
    'ArtifactError',
    'open_artifact',
    'reason',
    'shown_shape',
    'unpadded',
]

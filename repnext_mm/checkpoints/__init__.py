"""Weights: published names, safe reading of every file kind, and loading with a report."""

from .errors import CheckpointError

__all__ = ['CheckpointError']

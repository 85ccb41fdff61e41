"""The one error of this package part."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read safely, or does not fit; one sentence with the fix."""

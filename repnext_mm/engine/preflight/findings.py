"""What a check found, and how it is said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One sentence: the file or setting, what is given, what is expected, and the fix.

    An 'error' cannot be meant and stops the run; a 'warning' may be meant.
    """

    level: Literal['error', 'warning']
    sentence: str


def error(sentence: str) -> Finding:
    """A finding that stops the run."""
    return Finding('error', sentence)


def warning(sentence: str) -> Finding:
    """A finding that is only said."""
    return Finding('warning', sentence)


def some(names: Iterable[object], most: int = 5) -> str:
    """The first of `names`, for a sentence."""
    texts = [str(name) for name in names]
    return ', '.join(texts[:most]) + (', ...' if len(texts) > most else '')

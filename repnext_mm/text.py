"""What people type, and what is shown to them: names with mistakes, sizes, odd characters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant, if one is close; at `cutoff` 0, one always is."""
    return next(iter(difflib.get_close_matches(name, allowed, 1, cutoff)), None)


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or nobody would see, in escaped form.

    Names in files of others may hold any character; line breaks and tabs stay.
    """
    return ''.join(
        c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode() for c in text
    )


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from '512' or '800x1333'.

    Raises:
        ValueError: It is neither.
    """
    parts = text.lower().split('x')
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f'size {text!r} must be one whole number, or HEIGHTxWIDTH.')
    return int(parts[0]), int(parts[-1])

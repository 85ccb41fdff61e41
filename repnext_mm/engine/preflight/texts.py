"""Lists from other programs: invisible characters, empty lines."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from ...files import read_text
from ..errors import UserError


def clean(text: str) -> str:
    """`text` without characters that nobody sees, and without spaces around it."""
    seen = (c for c in text if unicodedata.category(c) not in ('Cf', 'Cc') or c == '\t')
    return ''.join(seen).strip()


def read_lines(path: Path) -> tuple[list[str], str | None]:
    """The lines of a list, cleaned, and what was cleaned away.

    Raises:
        UserError: It cannot be read as text.
    """
    try:
        text, said = read_text(path)
    except (OSError, ValueError) as reason:
        raise UserError(f'the list {path} cannot be read as text ({reason}).') from reason
    lines = text.replace('\r\n', '\n').removesuffix('\n').split('\n') if text else []
    cleaned = [clean(line) for line in lines]
    kept = [line for line in cleaned if line]
    faults = [said] if said else []
    if empty := len(cleaned) - len(kept):
        faults.append(f'{empty} lines were empty')
    if changed := sum(a != b for a, b in zip(lines, cleaned, strict=True) if b):
        faults.append(f'{changed} lines had invisible characters or spaces around them')
    return kept, '; '.join(faults) or None

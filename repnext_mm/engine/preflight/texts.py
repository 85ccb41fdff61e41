"""Text files from other programs: byte-order marks, UTF-16, invisible characters, empty lines."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from ..errors import UserError

#: Byte-order marks and the encodings that they mean; UTF-32 before UTF-16, which it begins with.
MARKS = (
    (codecs.BOM_UTF8, 'utf-8', 'a UTF-8 byte-order mark'),
    (codecs.BOM_UTF32_LE, 'utf-32-le', 'UTF-32'),
    (codecs.BOM_UTF32_BE, 'utf-32-be', 'UTF-32'),
    (codecs.BOM_UTF16_LE, 'utf-16-le', 'UTF-16'),
    (codecs.BOM_UTF16_BE, 'utf-16-be', 'UTF-16'),
)


def read_text(path: Path) -> tuple[str, str | None]:
    """The text of a regular file, and what had to be understood to read it (None: plain UTF-8).

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, or not text.
    """
    if path.exists() and not path.is_file():
        raise ValueError('it is not a regular file')
    data = path.read_bytes()
    for mark, encoding, said in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding), f'the text had {said}'
    if data[1:2] == b'\0' or data[:1] == b'\0':  # UTF-16 without its mark
        encoding = 'utf-16-be' if data[:1] == b'\0' else 'utf-16-le'
        return data.decode(encoding), 'the text was in UTF-16'
    return data.decode('utf-8'), None


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

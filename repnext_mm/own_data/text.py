"""A config as a text that people read: values on one line where they fit, and comments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
INDENT = '    '


class Code(str):
    """An expression of Python in the place of a value, such as the name of a variable."""


def render(value: Any, before: int = 0, depth: int = 0) -> str:
    """`value` as Python, in lines of at most `WIDTH` characters where that can be.

    Args:
        value: Of dicts, lists, tuples, numbers, texts and `Code`.
        before: Characters in front of it on its first line, and behind it.
        depth: Levels of indentation that it is in.
    """
    line = _on_one_line(value)
    if len(line) + before + len(INDENT) * depth <= WIDTH or not _has_parts(value):
        return line
    inner = INDENT * (depth + 1)
    lines: list[str] = []
    if any(_has_parts(part) for _, part in _parts(value)):
        for key, part in _parts(value):
            lines.append(f'{inner}{key}{render(part, len(key) + 1, depth + 1)},')
    else:  # values alone: several on a line
        for key, part in _parts(value):
            text = f'{key}{_on_one_line(part)},'
            if lines and len(lines[-1]) + 1 + len(text) <= WIDTH:
                lines[-1] += f' {text}'
            else:
                lines.append(inner + text)
    opening, closing = _brackets(value)
    return '\n'.join([opening, *lines, f'{INDENT * depth}{closing}'])


def assign(name: str, value: Any, comment: str = '') -> str:
    """The line or lines that set a variable, with a comment behind or above it."""
    text = f'{name} = {render(value, len(name) + 3)}'
    if not comment:
        return text
    if '\n' not in text and len(text) + len(comment) + 4 <= WIDTH:
        return f'{text}  # {comment}'
    return f'{wrapped(comment)}\n{text}'


def wrapped(comment: str) -> str:
    """A comment in lines."""
    from textwrap import wrap

    return '\n'.join(f'# {line}' for line in wrap(comment, WIDTH - 2))


def _has_parts(value: Any) -> bool:
    return bool(value) and isinstance(value, Mapping | list | tuple)


def _brackets(value: Any) -> tuple[str, str]:
    if isinstance(value, Mapping):
        return ('dict(', ')') if _as_keywords(value) else ('{', '}')
    return ('[', ']') if isinstance(value, list) else ('(', ')')


def _as_keywords(value: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and (key.isidentifier() or key[:2] == '**') for key in value)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [('', part) for part in value]
    if not _as_keywords(value):
        return [(f'{key!r}: ', part) for key, part in value.items()]
    # '**name' takes in the dict of that name, and its value says nothing.
    return [(f'{k}=', v) if k[:2] != '**' else ('', Code(k)) for k, v in value.items()]


def _on_one_line(value: Any) -> str:
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, Mapping | list | tuple) and not isinstance(value, str):
        texts = [f'{key}{_on_one_line(part)}' for key, part in _parts(value)]
        opening, closing = _brackets(value)
        alone = ',' if isinstance(value, tuple) and len(texts) == 1 else ''
        return f'{opening}{", ".join(texts)}{alone}{closing}'
    return repr(value)


def paragraph(lines: Sequence[str]) -> str:
    """Lines that belong together."""
    return '\n'.join(line for line in lines if line)

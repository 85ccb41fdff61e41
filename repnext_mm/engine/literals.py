"""Values of a config from its text, without running it."""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any

#: A config of this package has about 20 kB.
LONGEST = 2_000_000


def literal(text: str) -> Any:
    """The value of an expression of numbers, texts, lists, tuples and dicts, also `dict(a=1)`.

    Raises:
        ValueError: It is something else.
    """
    try:
        return _value(ast.parse(text.strip(), mode='eval').body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f'{text[:80]!r} is not a literal') from error


def assigned(text: str, names: Collection[str]) -> dict[str, Any]:
    """What the text of a config assigns to `names`, as far as these are literals."""
    found: dict[str, Any] = {}
    if len(text) > LONGEST:
        return found
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) if name in names:
                try:
                    found[name] = _value(statement.value)
                except (ValueError, RecursionError):
                    continue
    return found


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            return {_keyword(k): _value(k.value) for k in keywords}
        case ast.Dict(keys=keys, values=values):
            return {_key(k): _value(v) for k, v in zip(keys, values, strict=True)}
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element) for element in elements)
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ValueError(f'{ast.unparse(node)[:80]!r} is not a literal')


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError('dict(**...) is not a literal')
    return keyword.arg


def _key(node: ast.AST | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError('the keys of a config are texts')
    return node.value

"""Exported programs (`.pt2`) opened without running code in them.

`torch.export.load` unpickles some parts, passes symbolic sizes as text to sympy, which evaluates
it, and looks up the functions of a graph by any name below `torch`. A file is opened only if its
parts are data, its sizes are arithmetic, and its functions are ATen operators.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..files import MOST_JSON, parse_json
from .artifact import ArtifactError

#: Names of functions in a graph: ATen's operators, those of detectors, and arithmetic of sizes.
TARGET = re.compile(
    r'torch\.ops\.aten\.\w+\.\w+'
    r'|torch\.ops\.higher_order\.wrap_with_autocast'
    r'|torch\.ops\.(torchvision\.roi_align|repnext_mm\.nms_keep)\.default'
    r'|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_)'
    r'|torch\.sym_\w+|math\.(ceil|floor|trunc)'
)
#: What a size may be computed with, as sympy and torch write it.
FUNCTIONS = frozenset(
    (
        *('Symbol', 'Integer', 'Rational', 'Float', 'Add', 'Mul', 'Pow', 'Max', 'Min', 'Mod'),
        *('FloorDiv', 'CleanDiv', 'CeilDiv', 'PythonMod', 'ModularIndexing', 'IntTrueDiv'),
        *('FloatTrueDiv', 'FloorToInt', 'CeilToInt', 'TruncToInt', 'RoundToInt', 'ToFloat'),
        *('IntDiv', 'Abs', 'floor', 'ceiling', 'Piecewise', 'Where', 'Identity'),
        *('Equality', 'Unequality', 'StrictLessThan', 'LessThan', 'StrictGreaterThan'),
        *('GreaterThan', 'Eq', 'Ne', 'Lt', 'Le', 'Gt', 'Ge', 'And', 'Or', 'Not'),
    )
)
#: Parts of an expression: numbers, names, arithmetic, comparisons, and calls of the above.
SYNTAX = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop),
    ast.cmpop,
)
LONGEST = 20_000  # characters of one expression


def _read_json(archive: zipfile.ZipFile, name: str) -> Any:
    size = archive.getinfo(name).file_size
    if size > MOST_JSON:
        raise ArtifactError(f'{name} has {size} bytes, and at most {MOST_JSON} are read.')
    return parse_json(archive.read(name).decode('utf-8'))


def load_program(path: Path, extra_files: dict[str, str] | None = None) -> ExportedProgram:
    """What `torch.export.save` wrote, by `torch.export.load`, once it is known to be data.

    Raises:
        ArtifactError: The file contains something else, which could run code.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if found := _code_in(archive, name):
                raise ArtifactError(
                    f'{path} was not opened, because {found} and loading it can run code; export '
                    'the network again.'
                )
    return torch.export.load(path, extra_files=extra_files)


def _code_in(archive: zipfile.ZipFile, name: str) -> str:
    """What in a part of the archive is more than data, or ''."""
    part = name.partition('/')[2]
    if part.startswith('data/constants/custom_obj') or part == '':
        return f'{name} is a Python pickle'
    if re.fullmatch(r'data/(weights|constants)/\w+_config\.json', part):
        config = _read_json(archive, name)['config']
        if any(entry['use_pickle'] for entry in config.values()):
            return f'{name} is a Python pickle'
    elif part.startswith('data/sample_inputs/'):
        with archive.open(name) as file:
            torch.load(file, weights_only=True)
    elif part.startswith('models/') and part.endswith('.json'):
        for key, text in _entries(_read_json(archive, name)):
            if key == 'expr_str' and not is_arithmetic(text):
                return f'{name} has the size {text[:60]!r}, which is no arithmetic,'
            if key == 'target' and not TARGET.fullmatch(text):
                return f'{name} calls {text[:60]!r}, which is no operator of a network,'
    return ''


def _entries(value: Any) -> Iterator[tuple[str, str]]:
    """Every text in JSON data, with its key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str):
                yield key, inner
            else:
                yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def is_arithmetic(text: str) -> bool:
    """Whether an expression only computes with numbers and symbols."""
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text, mode='eval')
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, SYNTAX):
            return False
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') not in FUNCTIONS:
            return False
        # Plain names, and as text nothing but them: '__import__' is none.
        name = getattr(node, 'id', getattr(node, 'value', ''))
        if isinstance(name, str) and name and not re.fullmatch(r'[a-zA-Z]\w*', name):
            return False
    return True

"""Packages import downward only: the layers of the house, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPO

ROOT = REPO / 'repnext_mm'
#: Packages and top-level modules, from the lowest to the highest; those of one row are strangers.
LAYERS = (
    (
        'version',
        'lazy',
        'files',
        'text',
        'program',
        'published_results',
        'configs',
        'normalization',
    ),
    ('complexity', 'network', 'operators'),
    ('reparam',),
    ('checkpoints', 'layers'),
    ('backbones',),
    ('optimization', 'runtimes', 'timm'),
    ('datasets', 'classification', 'evaluation'),
    ('engine',),
    ('visualization',),
    ('measure',),
    ('deploy', 'own_data'),
    ('prediction',),
    ('look',),
    ('model_table', 'model_list', 'demo', 'publish'),
    ('__init__',),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


#: Functions whose arguments are modules that are imported later.
LAZY = ('lazy_attributes', 'register_lazily')


def module_of(path: Path) -> str:
    """`backbones.repnext`, from its file; a package is its `__init__`."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


MODULES = {module_of(path): path for path in ROOT.rglob('*.py')}


def package_of(module: str) -> str:
    return module.split('.')[0]


def targets(module: str) -> Iterator[str]:
    """Every module of this package that a module imports: anywhere in it, for types, or lazily."""
    for node in ast.walk(ast.parse(MODULES[module].read_text('utf-8'))):
        if isinstance(node, ast.ImportFrom):
            yield from imported(module, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'repnext_mm':
                    yield resolve(alias.name.split('.')[1:])
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') in LAZY:
            base = module.split('.')[:-1]
            for text in ast.walk(node):
                if isinstance(text, ast.Constant) and str(text.value).startswith('.'):
                    yield resolve([*base, *text.value.split('.')[1:]])


def names() -> set[str]:
    return {name.removesuffix('.__init__') for name in MODULES}


def imported(module: str, node: ast.ImportFrom) -> Iterator[str]:
    if node.level:
        base = [*module.split('.')[: -node.level], *(node.module or '').split('.')]
    elif node.module and node.module.split('.')[0] == 'repnext_mm':
        base = node.module.split('.')[1:]
    else:
        return
    base = [part for part in base if part]
    for alias in node.names:
        inner = [*base, alias.name]
        yield resolve(inner if '.'.join(inner) in names() else base)


def resolve(parts: list[str]) -> str:
    name = '.'.join(parts)
    return name if name in MODULES else '.'.join((*parts, '__init__'))


GRAPH = {module: {t for t in targets(module) if t != module} for module in MODULES}


def test_every_module_has_its_place():
    assert {package_of(module) for module in MODULES} == set(LEVEL)


def test_files_import_in_no_circle():
    # A package's `__init__` exports what is in it, lazily or not: that is no use of it.
    graph = {m: {t for t in ts if not t.endswith('__init__')} for m, ts in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


def test_packages_import_downward_only():
    upward = [
        f'{module} -> {target}'
        for module, found in GRAPH.items()
        for target in found
        if package_of(module) != package_of(target)
        and LEVEL[package_of(module)] <= LEVEL[package_of(target)]
    ]
    assert not upward, '\n'.join(sorted(upward))


def test_the_graph_has_what_is_hidden():
    """Imports inside functions, for types alone, and of names that are registered lazily."""
    assert 'engine.compile' in GRAPH['__init__']
    assert 'backbones.repnext' in GRAPH['backbones.__init__']
    assert 'optimization' in GRAPH['engine.compile']
    assert 'layers.fast' in GRAPH['backbones.repnext']

"""What `repnext-mm models` does: networks and configs with their published figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.table import Table

from .configs import FOLDER, config_paths
from .engine.errors import UserError, run_tool
from .program import program
from .published_results import (
    LATENCIES,
    METHODS,
    TOP1,
    of_imagenet_config,
    published,
    published_results,
)
from .text import closest

Record = dict[str, Any]
Columns = dict[str, str]

NETWORK_COLUMNS: Columns = {
    'params_M': 'params (M)',
    'macs_G_224': 'MACs (G), 224x224',
    **TOP1,
    **LATENCIES,
}
CONFIG_COLUMNS: Columns = {
    'top1': 'top-1',
    'box_AP': 'box AP',
    'mask_AP': 'mask AP',
    'mIoU': 'mIoU',
}
WIDTH = 140  # where the output is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm models`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('models'),
        description='List networks and configs with published figures. None was measured here; '
        'a dash marks what was not published.',
    )
    parser.add_argument('pattern', nargs='?', default='', metavar='PATTERN',
        help='part of a name, or a pattern such as "*_m[34]_*"')  # fmt: skip
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)
    return run_tool(lambda: show(args.pattern, args.json))


def networks() -> list[Record]:
    """Every network with the published figures of its classifier."""
    records = []
    for name in published_results()['imagenet']:
        if not name.startswith('_'):
            figures = published('imagenet', name)
            records.append({'name': name, 'published': figures})
    return records


def configs() -> list[Record]:
    """Every config of this package; the samples have no task and no published figures."""
    records = []
    for name, path in config_paths().items():
        record: Record = {'name': name, 'path': str(path), 'published': {}}
        if found := of_imagenet_config(name):
            record |= {'network': found[0], 'dataset': 'ImageNet-1k', 'published': found[1]}
        for prefix, method in METHODS.items():
            network = name.removeprefix(f'{prefix}_').removesuffix(f'_{method.suffix}')
            if name == f'{prefix}_{network}_{method.suffix}':
                figures = published(method.section, network)
                record |= {
                    'network': network,
                    'dataset': method.dataset,
                    'published': {k: figures[k] for k in method.columns if k in figures},
                }
        records.append(record)
    return records


def show(pattern: str, as_json: bool) -> None:
    """Print what matches `pattern`.

    Raises:
        UserError: Nothing does.
    """
    found = {'networks': networks(), 'configs': configs()}
    names = [record['name'] for records in found.values() for record in records]
    for title, records in found.items():
        found[title] = [record for record in records if matches(pattern, record['name'])]
    if not any(found.values()):
        close = closest(pattern, names, cutoff=0.4)
        hint = f'did you mean {close}?' if close else 'leave it out to see all.'
        raise UserError(f'no network or config matches {pattern!r}; {hint}')
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for records, title, columns in (
        (found['networks'], 'network', NETWORK_COLUMNS),
        (found['configs'], 'config', CONFIG_COLUMNS),
    ):
        if records:
            console.print(table(records, title, columns))
    if found['configs']:
        console.print(f'The configs are in {FOLDER}.', highlight=False, soft_wrap=True)


def matches(pattern: str, name: str) -> bool:
    """Whether `name` contains `pattern`, or fits it where it has wildcards."""
    if any(sign in pattern for sign in '*?['):
        return fnmatchcase(name, pattern.lower())
    return pattern.lower().replace('-', '_') in name


def table(records: list[Record], title: str, columns: Columns) -> Table:
    """A row for each record, in columns of published figures."""
    shown = Table(title)
    known = {key for record in records for key in record['published']}
    there = {key: column for key, column in columns.items() if key in known}
    for column in there.values():
        shown.add_column(f'{column}, published', justify='right')
    for record in records:
        shown.add_row(record['name'], *(str(record['published'].get(key, '-')) for key in there))
    return shown

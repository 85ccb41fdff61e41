"""Comparisons as JSON for machines and as tables for people."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .rounds import Comparison, Ratio

Record = dict[str, Any]


def interval(ratio: Ratio) -> Record:
    """A ratio of times, with its interval and how sure that is."""
    return {
        'ratio': ratio.value,
        'interval': [ratio.low, ratio.high],
        'confidence': ratio.confidence,
        'rounds': ratio.rounds,
    }


def record(comparison: Comparison, more: Mapping[str, Record] | None = None) -> Record:
    """A comparison as JSON values: `floor` and `rows`, the reference first, times in ms.

    `ratio` is time in units of the reference's. `more` adds entries to the row of that name.
    """
    rows = []
    for name, samples in comparison.samples.items():
        rows.append(
            {
                'variant': name,
                **interval(comparison.ratio(name)),
                'verdict': comparison.verdict(name),
                'p50_ms': _ms(samples.percentile(50)),
                'p90_ms': _ms(samples.percentile(90)),
                'p99_ms': _ms(samples.percentile(99)),
                'runs': len(samples.runs),
                'noise': samples.noise,
                'settled': samples.settled,
                'first_run_ms': _ms(samples.first_s),
                **(more or {}).get(name, {}),
            }
        )
    floor = {**interval(comparison.floor.ratio), 'limit': comparison.floor.limit}
    return {'reference': comparison.reference, 'floor': floor, 'rows': rows}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def show(comparison: Record, title: str, console: Console) -> None:
    """Print what `record` made."""
    memory = any(row.get('memory_bytes') is not None for row in comparison['rows'])
    headers = ['variant', 'ms', 'p90', 'time / reference', 'speed-up', *['memory'] * memory, '']
    table = Table(title=title, title_justify='left', box=SIMPLE)
    for header in headers:
        table.add_column(header, justify='left' if header in ('variant', '') else 'right')
    base = comparison['rows'][0].get('memory_bytes')
    for row in comparison['rows']:
        cells = [
            row['variant'],
            _number(row['p50_ms']),
            _number(row['p90_ms']),
            ratio_text(row),
            f'{1 / row["ratio"]:.2f}x',
        ]
        if memory:
            cells.append(_memory(row.get('memory_bytes'), base))
        table.add_row(*cells, '; '.join(remarks(row)))
    console.print(table)
    floor = comparison['floor']
    console.print(
        f'Noise floor: the reference against itself took {ratio_text(floor)} of its time in '
        f'{floor["rounds"]} rounds, so a ratio between {1 / floor["limit"]:.3f} and '
        f'{floor["limit"]:.3f} says nothing.',
        highlight=False,
    )
    doubtful = {r['rounds']: r['confidence'] for r in (floor, *comparison['rows'])}
    for rounds, confidence in doubtful.items():
        if confidence < 0.95:
            console.print(
                f'Brackets of {rounds} rounds are their range, which covers the median with '
                f'{confidence:.0%} only; give more time for intervals of 95 %.'
            )
    if comparison['rows'][0]['p90_ms'] is None:
        console.print('p90 needs 64 runs.')


def remarks(row: Record) -> list[str]:
    """What a reader must know of a row beside its figures."""
    notes = [row['verdict']]
    if row['noise'] != 'ok':
        notes.append(f'{row["noise"]} measurement')
    if not row['settled']:
        notes.append('still warming up')
    return notes


def ratio_text(row: Record) -> str:
    if row.get('verdict') == 'reference':
        return '1'
    low, high = row['interval']
    return f'{row["ratio"]:.3f} [{low:.3f}, {high:.3f}]'


def _number(ms: float | None) -> str:
    return '-' if ms is None else f'{ms:.4g}'


def _memory(count: int | None, base: int | None) -> str:
    if count is None:
        return '-'
    return f'{count / 2**20:.1f} MiB' + (f' ({count / base:.2f}x)' if base else '')


def show_operators(entries: Sequence[Record], title: str, console: Console, top: int = 15) -> None:
    """Print what `by_operator` found."""
    table = Table('operator', title=title, title_justify='left', box=SIMPLE)
    for header in ('own ms', 'share', 'calls'):
        table.add_column(header, justify='right')
    for entry in entries[:top]:
        cells = (f'{entry["ms"]:.2f}', f'{entry["share"]:.1%}', f'{entry["calls"]:.0f}')
        table.add_row(entry['operator'], *cells)
    rest = entries[top:]
    if rest:
        ms, share = (sum(e[k] for e in rest) for k in ('ms', 'share'))
        table.add_row(f'{len(rest)} others', f'{ms:.2f}', f'{share:.1%}', '')
    console.print(table)


def write_json(result: Record, path: Path) -> None:
    """Write all of the file or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'w') as file:
            json.dump(result, file, indent=1)
            file.write('\n')
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

"""Comparisons as JSON for machines and as tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..files import write_text
from .rounds import PERCENTILE_FLOORS, Comparison, Ratio, Samples

Record = dict[str, Any]


def interval(ratio: Ratio) -> Record:
    """A ratio of times, with its interval and how sure that is."""
    return {
        'ratio': ratio.value,
        'interval': [ratio.low, ratio.high],
        'confidence': ratio.confidence,
        'rounds': ratio.rounds,
    }


def milliseconds(samples: Samples) -> Record:
    """Percentiles of the runs in ms by name, None where there are too few runs to say."""
    seconds = {f'p{p}': samples.percentile(p) for p in PERCENTILE_FLOORS}
    return {name: None if s is None else 1e3 * s for name, s in seconds.items()}


def row(comparison: Comparison, name: str) -> Record:
    """What timing one variant found, as JSON values: times in ms, `ratio` in its reference's."""
    samples = comparison.samples[name]
    return {
        'variant': name,
        **interval(comparison.ratio(name)),
        'verdict': comparison.verdict(name),
        **{f'{key}_ms': ms for key, ms in milliseconds(samples).items()},
        'runs': len(samples.runs),
        'noise': samples.noise,
        'settled': samples.settled,
        'first_run_ms': 1e3 * samples.first_s,
    }


def record(comparison: Comparison, more: Mapping[str, Record] | None = None) -> Record:
    """A comparison with one reference as JSON values: `floor` and `rows`, the reference first.

    `more` adds entries to the row of that name.
    """
    [(reference, floor)] = comparison.floors.items()
    return {
        'reference': reference,
        'floor': {**interval(floor.ratio), 'limit': floor.limit},
        'rows': [{**row(comparison, n), **(more or {}).get(n, {})} for n in comparison.samples],
    }


def timing_table(columns: Sequence[tuple[str, Sequence[str]]], title: str | None = None) -> Table:
    """A table of timings for people, by header; words to the left, figures to the right."""
    table = Table(title=title, title_justify='left', box=SIMPLE)
    for header, _ in columns:
        words = header in ('', 'variant', 'precision')
        table.add_column(header, justify='left' if words else 'right')
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    return table


def show(comparison: Record, title: str, console: Console) -> None:
    """Print what `record` made."""
    rows = comparison['rows']
    memory = [_memory(r.get('memory_bytes'), rows[0].get('memory_bytes')) for r in rows]
    columns = [
        ('variant', [r['variant'] for r in rows]),
        ('ms', [_number(r['p50_ms']) for r in rows]),
        ('p90', [_number(r['p90_ms']) for r in rows]),
        ('time / reference', [ratio_text(r) for r in rows]),
        ('speed-up', [f'{1 / r["ratio"]:.2f}x' for r in rows]),
        *([('memory', memory)] if set(memory) != {'-'} else []),
        ('', ['; '.join(remarks(r)) for r in rows]),
    ]
    console.print(timing_table(columns, title))
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
    """Write a result, completely or not at all."""
    write_text(path, json.dumps(result, indent=1) + '\n')

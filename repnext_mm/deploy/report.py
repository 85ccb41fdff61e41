"""What a run of tools/deploy.py leaves beside its artifacts: report.json and report.md."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files import read_json, write_text
from ..measure import environment
from ..text import printable
from .errors import UsageError

SCHEMA_VERSION = 1
JSON_NAME, MARKDOWN_NAME = 'report.json', 'report.md'
COLUMNS = ('format', 'dtype', 'status', 'MB', 'max rel err', 'SQNR dB', 'p50 ms (p90)',
           'vs upstream', 'file')  # fmt: skip
LATENCY_COLUMNS = (
    'what',
    'computes in',
    'p50 ms (p90)',
    'vs upstream [95 %]',
    'vs PyTorch eager, upstream',
    'verdict',
    'noise',
)
#: Packages whose versions decide what is written and how fast it is.
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf', 'coremltools')

Record = dict[str, Any]


@dataclass
class Report:
    """Everything that is known of the artifacts in one folder; `data` is report.json."""

    folder: Path
    data: Record = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, model: Record, plans: list[Record]) -> Report:
        """A report with no artifact yet."""
        return cls(
            folder,
            {
                'schema_version': SCHEMA_VERSION,
                'status': 'ok',
                'model': model,
                'plans': plans,
                'artifacts': [],
                'parity': [],
                'latency': [],
                'bench': [],
                'env': environment.describe(PACKAGES),
                'warnings': [],
                'skipped': [],
            },
        )

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read the report in a folder, or the file itself.

        Raises:
            UsageError: There is none, or it is not one of this version.
        """
        file = path / JSON_NAME if path.is_dir() else path
        try:
            data = _shown_as_text(read_json(file))
        except FileNotFoundError as error:
            raise UsageError(
                f'{file} does not exist; give the folder that an export was written to.'
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(f'{file} cannot be read as a report: {error}.') from error
        if not isinstance(data, dict) or data.get('schema_version') != SCHEMA_VERSION:
            raise UsageError(
                f'{file} is not a report of this version (schema {SCHEMA_VERSION}); export again.'
            )
        return cls(file.parent, data)

    def keep(self, earlier: Report) -> None:
        """Take over what an earlier run in this folder knows of artifacts that are still there."""
        own = {record['path'] for record in self.data['artifacts']}
        names = {plan['name'] for plan in self.data['plans']}
        self.data['plans'] += [p for p in earlier.data['plans'] if p['name'] not in names]
        for record in earlier.data['artifacts']:
            path = self.folder / record['path']
            if record['path'] in own or not path.exists():
                continue
            self.data['artifacts'].append(record)
            self.data['parity'] += [
                row for row in earlier.data['parity'] if row['path'] == record['path']
            ]
        # Times were measured together; those of files that are replaced now are outdated.
        self.data['latency'] = [row for row in earlier.data['latency'] if row['path'] not in own]
        self.data['bench'] = earlier.data['bench']

    def save(self) -> None:
        """Write report.json and report.md, each completely or not at all."""
        write_text(self.folder / JSON_NAME, self.as_json() + '\n')
        write_text(self.folder / MARKDOWN_NAME, self.markdown())

    def as_json(self) -> str:
        """The content of report.json."""
        return json.dumps(_plain(self.data), indent=1, allow_nan=False)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of `COLUMNS` per artifact."""
        return [self._row(record) for record in self.data['artifacts']]

    def _row(self, record: Record) -> tuple[str, ...]:
        parity = [row for row in self.data['parity'] if row['path'] == record['path']]
        latency = [row for row in self.data['latency'] if row['path'] == record['path']]
        worst = max((row['max_rel'] for row in parity), key=_number, default=None)
        sqnr = min((row['sqnr_db'] for row in parity), key=_number, default=None)
        timings = [f'{row["precision"]} {_timing(row)}' for row in latency]
        return (
            record['format'],
            record['dtype'],
            record['status'],
            f'{record["bytes"] / 1e6:.1f}',
            '-' if worst is None else f'{_number(worst):.1e}',
            '-' if sqnr is None else f'{_number(sqnr):.0f}',
            ', '.join(timings) or '-',
            ', '.join(map(_ratio, latency)) or '-',
            record['path'],
        )

    def markdown(self) -> str:
        """The report for people."""
        data = self.data
        model = data['model']
        lines = [
            f'# {model["name"]}',
            '',
            f'{model["arch"]}, {model["weights_source"]} weights'
            + (f' from `{model["checkpoint"]}`' if model['checkpoint'] else '')
            + f'; {model["params"] / 1e6:.2f} M parameters, {model["macs"] / 1e9:.2f} G MACs per '
            f'{model["size"][0]}x{model["size"][1]} image.',
            '',
            *(
                f'Plan `{plan["name"]}`: {plan["convs_before"]} to {plan["convs_after"]} '
                f'convolutions, {plan["bn_left"]} BatchNorm left.'
                for plan in data['plans']
            ),
            '',
            *markdown_table(COLUMNS, self.rows()),
            '',
        ]
        lines += self._latency()
        for title, items in (
            ('Warnings', data['warnings']),
            ('Skipped', [f'{s["format"]}: {s["reason"]} ({s["fix"]})' for s in data['skipped']]),
        ):
            if items:
                lines += [f'## {title}', '', *(f'- {item}' for item in items), '']
        lines += ['## Machine', '', environment.summary(data['env']), '']
        return '\n'.join(lines)

    def _latency(self) -> list[str]:
        """Lines on every measurement: picture, table, and how it was measured."""
        lines = []
        for bench in self.data['bench']:
            height, width = bench['size']
            rows = [
                (
                    row['name'],
                    row['precision'],
                    _timing(row),
                    _ratio(row),
                    f'{row["vs_baseline"]:.2f}',
                    row['verdict'],
                    row['noise'],
                )
                for row in self.data['latency']
                if (row['batch'], row['size']) == (bench['batch'], bench['size'])
            ]
            lines += [
                f'## Latency, {bench["batch"]}x3x{height}x{width}',
                '',
                f'![Latency]({bench["picture"]})',
                '',
                *markdown_table(LATENCY_COLUMNS, rows),
                '',
                f'{bench["threads"]} threads; {environment.summary(bench["env"])}',
                '',
            ]
        return lines

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(box=None, pad_edge=False, header_style='bold')
        rows = self.rows()
        used = [i for i, _ in enumerate(COLUMNS) if any(row[i] != '-' for row in rows)]
        for i in used:
            table.add_column(COLUMNS[i], overflow='fold')
        for row in rows:
            table.add_row(*(row[i] for i in used))
        console.print(table)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return [f'| {" | ".join(line)} |' for line in lines]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            total.update(f'{file.relative_to(path)}\n{file.stat().st_size}\n'.encode())
        with file.open('rb') as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob('*') if p.is_file())
    return path.stat().st_size


def _timing(row: Record) -> str:
    p50 = '-' if row.get('p50') is None else f'{row["p50"]:.2f}'
    p90 = '' if row.get('p90') is None else f' ({row["p90"]:.2f})'
    return f'{p50}{p90}'


def _ratio(row: Record) -> str:
    if row.get('ratio') is None:
        return '-'
    low, high = row['ci95']
    return f'{row["ratio"]:.2f} [{low:.2f}, {high:.2f}]'


def _plain(value: Any) -> Any:
    """`value` with what JSON has no number for (NaN, infinities) as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: float | str) -> float:
    """A number of a report, read back from text where JSON has none for it."""
    return float(value)


def _shown_as_text(node: Any) -> Any:
    """A report of somebody else, with nothing in its texts that a terminal would obey."""
    if isinstance(node, str):
        return printable(node)
    if isinstance(node, dict):
        return {printable(key): _shown_as_text(value) for key, value in node.items()}
    return [_shown_as_text(value) for value in node] if isinstance(node, list) else node

"""What an export leaves beside its artifacts: report.json and report.md."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table

from ..files import read_json, write_text
from ..measure import environment
from ..text import printable
from .errors import UsageError

SCHEMA_VERSION = 2
JSON_NAME, MARKDOWN_NAME = 'report.json', 'report.md'
COLUMNS = ('format', 'dtype', 'status', 'MB', 'difference', 'metric', 'p50 ms (p90)',
           'time / reference', 'file')  # fmt: skip
LATENCY_COLUMNS = (
    'what',
    'computes in',
    'p50 ms (p90)',
    'time / reference [95 %]',
    'time / baseline',
    'verdict',
    'noise',
)
#: Packages whose versions decide what is written and how fast it is.
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf', 'coremltools')

Record = dict[str, Any]


@dataclass
class ModelRecord:
    """What was exported, and whose weights it has."""

    name: str
    task: str
    scope: str
    family: str
    arch: str | dict[str, Any]
    config: str | None
    checkpoint: str | None
    checkpoint_sha256: str | None
    container: str
    weights_source: str
    seed: int
    params: int
    macs: int
    size: list[int]
    details: dict[str, Any]

    def same_as(self, other: ModelRecord) -> bool:
        """Whether both are the same model with the same weights."""
        keys = ['task', 'arch', 'checkpoint_sha256', 'details']
        keys += ['seed'] if self.weights_source == 'random' else []
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclass
class PlanRecord:
    """How the model was fused, and what that changed in float64."""

    name: str
    steps: list[Record]
    proof_float64: list[Record]
    bn_left: int
    convs_before: int
    convs_after: int


@dataclass
class ArtifactRecord:
    """One file."""

    format: str
    path: str
    golden: str
    status: str
    sha256: str
    bytes: int
    opset: int | None
    dtype: str
    plan: str
    why: str
    size: list[int]
    batch: int
    dynamic: str
    inputs: list[str]
    outputs: list[str]
    operations: dict[str, int]
    bn_left: int
    convs: int
    metadata: dict[str, Any]
    quantization: dict[str, Any] | None
    metric: dict[str, Any] | None
    tolerance: dict[str, Any]
    seconds: float


@dataclass
class ParityRecord:
    """One output of one file beside what is expected."""

    path: str
    format: str
    runtime: str | None
    precision: str | None
    output: str
    passed: bool
    difference: str
    measures: dict[str, Any]


@dataclass
class Report:
    """Everything that is known of the artifacts in one folder: the content of report.json.

    `latency` and `bench` are rows of `measure.artifacts`.
    """

    folder: Path
    model: ModelRecord
    plans: list[PlanRecord] = field(default_factory=list)
    artifacts: list[ArtifactRecord] = field(default_factory=list)
    parity: list[ParityRecord] = field(default_factory=list)
    latency: list[Record] = field(default_factory=list)
    bench: list[Record] = field(default_factory=list)
    env: Record = field(default_factory=lambda: environment.describe(PACKAGES))
    warnings: list[str] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    failures: list[Record] = field(default_factory=list)
    status: str = 'ok'
    schema_version: int = SCHEMA_VERSION

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
        return _typed(cls, {**data, 'folder': file.parent}, file)

    def keep(self, earlier: Report) -> None:
        """Take over what an earlier run in this folder knows of artifacts that are still there."""
        own = {record.path for record in self.artifacts}
        names = {plan.name for plan in self.plans}
        self.plans += [plan for plan in earlier.plans if plan.name not in names]
        for record in earlier.artifacts:
            if record.path in own or not (self.folder / record.path).exists():
                continue
            self.artifacts.append(record)
            self.parity += [row for row in earlier.parity if row.path == record.path]
        # Times were measured together; those of files that are replaced now are outdated.
        self.latency = [row for row in earlier.latency if row['path'] not in own]
        self.bench = earlier.bench

    def save(self) -> None:
        """Write report.json and report.md, each completely or not at all."""
        write_text(self.folder / JSON_NAME, self.as_json() + '\n')
        write_text(self.folder / MARKDOWN_NAME, self.markdown())

    def as_json(self) -> str:
        """The content of report.json."""
        data = {k: v for k, v in asdict(self).items() if k != 'folder'}
        return json.dumps(_plain(data), indent=1, allow_nan=False)

    def rows(self) -> list[tuple[str, ...]]:
        """One row of `COLUMNS` per artifact."""
        return [self._row(record) for record in self.artifacts]

    def _row(self, record: ArtifactRecord) -> tuple[str, ...]:
        parity = [row for row in self.parity if row.path == record.path]
        latency = [row for row in self.latency if row['path'] == record.path]
        worst = min(parity, key=lambda row: (row.passed, -_size(row)), default=None)
        metric = record.metric
        return (
            record.format,
            record.dtype,
            record.status,
            f'{record.bytes / 1e6:.1f}',
            '-' if worst is None else worst.difference,
            '{name} {value:.2f} ({reference:.2f})'.format(**metric) if metric else '-',
            ', '.join(f'{row["precision"]} {_timing(row)}' for row in latency) or '-',
            ', '.join(map(_ratio, latency)) or '-',
            record.path,
        )

    def markdown(self) -> str:
        """The report for people."""
        model = self.model
        height, width = model.size
        lines = [
            f'# {model.name}',
            '',
            f'{model.family} {model.arch}, {model.weights_source} weights'
            + (f' from `{model.checkpoint}`' if model.checkpoint else '')
            + (f' (`{model.container}`)' if model.container else '')
            + f'; {model.params / 1e6:.2f} M parameters, {model.macs / 1e9:.2f} G MACs per '
            f'{height}x{width} image.',
            '',
            *(
                f'Plan `{plan.name}`: {plan.convs_before} to {plan.convs_after} '
                f'convolutions, {plan.bn_left} BatchNorm left.'
                for plan in self.plans
            ),
            '',
            *markdown_table(COLUMNS, self.rows()),
            '',
        ]
        lines += self._latency()
        for title, items in (
            ('Warnings', self.warnings),
            ('Skipped', [f'{s["format"]}: {s["reason"]} ({s["fix"]})' for s in self.skipped]),
        ):
            if items:
                lines += [f'## {title}', '', *(f'- {item}' for item in items), '']
        lines += ['## Machine', '', environment.summary(self.env), '']
        return '\n'.join(lines)

    def _latency(self) -> list[str]:
        """Lines on every measurement: picture, table, and how it was measured."""
        lines = []
        for bench in self.bench:
            height, width = bench['size']
            shape = bench['batch'], bench['size']
            rows_of = [row for row in self.latency if (row['batch'], row['size']) == shape]
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
                for row in rows_of
            ]
            lines += [
                f'## Latency, {bench["batch"]}x3x{height}x{width}',
                '',
                f'![Latency]({bench["picture"]})',
                '',
                *markdown_table(LATENCY_COLUMNS, rows),
                '',
                f'The reference is plan upstream in the same runtime and precision, of complete '
                f'models the baseline; the baseline is {rows_of[0]["baseline"]}.'
                if rows_of
                else '',
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


def _size(row: ParityRecord) -> float:
    """How far an output is off, whatever its kind: the larger the worse."""
    keys = ('max_rel', 'pixels', 'box_px')
    return next((float(row.measures[key]) for key in keys if key in row.measures), 0.0)


def _typed(kind: Any, data: Any, file: Path) -> Any:
    """A dataclass from JSON values of the types that it declares.

    Raises:
        UsageError: A field is missing or of another type.
    """
    hints, values = get_type_hints(kind), {}
    for each in fields(kind):
        value = data.get(each.name) if isinstance(data, dict) else None
        hint = hints[each.name]
        inner = next((a for a in get_args(hint) if is_dataclass(a)), None)
        if inner is not None and isinstance(value, list):
            value = [_typed(inner, item, file) for item in value]
        elif is_dataclass(hint):
            value = _typed(hint, value, file)
        elif not _is_a(value, hint):
            raise UsageError(
                f'{file} has {each.name}={value!r:.60} in its {kind.__name__}, expected '
                f'{getattr(hint, "__name__", hint)}; export again.'
            )
        values[each.name] = value
    return kind(**values)


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (list, dict):
        of = get_args(hint)[-1]
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, get_origin(hint)) and (
            of is Any or all(_is_a(item, of) for item in items)
        )
    if isinstance(hint, UnionType):
        return any(_is_a(value, each) for each in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return [f'| {" | ".join(line)} |' for line in lines]


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


def _shown_as_text(node: Any) -> Any:
    """A report of somebody else, with nothing in its texts that a terminal would obey."""
    if isinstance(node, str):
        return printable(node)
    if isinstance(node, dict):
        return {printable(key): _shown_as_text(value) for key, value in node.items()}
    return [_shown_as_text(value) for value in node] if isinstance(node, list) else node

"""Comparing the artifacts of a folder again, with nothing but what is in it.

A report is data that somebody wrote: it says which file was exported how, and not how well a file
has to compute. What a file must keep to is `TOLERANCES`, and nothing outside of the folder is read.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..runtimes import ArtifactError, open_artifact
from ..runtimes.predictor import digest
from .errors import ParityError, UsageError
from .formats import FORMATS
from .parity import TOLERANCES, Golden, check_artifact
from .report import ArtifactRecord, ParityRecord, Report


def check_folder(report: Report, log: Console, trust: bool = False) -> None:
    """Check that every artifact is the file that was reported, and still computes its outputs.

    The report's rows are those of this check afterwards; the files stay as they are.

    Args:
        report: As it was loaded.
        log: For progress.
        trust: Run files that are code (TorchScript, AOTInductor).

    Raises:
        ParityError: One is missing, was changed, differs, or may not be run.
        UsageError: The report has other values than those of a report.
    """
    failed = []
    report.parity = []
    for record in report.artifacts:
        for name, allowed in (('format', FORMATS), ('dtype', TOLERANCES)):
            if getattr(record, name) not in allowed:
                raise UsageError(
                    f'the report in {report.folder} has an artifact with '
                    f'{name}={getattr(record, name)!r:.60}; there are {", ".join(allowed)}.'
                )
        record.status, reason = _check(report, record, trust)
        log.print(
            f'{record.status}: {record.path}{reason and f": {reason}"}',
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if record.status == 'FAILED':
            failed.append(f'{record.path}: {reason}')
    report.status = 'failed' if failed else 'ok'
    if failed:
        raise ParityError(
            f'{len(failed)} of {len(report.artifacts)} artifacts failed: {"; ".join(failed)}; '
            'export again with --force.'
        )


def _outside(report: Report, name: str) -> bool:
    """Whether a file of the report, or what belongs to it, is not in the folder of the report."""
    folder, path = report.folder.resolve(), report.folder / name
    parts = [path, *path.rglob('*')] if path.is_dir() else [path, path.with_suffix('.bin')]
    return any(folder not in part.resolve().parents for part in parts)


def _check(report: Report, record: ArtifactRecord, trust: bool) -> tuple[str, str]:
    """The status of one artifact, and why."""
    path, expected = report.folder / record.path, report.folder / record.golden
    row = FORMATS[record.format]
    if any(_outside(report, name) for name in (record.path, record.golden)):
        return 'FAILED', f'it or {Path(record.golden).name} is not in this folder'
    if not path.exists():
        return 'FAILED', 'the file is missing'
    if digest(path) != record.sha256:
        return 'FAILED', 'the file was changed since it was exported'
    if row.runtime is None:
        return 'unverified', 'nothing on this system runs it'
    if not expected.exists():
        return 'FAILED', f'{expected.name} is missing'
    try:
        with open_artifact(row.file(path), trust=trust) as artifact:
            rows = check_artifact(artifact, [Golden.load(expected)], TOLERANCES[record.dtype])
            runtime, precision = artifact.runtime, artifact.precision
    except (ArtifactError, ValueError, KeyError, IndexError) as error:
        return 'FAILED', str(error)
    report.parity += [
        ParityRecord(
            record.path, row.name, runtime, precision, r.output, r.passed, r.text, dict(r.measures)
        )
        for r in rows
    ]
    passed = bool(rows) and all(r.passed for r in rows)
    worst = next((r for r in rows if not r.passed), rows[-1] if rows else None)
    return ('ok' if passed else 'FAILED'), f'{worst.output}: {worst.text}' if worst else 'no rows'

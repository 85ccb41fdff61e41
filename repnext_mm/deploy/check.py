"""Comparing the artifacts of a folder again, with nothing but what is in it."""

from __future__ import annotations

from rich.console import Console

from ..runtimes import ArtifactError, open_artifact
from .errors import ParityError
from .formats import FORMATS
from .parity import Golden, Tolerance, check_artifact
from .report import Record, Report, digest


def check_folder(report: Report, log: Console) -> None:
    """Check that every artifact is the file that was reported, and still computes its outputs.

    The report's rows are those of this check afterwards; the files stay as they are.

    Raises:
        ParityError: One is missing, was changed, or differs.
    """
    failed = []
    report.data['parity'] = []
    for record in report.data['artifacts']:
        record['status'], reason = _check(report, record)
        log.print(
            f'{record["status"]}: {record["path"]}{reason and f": {reason}"}',
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        if record['status'] == 'FAILED':
            failed.append(f'{record["path"]}: {reason}')
    report.data['status'] = 'failed' if failed else 'ok'
    if failed:
        raise ParityError(
            f'{len(failed)} of {len(report.data["artifacts"])} artifacts failed: '
            f'{"; ".join(failed)}; export again with --force.'
        )


def _check(report: Report, record: Record) -> tuple[str, str]:
    """The status of one artifact, and why."""
    path = report.folder / record['path']
    row = FORMATS[record['format']]
    if not path.exists():
        return 'FAILED', 'the file is missing'
    if digest(path) != record['sha256']:
        return 'FAILED', 'the file was changed since it was exported'
    if row.runtime is None:
        return 'unverified', 'nothing on this system runs it'
    expected = report.folder / record['golden']
    if not expected.exists():
        return 'FAILED', f'{expected.name} is missing'
    try:
        with open_artifact(row.file(path)) as artifact:
            tolerance = Tolerance(**{k: float(v) for k, v in record['tolerance'].items()})
            rows = check_artifact(artifact, [Golden.load(expected)], tolerance)
            runtime = {'runtime': artifact.runtime, 'precision': artifact.precision}
    except ArtifactError as error:
        return 'FAILED', str(error)
    report.data['parity'] += [
        {'path': record['path'], 'format': row.name, **runtime, **r.as_record()} for r in rows
    ]
    worst = max(rows, key=lambda r: r.max_rel)
    reason = f'{worst.output} differs by {worst.max_rel:.1e} of its std, {worst.sqnr_db:.0f} dB'
    return ('ok' if all(r.passed for r in rows) else 'FAILED'), reason

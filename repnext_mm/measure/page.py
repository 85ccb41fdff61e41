"""One page of all results in a folder, and two results compared by ratio.

Results are what `repnext-mm benchmark ... --json FILE` writes, and the `report.json` of
`repnext-mm deploy ... --bench`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from . import accuracy_picture
from .environment import summary
from .rounds import Floor, Ratio

#: A change of less than this says nothing, however quiet the machine was.
LEAST_CHANGE = 1.05
#: What must be equal before ratios of two machines are compared.
MACHINE = ('cpu', 'architecture', 'isa', 'threads')


@dataclass(frozen=True)
class Row:
    """One variant: its median in ms, and its time in units of the reference's.

    Attributes:
        interval: Of the ratio; None for the reference.
    """

    variant: str
    ms: float
    ratio: float
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Section:
    """Variants that were timed in turns, each against one reference.

    Attributes:
        floor: A ratio between 1 / floor and floor says nothing.
    """

    title: str
    reference: str
    floor: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Result:
    """One file.

    Attributes:
        invocation: The command line that wrote it, where it is known.
        metric: What a picture of it has upwards, where there can be one.
    """

    path: Path
    invocation: str | None
    environment: Mapping[str, Any]
    load: Mapping[str, Any]
    sections: tuple[Section, ...]
    command: str
    metric: str | None = None


def read(path: Path) -> Result:
    """A result from its file.

    Raises:
        ValueError: The file cannot be read, or is no result.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a result: {error}.') from error
    try:
        if 'latency' in content and content.get('bench'):
            return _of_report(path, content)
        sections = [*_sections(content)]
        return Result(
            path,
            content.get('invocation'),
            content['environment'],
            content['load'],
            tuple(sections),
            content['command'],
            _metric(content),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no result of `repnext-mm benchmark ... --json`, nor a report.json of '
            '`repnext-mm deploy ... --bench`.'
        ) from error


def _metric(content: Mapping[str, Any]) -> str | None:
    """Accuracy to draw over time, if any network of the result has a published one."""
    if content['command'] != 'throughput':
        return None
    metric = 'box_AP' if content['settings']['features'] else 'top1'
    return metric if accuracy_picture.points(dict(content), metric) else None


def _sections(content: Mapping[str, Any]) -> Iterator[Section]:
    settings = content['settings']
    dtype = settings.get('dtype', '')
    if 'comparisons' in content:
        norms = ', frozen norm statistics' if settings.get('norm_eval') else ''
        memory = ', freed memory kept' if settings.get('keeps_memory') else ''
        for each in content['comparisons']:
            shape = 'x'.join(map(str, each['shape']))
            yield _section(f'{each["subject"]}, {shape}, {dtype}{norms}{memory}', each)
    elif content['command'] == 'throughput':
        size = 'x'.join(map(str, settings['size']))
        comparison = content['comparison']
        rows = [
            row
            | {
                'p50_ms': row['ms_per_image'],
                'ratio': row['ratio_per_image'],
                'interval': row['interval_per_image'],
            }
            for row in comparison['rows']
        ]
        yield _section(f'one image of a batch, {size}', {**comparison, 'rows': rows})
    else:
        title = f'box and mask AP of {settings["images"]} images'
        yield _section(f'{title} with {settings["results"]} results each', content['comparison'])


def _section(title: str, comparison: Mapping[str, Any]) -> Section:
    rows = tuple(
        Row(
            row['variant'],
            row['p50_ms'],
            row['ratio'],
            None if row['verdict'] == 'reference' else tuple(row['interval']),
            row['verdict'],
        )
        for row in comparison['rows']
    )
    return Section(title, comparison['reference'], comparison['floor']['limit'], rows)


def _of_report(path: Path, content: Mapping[str, Any]) -> Result:
    sections = []
    for bench in content['bench']:
        shape = bench['batch'], bench['size']
        rows = [row for row in content['latency'] if (row['batch'], row['size']) == shape]
        baseline = rows[0]['baseline']
        [floor] = {row['floor'] for row in rows if row['name'] == baseline}
        height, width = bench['size']
        title = f'{content["model"]["name"]}, {bench["batch"]}x3x{height}x{width}, one file each'
        found = tuple(
            Row(
                row['name'],
                row['p50'],
                row['vs_baseline'],
                None if row['name'] == baseline else tuple(row['vs_baseline_ci95']),
                'reference' if row['name'] == baseline else _verdict(row, floor),
            )
            for row in rows
        )
        sections.append(Section(title, baseline, floor, found))
    first = content['bench'][0]
    environment = {**first['env'], 'threads': first['threads']}
    given = content.get('invocation')
    return Result(path, given, environment, first['load'], tuple(sections), 'deploy')


def _verdict(row: Mapping[str, Any], floor: float) -> str:
    """Of the ratio to the baseline; a report has that to the reference of the same runtime."""
    low, high = row['vs_baseline_ci95']
    ratio = Ratio(row['vs_baseline'], low, high, row['rounds'])
    return Floor(Ratio(1.0, 1 / floor, floor, row['rounds'])).verdict(ratio)


# --- the page

TITLES = {
    'train-step': 'Training steps',
    'model-step': 'Training steps of complete models',
    'inference': 'Inference in PyTorch',
    'layers': 'Layers',
    'deploy': 'Exported files',
    'evaluation': 'Evaluation',
    'throughput': 'Images per second',
}


def write(folder: Path, out: Path) -> list[Path]:
    """Write the page of all results in a folder as Markdown, with a picture per throughput result.

    Files that are no results are left out.

    Args:
        folder: Where the results are.
        out: The page; its links are relative to it.

    Returns:
        The files that were written.

    Raises:
        ValueError: The folder has no result.
    """
    results = []
    for path in sorted(folder.glob('*.json')):
        try:
            results.append(read(path))
        except ValueError:
            continue
    if not results:
        raise ValueError(
            f'{folder} contains no result; `repnext-mm benchmark ... --json FILE` writes one.'
        )
    pictures = {
        result.path: accuracy_picture.draw(
            result.path, out.with_name(f'{result.path.stem}.png'), result.metric
        )
        for result in results
        if result.metric is not None
    }
    lines = [
        '# Measurements',
        '',
        f'Drawn by `repnext-mm benchmark page {_relative(folder, Path.cwd())}` from the JSON files '
        'beside it. Variants run in',
        'turns; a time is the median, a ratio the median of the ratios to the reference in the '
        'same round, in brackets its interval',
        'of 95 %. Ratios within the noise floor say nothing. Shared machines are noisy: compare '
        'ratios, not milliseconds.',
        '',
    ]
    for command, title in TITLES.items():
        own = [result for result in results if result.command == command]
        if own:
            lines += [f'## {title}', '']
        for result in own:
            lines += _shown(result, out, pictures.get(result.path))
    write_text(out, '\n'.join(lines).rstrip() + '\n')
    return [out, *pictures.values()]


def _shown(result: Result, out: Path, picture: Path | None) -> Iterator[str]:
    link = _relative(result.path, out.parent)
    yield f'[{result.path.name}]({link}): {summary(dict(result.environment))}.'
    if result.invocation:
        yield f'Command: `{result.invocation}`.'
    if not result.load['headline']:
        yield f'**Not for headlines:** {result.load["reason"]}.'
    yield ''
    if picture is not None:
        yield f'![{result.path.stem}]({_relative(picture, out.parent)})'
        yield ''
    for section in result.sections:
        yield f'### {section.title}'
        yield ''
        yield f'| variant | ms | time / {section.reference} | speed-up | |'
        yield '| --- | ---: | --- | ---: | --- |'
        for row in section.rows:
            name = f'<a id="{anchor(result, section, row)}"></a>{row.variant}'
            ratio = '1'
            if row.interval is not None:
                low, high = row.interval
                ratio = f'{row.ratio:.3f} [{low:.3f}, {high:.3f}]'
            speed_up = f'{1 / row.ratio:.2f}x'
            yield f'| {name} | {row.ms:.4g} | {ratio} | {speed_up} | {row.verdict} |'
        yield ''
        yield f'Noise floor: {1 / section.floor:.3f} to {section.floor:.3f}.'
        yield ''


def anchor(result: Result, section: Section, row: Row) -> str:
    """What a link to a row ends with: the file, the section where there are several, the row."""
    parts = [result.path.stem, row.variant]
    if len(result.sections) > 1:
        parts.insert(1, section.title)
    return '-'.join(re.sub(r'[^a-z0-9_.]+', '-', part.lower()).strip('-') for part in parts)


def _relative(path: Path, start: Path) -> str:
    try:
        return path.resolve().relative_to(start.resolve()).as_posix()
    except ValueError:
        return path.as_posix()


# --- two results


@dataclass(frozen=True)
class Change:
    """A variant in two results: the ratios to the reference, and how the later one differs."""

    section: str
    variant: str
    before: float
    after: float
    verdict: str


def changes(before: Result, after: Result, any_machine: bool = False) -> list[Change]:
    """What two results have in common, compared by the ratio to the same reference.

    A variant is slower or faster where the intervals have nothing in common and the change is
    beyond the noise floors of both and `LEAST_CHANGE`.

    Raises:
        ValueError: They have no variant in common, or are of two machines.
    """
    different = [key for key in MACHINE if before.environment[key] != after.environment[key]]
    if different and not any_machine:
        raise ValueError(
            f'{before.path} and {after.path} are of two machines ({", ".join(different)} differ); '
            'measure both on one, or add --any-machine.'
        )
    known = {
        (section.title, section.reference, row.variant): (section, row)
        for section in before.sections
        for row in section.rows
    }
    found = []
    for section in after.sections:
        for row in section.rows:
            if (pair := known.get((section.title, section.reference, row.variant))) is None:
                continue
            earlier, old = pair
            if row.interval is None or old.interval is None:  # a reference
                continue
            least = max(LEAST_CHANGE, earlier.floor, section.floor)
            apart = row.interval[0] > old.interval[1] or row.interval[1] < old.interval[0]
            change = row.ratio / old.ratio
            verdict = 'no measurable difference'
            if apart and not 1 / least <= change <= least:
                verdict = 'slower' if change > 1 else 'faster'
            found.append(Change(section.title, row.variant, old.ratio, row.ratio, verdict))
    if not found:
        raise ValueError(f'{before.path} and {after.path} have no variant in common.')
    return found


def summarized(found: Sequence[Change]) -> list[tuple[str, ...]]:
    """Rows of a table: variant, both ratios, the change and the verdict."""
    return [
        (
            f'{each.section}: {each.variant}',
            f'{each.before:.3f}',
            f'{each.after:.3f}',
            f'{each.after / each.before:.3f}',
            each.verdict,
        )
        for each in found
    ]

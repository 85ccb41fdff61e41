"""What `repnext-mm predict` does."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.folders import DataError, Example, LabeledFolder, read_folder
from ..engine.allocator import keep_freed_memory
from ..engine.errors import UserError, run_tool, sigterm_raises
from ..engine.inference import Result
from ..files import free_folder
from ..program import HelpFormatter, program
from ..runtimes.predictor import as_record
from ..text import closest, printable
from .outputs import KINDS, Outputs
from .predictor import Predictor
from .sources import BrokenSource, Source, find_sources, frames, reader, video_facts
from .truth import truth_of

PICTURE = ('.jpg', '.jpeg', '.png')
#: What is written where nothing is said.
SAVED = 'pictures,json'


@dataclass
class Job:
    """One image to predict on."""

    name: str
    image: np.ndarray
    source: Source
    frame: int | None = None
    rate: float | None = None


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm predict`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('predict'),
        usage='%(prog)s MODEL SOURCE ... [options]',
        description='Predict with a checkpoint or an exported file.',
        formatter_class=HelpFormatter,
    )
    add: Any = parser.add_argument
    add('model', help='checkpoint of a run, or an exported file, its folder or its model.json')
    add(
        'sources',
        nargs='+',
        metavar='SOURCE',
        help='image, video, folder, pattern, .txt list of images, or - for a list on stdin',
    )
    add(
        '--out',
        type=Path,
        metavar='DIR',
        help='folder for what is written, or a name such as drawn.png for one picture',
    )
    add('--save', default=SAVED, metavar='A,B', help=f'of {", ".join(KINDS)}')
    add('--json', action='store_true', help='print the results as JSON')
    add('--threshold', type=float, default=0.3, help='least score')
    add('--classes', metavar='A,B', help='keep these alone')
    add(
        '--show-truth',
        action='store_true',
        help='draw the labels beside; SOURCE is one folder of a format that train reads',
    )
    add('--batch', type=int, default=1, help='images computed together, of equal size')
    add('--stride', type=int, default=1, help='take every N-th frame of a video')
    add('--config', help='of a checkpoint that does not store it')
    add('--device', help='of a checkpoint, such as cpu or cuda:0 (None: a GPU if there is one)')
    add('--threads', type=int, help='of an exported file')
    add('--precision', choices=('f32', 'bf16', 'f16'), help='of OpenVINO')
    add('--trust', action='store_true', help='run a file that is code, which you made')  # fmt: skip
    args = parser.parse_args(argv)
    code = 0

    def run() -> None:
        nonlocal code
        code = predict(args)

    with sigterm_raises():
        return run_tool(run) or code


def predict(args: argparse.Namespace) -> int:
    """Predict, write and print; returns 1 where something could not be read.

    Raises:
        UserError: Nothing can be done.
    """
    kinds = [kind.strip() for kind in args.save.split(',')]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f'--save {kind} must be of {", ".join(KINDS)}.')
    for name in ('batch', 'stride'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)} must be at least 1.')
    if not 0 <= args.threshold <= 1:
        raise UserError(f'--threshold {args.threshold:g} must be from 0 to 1.')
    folder = _truth_folder(args) if args.show_truth else None
    if folder is not None:
        sources = [Source(folder.root / e.file, e.file) for e in folder.examples()]
    else:
        sources = find_sources(args.sources)
    predictor = Predictor(
        args.model, args.config, args.device, args.threads, args.precision, args.trust
    )
    if predictor.trained is not None and predictor.trained.on_cpu:
        keep_freed_memory()
    keep = _classes(predictor, args.classes)
    truth = _truths(folder, predictor) if folder is not None else {}
    out, single = _target(args.out, sources)
    outputs = Outputs(out, kinds if args.out else [], predictor.settings, args.threshold)
    broken: list[str] = []
    printed: list[dict[str, Any]] = []
    total = sum(_length(source, args.stride) for source in sources)
    done, started = 0, time.monotonic()
    with outputs, _bar(total, args) as advance:
        jobs = _jobs(sources, predictor, args.stride, broken)
        current: str | None = None
        while batch := list(islice(jobs, args.batch)):
            for job, result in zip(batch, _results(predictor, batch, broken), strict=True):
                if result is None:
                    continue
                if job.frame is None or job.name != current:
                    outputs.end_video()
                current = job.name
                result = _kept(result, keep)
                if single is not None:
                    _draw_one(single, outputs, job, result, truth.get(job.name))
                else:
                    outputs.add(
                        job.name, job.image, result, truth.get(job.name), job.frame, job.rate
                    )
                if args.json:
                    printed.append(_record(job, result, predictor))
                elif job.frame is None:
                    _print_result(job, result, predictor, args.threshold)
                done += 1
                advance(1)
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps(printed))
    for sentence in broken:
        print(f'skipped: {printable(sentence)}', file=sys.stderr)
    if not args.json and done:
        where = f'; wrote {single or out}' if args.out else ''
        print(f'{done} images, {done / max(seconds, 1e-9):.1f} per second{where}.')
    return 1 if broken or not done else 0


def _target(out: Path | None, sources: Sequence[Source]) -> tuple[Path, Path | None]:
    """The folder to write to, and the file for the one picture."""
    if out is None:
        return Path('.'), None
    inputs = {source.path.resolve() for source in sources}
    if out.suffix:
        if out.suffix.lower() not in PICTURE or out.is_dir():
            raise UserError(
                f'--out {out} is no name of a picture; give one such as drawn.png, or a folder.'
            )
        if len(sources) != 1 or sources[0].video:
            raise UserError(f'--out {out} is one picture, and there are more; give a folder.')
        if out.resolve() in inputs:
            raise UserError(f'--out {out} is one of the images; give another name.')
        return out.parent, out
    path = free_folder(out)
    if path != out:
        print(f'{out} has files already, so this run writes to {path}.')
    return path, None


def _draw_one(path: Path, outputs: Outputs, job: Job, result: Result, truth: Result | None) -> None:
    kinds, outputs.kinds = outputs.kinds, ['pictures']
    folder, outputs.folder = outputs.folder, path.parent
    try:
        outputs.add(path.name, job.image, result, truth)
    finally:
        outputs.kinds, outputs.folder = [k for k in kinds if k != 'json'], folder


def _length(source: Source, stride: int) -> int:
    return -(-video_facts(source.path)[0] // stride) if source.video else 1


def _jobs(
    sources: Sequence[Source], predictor: Predictor, stride: int, broken: list[str]
) -> Iterator[Job]:
    """Images one by one; what cannot be read is noted in `broken` and left out."""
    read = reader(predictor.read)
    for source in sources:
        try:
            if source.video:
                rate = video_facts(source.path)[1] / stride
                for number, frame in frames(source.path, stride):
                    yield Job(source.name, frame, source, number, rate)
            else:
                yield Job(source.name, read(source.path), source)
        except BrokenSource as error:
            broken.append(str(error))


def _results(predictor: Predictor, batch: list[Job], broken: list[str]) -> list[Result | None]:
    try:
        return list(predictor.batch([job.image for job in batch]))
    except ValueError as error:
        if len(batch) == 1:
            broken.append(f'{batch[0].source.path}: {error}')
            return [None]
    return [result for job in batch for result in _results(predictor, [job], broken)]


def _classes(predictor: Predictor, given: str | None) -> set[int] | None:
    if given is None:
        return None
    if predictor.task != 'detection':
        raise UserError(f'--classes is for detectors, and this model is for {predictor.task}.')
    kept = set()
    for name in (text.strip() for text in given.split(',')):
        if name not in predictor.classes:
            close = closest(name, predictor.classes)
            known = ', '.join(predictor.classes)
            hint = f'did you mean {close!r}?' if close else f'there are {known}.'
            raise UserError(f'--classes: the model has no class {name!r}; {hint}')
        kept.add(predictor.classes.index(name))
    return kept


def _kept(result: Result, classes: set[int] | None) -> Result:
    if classes is None or 'labels' not in result:
        return result
    rows = np.isin(result['labels'], sorted(classes))
    return {key: value[rows] for key, value in result.items()}


def _truth_folder(args: argparse.Namespace) -> LabeledFolder:
    if len(args.sources) != 1:
        raise UserError('--show-truth requires one folder of images with labels as SOURCE.')
    try:
        return read_folder(args.sources[0])
    except DataError as error:
        raise UserError(f'--show-truth: {error}') from error


def _truths(folder: LabeledFolder, predictor: Predictor) -> dict[str, Result]:
    """The labels of each image, with the model's numbers for the classes."""
    unknown = [name for name in folder.classes if name not in predictor.classes]
    if unknown:
        raise UserError(
            f'{folder.root} has the class {unknown[0]!r}, which the model does not have; '
            'leave out --show-truth.'
        )
    examples: list[Example] = list(folder.examples())
    return {e.file: truth_of(folder, e, predictor.classes) for e in examples}


def _record(job: Job, result: Result, predictor: Predictor) -> dict[str, Any]:
    """As the `predict.py` of an export prints it: every score, whatever is drawn."""
    height, width = job.image.shape[:2]
    where: dict[str, Any] = {'file': str(job.source.path), 'width': width, 'height': height}
    if job.frame is not None:
        where['frame'] = job.frame
    return {**where, **as_record(result, predictor.settings)}


def _print_result(job: Job, result: Result, predictor: Predictor, threshold: float) -> None:
    shown = as_record(result, predictor.settings, threshold)
    rows = [f'{r["name"]} {r["score"]:.2f}' for r in shown.get('best', ())]
    counts = Counter(r['name'] for r in shown.get('detections', ()))
    rows += [f'{n} {name}' for name, n in counts.most_common()]
    if 'pixels' in shown:
        pixels = job.image.shape[0] * job.image.shape[1]
        rows = [f'{name} {n / pixels:.0%}' for name, n in shown['pixels'].items()]
    print(printable(f'{job.source.path}: {", ".join(rows) or "nothing found"}'))


def _bar(total: int, args: argparse.Namespace) -> Any:
    """A progress bar with images per second, where there is a terminal and work to wait for."""
    if args.json or total < 2 or not sys.stdout.isatty():
        return nullcontext(lambda n: None)
    return _Bar(total)


class _Bar:
    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        rate = TextColumn('{task.fields[rate]} images/s')
        self._bar = Progress(BarColumn(), MofNCompleteColumn(), rate, Remaining(), transient=True)
        self._task = self._bar.add_task('', total=total, rate='-')
        self._started = time.monotonic()

    def __enter__(self) -> Any:
        self._bar.start()
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _advance(self, number: int) -> None:
        task = self._bar.tasks[0]
        spent = time.monotonic() - self._started
        rate = f'{(task.completed + number) / max(spent, 1e-9):.1f}'
        self._bar.update(self._task, advance=number, rate=rate)

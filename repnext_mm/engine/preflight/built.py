"""The data sets as mm has built them, whatever class they have and whatever wraps them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .findings import Finding, error, some, warning
from .pixels import Pixels, check_pixels
from .sources import Sources, spread

#: Seconds for reading the entries of one data set; what is left out then is said.
SECONDS = 20.0
#: Seconds after which a progress bar appears.
PATIENCE = 2.0
#: More than this share of unusable objects cannot be meant.
MOST_LOST = 0.5


@dataclass
class Summary:
    """What one data set holds, for the table and the report.

    `classes` gives the objects, or the pixels of the label maps that were read, of each class.
    """

    split: str
    kind: str
    images: int
    listed: int | None = None
    read: int = 0
    objects: int | None = None
    objects_listed: int | None = None
    ignored: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: Pixels | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def counts_pixels(self) -> bool:
        """Whether the classes are those of pixels."""
        return self.pixels is not None and self.objects is None and bool(self.classes)

    @property
    def counted(self) -> str:
        """What `classes` counts."""
        if self.counts_pixels:
            return 'pixels'
        return 'images' if self.objects is None else 'objects'


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers such as RepeatDataset, ConcatDataset and torch's Subset."""
    if isinstance(inner := getattr(dataset, 'datasets', None), list | tuple):
        for item in inner:
            yield from leaf_datasets(item)
    elif (one := getattr(dataset, 'dataset', None)) is not None and hasattr(one, '__getitem__'):
        yield from leaf_datasets(one)
    else:
        yield dataset


def check_dataset(split: str, dataset: Any, sources: Sources) -> list[Summary]:
    """Look at a built data set; one summary for each data set in it."""
    summaries = [_check_leaf(split, leaf, sources) for leaf in leaf_datasets(dataset)]
    if summaries and not len(dataset):
        summaries[0].findings.append(error(f'the {split} data is empty: no image is left to use.'))
    elif summaries and all(f.level != 'error' for summary in summaries for f in summary.findings):
        with kept_random_state():
            summaries[0].findings += _try_pipeline(split, dataset)
    return summaries


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """The class names of a built data set, if it knows them."""
    metainfo = getattr(dataset, 'metainfo', None)
    classes = metainfo.get('classes') if isinstance(metainfo, dict) else None
    return tuple(classes) if isinstance(classes, list | tuple) and classes else None


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Random numbers drawn in this context are drawn again after it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what mm draws from)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _check_leaf(split: str, dataset: Any, sources: Sources) -> Summary:
    summary = Summary(split, type(dataset).__name__, len(dataset))
    key = sources.key_of(dataset)
    summary.listed = sources.listed.get(key)
    if hasattr(dataset, 'count_classes'):
        summary.classes = dataset.count_classes()
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return summary
    classes = classes_of(dataset) or ()
    infos = _read(summary, dataset)
    _check_files(summary, dataset, infos)
    if any('instances' in info for info in infos):
        _count_objects(summary, infos, classes)
        if (kept := sources.kept.get(key)) is not None:
            summary.objects_listed = kept.objects
            summary.rules = {rule: count for rule, count in kept.rules.items() if count}
    summary.sizes.update(
        (int(info['height']), int(info['width']))
        for info in infos
        if info.get('height') and info.get('width')
    )
    if all(finding.level != 'error' for finding in summary.findings):
        with kept_random_state():
            summary.pixels = check_pixels(split, dataset, infos, classes)
        summary.findings += summary.pixels.findings
        if summary.objects is None and summary.pixels.labels:
            summary.classes = dict(summary.pixels.labels)
        if not summary.sizes:
            summary.sizes = summary.pixels.sizes
    _report_absent(summary)
    return summary


def _read(summary: Summary, dataset: Any) -> list[dict[str, Any]]:
    """The entries of a data set: all, or as many from all over as `SECONDS` allow."""
    start, total = time.monotonic(), len(dataset)
    infos: list[dict[str, Any]] = []
    order: Sequence[int] = range(total)
    probe = spread(range(total), 200)
    for i in probe:
        infos.append(dataset.get_data_info(i))
    each = (time.monotonic() - start) / len(probe)
    if len(probe) < total:
        affordable = int(SECONDS / max(each, 1e-9))
        order = order if affordable >= total else spread(order, affordable)
        infos = [
            dataset.get_data_info(i)
            for i in when_long(order, f'Reading the {summary.split} data', each * len(order))
        ]
    summary.read = len(infos)
    if len(infos) < total:
        summary.findings.append(
            warning(
                f'{len(infos)} of the {total} entries of the {summary.split} data were read, as '
                f'many as {SECONDS:.0f} s allow; the counts are of those.'
            )
        )
    return infos


def when_long(items: Sequence[Any], text: str, seconds: float) -> Iterable[Any]:
    """`items`, with a progress bar if going through them is estimated to take long."""
    if seconds < PATIENCE:
        return items
    from rich.progress import track

    return track(items, text)


def _check_files(summary: Summary, dataset: Any, infos: Sequence[dict[str, Any]]) -> None:
    """Every file is there; one listing per folder, as single look-ups are slow over a network."""
    backend = getattr(dataset, 'backend_args', None) or {}
    if backend.get('backend', 'local') != 'local':
        return
    listings: dict[str, set[str]] = {}
    for field_name in ('img_path', 'seg_map_path'):
        files = [str(info[field_name]) for info in infos if info.get(field_name)]
        missing = []
        for file in files:
            folder, name = os.path.split(file)
            if folder not in listings:
                listings[folder] = _names_in(folder or os.curdir)
            if name not in listings[folder]:
                missing.append(file)
        if missing:
            source = getattr(dataset, 'ann_file', '') or f'the images of the {summary.split} data'
            close = _other_case(missing[0], listings)
            summary.findings.append(
                error(
                    f'{len(missing)} of {len(files)} files are missing that belong to {source}, '
                    f'the first is {missing[0]}{close}; restore them, or remove their entries.'
                )
            )


def _names_in(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _other_case(file: str, listings: dict[str, set[str]]) -> str:
    folder, name = os.path.split(file)
    alike = [n for n in listings[folder] if n.lower() == name.lower()]
    stem = Path(name).stem
    alike = alike or [n for n in listings[folder] if Path(n).stem == stem]
    return f' (there is {alike[0]})' if alike else ''


def _count_objects(
    summary: Summary, infos: Sequence[dict[str, Any]], classes: Sequence[str]
) -> None:
    counts: Counter[int] = Counter()
    summary.objects = 0
    bad: list[str] = []
    for info in infos:
        height, width = info.get('height'), info.get('width')
        for instance in info.get('instances') or ():
            summary.objects += 1
            label = instance.get('bbox_label')
            if instance.get('ignore_flag'):
                summary.ignored += 1
            elif isinstance(label, int | np.integer):
                counts[int(label)] += 1
            fault = _box_fault(instance.get('bbox'), height, width)
            if fault:
                bad.append(f'{info.get("img_path")} has an object with {fault}')
    strange = [label for label in counts if classes and not 0 <= label < len(classes)]
    if strange:
        summary.findings.append(
            error(
                f'the {summary.split} data ({summary.kind}) gives objects the label {strange[0]}, '
                f'and its {len(classes)} classes have labels from 0 to {len(classes) - 1}; correct '
                'metainfo or the annotations.'
            )
        )
    names = classes or [str(label) for label in sorted(counts)]
    summary.classes = {name: counts[label] for label, name in enumerate(names)}
    if not summary.objects:
        sentence = (
            f'the {summary.split} data ({summary.kind}, {len(infos)} images) holds no object of '
            f'the classes {some(classes)}; correct metainfo or the annotations.'
        )
        summary.findings.append(error(sentence) if summary.split == 'train' else warning(sentence))
    if bad:
        sentence = (
            f'{len(bad)} of {summary.objects} boxes of the {summary.split} data ({summary.kind}) '
            f'cannot be used: {bad[0]}; expected corners x1, y1, x2, y2 in pixels inside the '
            'image: correct the annotations.'
        )
        lost = len(bad) > MOST_LOST * summary.objects
        summary.findings.append(error(sentence) if lost else warning(sentence))


def _box_fault(box: Any, height: Any, width: Any) -> str | None:
    if box is None:
        return None
    values = np.asarray(box, float).reshape(-1)
    if len(values) != 4:
        return None  # rotated boxes and the like
    x1, y1, x2, y2 = values.tolist()
    if not np.isfinite(values).all() or x2 - x1 < 1 or y2 - y1 < 1:
        return f'the box {_numbers(values)}, which is narrower than a pixel'
    if height and width and (x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0):
        return f'the box {_numbers(values)} outside of its {width} x {height} pixels'
    return None


def _numbers(values: np.ndarray) -> str:
    return f'[{", ".join(f"{v:g}" for v in values)}]'


def _report_absent(summary: Summary) -> None:
    absent = [name for name, count in summary.classes.items() if not count]
    if absent and len(absent) < len(summary.classes):
        what = (
            f'in the {summary.pixels.maps} label maps that were read'
            if summary.counts_pixels and summary.pixels
            else 'among the objects'
        )
        summary.findings.append(
            warning(
                f'{len(absent)} of the {len(summary.classes)} classes of the {summary.split} data '
                f'never occur {what}: {some(absent)}.'
            )
        )


def _try_pipeline(split: str, dataset: Any) -> Iterator[Finding]:
    """Two entries through the whole pipeline, as the data loader will ask for them."""
    for index in sorted({0, len(dataset) - 1}):
        try:
            dataset[index]
        except Exception as reason:
            text = ' '.join(str(reason).split())
            yield error(
                f'the pipeline of the {split} data fails on entry {index} '
                f'({type(reason).__name__}: {text[:300]}); correct the pipeline or the entry, and '
                'set REPNEXT_MM_TRACEBACK=1 to see where.'
            )
            if os.environ.get('REPNEXT_MM_TRACEBACK'):
                raise
            return

"""The pre-flight: what would go wrong in hours, or pass in silence, is said in seconds.

It looks at what mm will use: the data sets, pipelines and model as they are built.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop

from ...text import printable
from ..errors import UserError
from .built import Summary, check_dataset, classes_of, kept_random_state, leaf_datasets
from .findings import Finding, error, some
from .keywords import check_keywords
from .model import check_architecture, check_model
from .report import batch_size_of, loop_of, show, write_report
from .sources import Sources, check_sources

__all__ = ['Finding', 'Sources', 'check_config', 'check_sources', 'preflight', 'require']


def require(findings: Iterable[Finding], report: Path | None = None) -> None:
    """Say the warnings on stderr, and stop at errors, of which `report` is written then.

    Raises:
        UserError: One of `findings` is an error; further ones are on stderr.
    """
    findings = list(dict.fromkeys(findings))
    for finding in findings:
        if finding.level == 'warning':
            print(f'warning: {printable(finding.sentence)}', file=sys.stderr, flush=True)
    errors = [finding.sentence for finding in findings if finding.level == 'error']
    for sentence in errors[1:]:
        print(f'error: {printable(sentence)}', file=sys.stderr, flush=True)
    if errors:
        if report is not None:
            write_report(report, (), findings, None)
            print(f'Wrote {report}.', flush=True)
        raise UserError(errors[0])


def check_config(cfg: Config) -> list[Finding]:
    """Check the config of a model by itself: its keywords, and which part fits to which."""
    return check_keywords(cfg) or check_architecture(cfg)


def preflight(
    runner: Runner,
    splits: Sequence[str],
    sources: Sources,
    report: Path | None = None,
) -> None:
    """Check the built data sets of `splits`, print a short table, and stop at what is wrong.

    Args:
        runner: The runner; its loops of `splits` are built here, as `train` and `test` would.
        splits: Of 'train', 'val' and 'test'.
        sources: What `check_sources` found, and `require` has said.
        report: Where to write everything as JSON.

    Raises:
        UserError: Something cannot be meant.
    """
    loops = {split: loop for split in splits if (loop := loop_of(runner, split)) is not None}
    summaries: list[Summary] = []
    for split, loop in loops.items():
        summaries += check_dataset(split, loop.dataloader.dataset, sources)
    found = [
        *_check_model(runner, loops),
        *(finding for summary in summaries for finding in summary.findings),
        *_compare_classes({s: loop.dataloader.dataset for s, loop in loops.items()}),
    ]
    show(summaries, runner)
    if report is not None:
        write_report(report, summaries, [*sources.findings, *found], runner)
        print(f'Wrote {report}.', flush=True)
    require(found)


def _check_model(runner: Runner, loops: Mapping[str, BaseLoop]) -> list[Finding]:
    model: BaseModel = getattr(runner.model, 'module', runner.model)
    split, loop = next(iter(loops.items()), (None, None))
    if loop is None:
        return []
    dataset = loop.dataloader.dataset
    batch_size = batch_size_of(loop.dataloader) if split == 'train' else None
    crop = None
    if batch_size == 1 and len(dataset):
        with kept_random_state(), suppress(Exception):  # that it fails is said for the data
            crop = tuple(dataset[0]['inputs'].shape[-2:])
    classes = next((c for leaf in leaf_datasets(dataset) if (c := classes_of(leaf))), None)
    return check_model(model, classes, batch_size, crop)


def _compare_classes(datasets: dict[str, object]) -> Iterable[Finding]:
    """All data sets of a run have the same classes in the same order."""
    known = [
        (split, classes)
        for split, dataset in datasets.items()
        for leaf in leaf_datasets(dataset)
        if (classes := classes_of(leaf)) is not None
    ]
    for (split, classes), (other, others) in combinations(known, 2):
        if classes != others:
            place = next(
                (i for i, (a, b) in enumerate(zip(classes, others, strict=False)) if a != b),
                min(len(classes), len(others)),
            )
            yield error(
                f'the {split} data has {len(classes)} classes ({some(classes)}) and the {other} '
                f'data {len(others)} ({some(others)}), which differ from label {place} on; give '
                'every data set the same metainfo=dict(classes=(...)), in the order of its '
                'annotation file.'
            )
            return

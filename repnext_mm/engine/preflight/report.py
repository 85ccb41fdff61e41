"""The short table of a pre-flight, and its report as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop

from ...files import write_text
from ...text import printable
from .built import Summary
from .coco import RULES
from .findings import Finding

#: Classes whose counts are printed; the report has all.
MOST_CLASSES = 10


def show(summaries: Sequence[Summary], runner: Runner) -> None:
    """Print what the data sets hold and what the run will do with them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ('Data', 'left'),
        ('Data set', 'left'),
        ('Images', 'right'),
        ('Objects', 'right'),
        ('Height x width', 'left'),
        ('Batch', 'right'),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for summary in summaries:
        table.add_row(
            summary.split,
            escape(summary.kind),
            _of(summary.images, summary.listed),
            '' if summary.objects is None else _of(summary.objects, summary.objects_listed),
            _sizes(summary),
            str(_batch(runner, summary.split)),
        )
    console.print(table)
    for summary in summaries:
        if summary.classes:
            console.print(escape(printable(_classes(summary))), soft_wrap=True)
        if summary.rules:
            parts = ', '.join(f'{count} {RULES[rule]}' for rule, count in summary.rules.items())
            console.print(escape(f'{summary.split}: left out {parts}'), soft_wrap=True)
    if any(summary.split == 'train' for summary in summaries):
        console.print(escape(schedule(runner)), soft_wrap=True)


def _of(kept: int, listed: int | None) -> str:
    return str(kept) if listed in (None, kept) else f'{kept} of {listed}'


def _sizes(summary: Summary) -> str:
    if not summary.sizes:
        return ''
    (height, width), _ = summary.sizes.most_common(1)[0]
    if len(summary.sizes) == 1:
        return f'{height} x {width}'
    heights, widths = zip(*summary.sizes, strict=True)
    return f'{min(heights)} to {max(heights)} x {min(widths)} to {max(widths)}'


def _classes(summary: Summary) -> str:
    counts = sorted(summary.classes.items(), key=lambda item: -item[1])
    total = sum(summary.classes.values()) or 1
    shown = ', '.join(
        f'{name} {count / total:.1%}' if summary.counts_pixels else f'{name} {count}'
        for name, count in counts[:MOST_CLASSES]
    )
    more = f' and {len(counts) - MOST_CLASSES} more' if len(counts) > MOST_CLASSES else ''
    what = summary.counted
    if summary.counts_pixels and summary.pixels:
        what = f'pixels of {summary.pixels.maps} label maps'
    ignored = f'; {summary.ignored} ignored' if summary.ignored else ''
    return f'{summary.split}: {what} by class: {shown}{more}{ignored}'


def loop_of(runner: Runner, split: str) -> BaseLoop | None:
    """The built loop of a split."""
    loop = getattr(runner, f'{split}_loop')
    return loop if isinstance(loop, BaseLoop) else None


def _batch(runner: Runner, split: str) -> int:
    loop = loop_of(runner, split)
    batch = batch_size_of(loop.dataloader) if loop is not None else None
    return (batch or 1) * runner.world_size


def batch_size_of(dataloader: Any) -> int | None:
    """Images of a batch in one process; those of the sampler of batches, if there is one."""
    own = getattr(dataloader, 'batch_size', None)
    return own or getattr(getattr(dataloader, 'batch_sampler', None), 'batch_size', None)


def schedule(runner: Runner) -> str:
    """One line: the length of the run, the optimizer, its rate and what changes it."""
    loop: Any = runner.train_loop
    epochs, length = loop.max_epochs, len(loop.dataloader)
    by_epoch = type(loop).__name__.startswith('Epoch')
    run = f'{epochs} epochs of {length} iterations' if by_epoch else f'{loop.max_iters} iterations'
    wrapper = runner.cfg.get('optim_wrapper') or {}
    optimizer = wrapper.get('optimizer') or {}
    parts = [f'{run}, {optimizer.get("type", "optimizer")} with lr {optimizer.get("lr")}']
    if (count := wrapper.get('accumulative_counts', 1)) > 1:
        parts.append(f'gradients of {count} batches accumulated')
    given = runner.cfg.get('param_scheduler') or []
    for item in given if isinstance(given, list) else [given]:
        unit = 'epochs' if item.get('by_epoch', True) else 'iterations'
        where = item.get('milestones') or [item.get('begin', 0), item.get('end')]
        parts.append(f'{item.get("type")} {where} in {unit}')
    parts += [str(hook) for hook in runner.hooks if hasattr(hook, 'schedule')]
    return f'schedule: {", ".join(parts)}'


def write_report(
    path: Path, summaries: Sequence[Summary], findings: Sequence[Finding], runner: Runner | None
) -> None:
    """Write everything that was found to `path`."""
    content = {
        'findings': [{'level': f.level, 'sentence': f.sentence} for f in findings],
        'data': [
            {
                'split': s.split,
                'data_set': s.kind,
                'images': s.images,
                'images_listed': s.listed,
                'entries_read': s.read,
                'objects': s.objects,
                'objects_listed': s.objects_listed,
                'objects_ignored': s.ignored,
                'left_out': {RULES[rule]: count for rule, count in s.rules.items()},
                'classes': s.classes,
                'classes_count': s.counted,
                'sizes': [[h, w, count] for (h, w), count in s.sizes.most_common()],
                'images_decoded': s.pixels.images if s.pixels else 0,
                'headers_read': s.pixels.headers if s.pixels else 0,
                'label_maps_read': s.pixels.maps if s.pixels else 0,
                'batch_size': _batch(runner, s.split) if runner else None,
            }
            for s in summaries
        ],
    }
    if runner is not None and any(s.split == 'train' for s in summaries):
        content['schedule'] = schedule(runner)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + '\n')

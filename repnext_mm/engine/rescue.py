"""A run that is stopped or has no space left: what it has found is kept, and a line says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import get_world_size
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop

from ..files import FULL, write_text
from .errors import UserError


@contextmanager
def explain_full_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """In this context, an error for want of space is one for the user.

    Args:
        folder: What the run writes to, for an error that does not name its file.

    Raises:
        UserError: There is no space left; the message has the file and what is free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path = Path(os.fsdecode(error.filename)) if error.filename else None
        free = shutil.disk_usage(path.parent if path and path.parent.is_dir() else folder).free
        place = f'a file of the run in {os.fspath(folder)}'
        raise UserError(
            f'{path or place} cannot be written: {error.strerror}, {free / 2**20:.1f} MiB are free '
            'there; free some space, or give a --work-dir on another disk.'
        ) from error


@contextmanager
def keep_results(runner: Runner) -> Iterator[None]:
    """Where a test ends in an error or is interrupted, write the metrics of its finished images.

    They go to `<log dir>/<timestamp>_unfinished.json`, and a line on stderr says so. In several
    processes, of which the others still run, nothing can be put together.
    """
    try:
        yield
    except BaseException:
        loop = runner._test_loop
        if isinstance(loop, BaseLoop) and get_world_size() == 1:
            with _sigterm_ignored():
                _save(runner, loop)
        raise


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Launchers pass on the signal that their processes have got already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(runner: Runner, loop: BaseLoop) -> None:
    metrics = loop.evaluator.metrics
    finished = min((len(metric.results) for metric in metrics), default=0)
    if not finished:
        return
    for metric in metrics:
        if hasattr(metric, 'img_ids'):  # COCO's counts an image without a result as all missed
            metric.img_ids = [result['img_id'] for _, result in metric.results]
    total = len(loop.dataloader.dataset)
    found = loop.evaluator.evaluate(finished)
    content = {'finished_images': finished, 'images': total, **found}
    text = json.dumps(content, default=float)
    path = Path(runner.log_dir, f'{runner.timestamp}_unfinished.json')
    try:
        write_text(path, text)
        where = f'in {path}'
    except OSError as error:
        where = f'not in {path} ({error.strerror}): {text}'
    print(f'Stopped after {finished} of {total} images; their metrics are {where}', file=sys.stderr)

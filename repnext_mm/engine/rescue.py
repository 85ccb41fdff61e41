"""What an evaluation has found is kept when it stops in the middle."""

from __future__ import annotations

import errno
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop

from ..files import write_text
from .errors import UserError

#: What the system answers when nothing more can be written: the disk, the quota, the limit.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class KeepMetrics(Hook):
    """Keeps the metrics of a test until they are in a file."""

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Keep `metrics`."""
        self.metrics = dict(metrics or {})


@contextmanager
def keep_results(runner: Runner) -> Iterator[None]:
    """Where a test ends in an error or is interrupted, write the metrics of its finished images.

    They go to `<log dir>/<timestamp>_unfinished.json`, and a line on stderr says so. In several
    processes, of which the others still run, nothing can be put together. Where no file can be
    written, the metrics are printed.

    Raises:
        UserError: All images are finished, and there is no space for the file of the metrics.
    """
    kept = KeepMetrics()
    runner.register_hook(kept, priority='HIGHEST')
    try:
        yield
    except BaseException as failure:
        path = Path(runner.log_dir, f'{runner.timestamp}.json')
        if kept.metrics and isinstance(failure, OSError) and failure.errno in NO_SPACE:
            text = json.dumps(kept.metrics, default=float)
            if path.is_file() and path.stat().st_size < len(text):
                path.unlink()  # what mmengine has begun to write
            raise UserError(
                f'the metrics do not fit on the disk of {path} ({failure.strerror}; {len(text)} '
                f'bytes are needed): {text}'
            ) from failure
        loop = runner._test_loop
        if isinstance(loop, BaseLoop) and get_world_size() == 1:
            _save(runner, loop)
        raise


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
    text = json.dumps({'finished_images': finished, 'images': total, **found}, default=float)
    path = Path(runner.log_dir, f'{runner.timestamp}_unfinished.json')
    try:
        write_text(path, text)
        where = f'are in {path}'
    except OSError as error:
        where = f'do not fit on the disk of {path} ({error.strerror}): {text}'
    print(f'Stopped after {finished} of {total} images; their metrics {where}.', file=sys.stderr)


def no_ground_truth(metrics: Mapping[str, Any]) -> str | None:
    """A sentence if no metric could be measured, as without any annotated object or pixel."""
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
    wanted = {k: v for k, v in numbers.items() if k.rsplit('/', 1)[-1].endswith(('mAP', 'mIoU'))}
    unmeasured = {k: v for k, v in wanted.items() if v < 0 or math.isnan(v)}
    if unmeasured:
        shown = ', '.join(f'{k}={v:g}' for k, v in unmeasured.items())
        return (
            f'{shown} means that there is no ground truth of the classes in the test data, and not '
            'a result; check ann_file and metainfo, with --check-only.'
        )
    return None

"""What an evaluation has found is kept when it stops in the middle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import get_world_size
from mmengine.runner import Runner
from mmengine.runner.loops import BaseLoop

from ..files import write_text


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
    content = {'finished_images': finished, 'images': total, **found}
    path = Path(runner.log_dir, f'{runner.timestamp}_unfinished.json')
    write_text(path, json.dumps(content, default=float))
    print(
        f'Stopped after {finished} of {total} images; their metrics are in {path}.', file=sys.stderr
    )

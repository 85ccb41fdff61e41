"""A small detector and a small segmentor, and evaluations of them in this process."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mm_models
import torch
from conftest import randomise
from mmengine.config import Config
from networks import TINY
from tool_runs import CONFIGS

from repnext_mm.engine.cli import evaluate_main

METRICS = {'det': 'coco/bbox_mAP', 'seg': 'mIoU'}
ONE_POINT = {'det': 0.01, 'seg': 1.0}
NETWORK = 'repnext_m'


@dataclass
class Trained:
    """A config, a checkpoint that fits it, and what moves the config to the test's data.

    `found` is the ground truth of a detector, where it has its own.
    """

    task: str
    config: Path
    checkpoint: Path
    options: list[str]
    found: Path | None = None

    @property
    def data_root(self) -> Path:
        (root,) = (o for o in self.options if o.startswith('data_root='))
        return Path(root.removeprefix('data_root='))

    def evaluate(self, *args: Any, settings: tuple[str, ...] = (), **paths: Path) -> Evaluation:
        """Run tools/test.py, by default on `config` and `checkpoint`."""
        config, checkpoint = (paths.get(k, getattr(self, k)) for k in ('config', 'checkpoint'))
        work_dir = self.config.parent / 'work_dirs'
        command = [str(config), str(checkpoint), f'--work-dir={work_dir}', *map(str, args)]
        command += [*self.options, *settings]
        if self.found is not None:
            command += [
                f'{part}.ann_file={self.found}'
                for part in ('test_dataloader.dataset', 'test_evaluator')
            ]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = evaluate_main(command)
        return Evaluation(code, out.getvalue(), err.getvalue(), METRICS[self.task])


@dataclass
class Evaluation:
    code: int
    out: str
    err: str
    name: str

    @property
    def metric(self) -> float:
        assert self.code == 0, self.err
        written = re.search(r'^Wrote (\S+\.json)', self.out, re.MULTILINE)
        assert written, self.out[-2000:]
        return json.loads(Path(written[1]).read_text())[self.name]

    @property
    def sentence(self) -> str:
        """The error, which must be one line."""
        assert self.code == 1
        assert 'Traceback' not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith('error: ')]
        assert len(lines) == 1, self.err
        return lines[0]


def trained(task: str, folder: Path, options: list[str], base: Path | None = None) -> Trained:
    """A model with random weights, which are to a comparison what trained ones are.

    A detector's would find nothing. Its ground truth is what it finds itself, so that its AP is
    near 1 and whatever changes a box or the order of scores lowers it.

    Args:
        task: 'det' or 'seg'.
        folder: Made for it.
        options: `--cfg-options` and its settings.
        base: The config to take a small backbone in; the sample data's unless given.
    """
    folder.mkdir()
    config, checkpoint = folder / f'{task}.py', folder / 'random.pth'
    arch = TINY[NETWORK][1]
    config.write_text(
        f'_base_ = {str(base or CONFIGS[task])!r}\n'
        f'model = dict(backbone=dict(arch=dict(_delete_=True, **{arch!r}), init_cfg=None), '
        f'neck=dict(in_channels={list(arch["channels"])!r}))\n'
        'test_dataloader = dict(batch_size=1)\n'
        + ('model["test_cfg"] = dict(rcnn=dict(score_thr=0.0))\n' if task == 'det' else '')
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(mm_models.build(Config.fromfile(config)))
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    made = Trained(task, config, checkpoint, options)
    if task == 'det':
        prefix = folder / 'found'
        evaluation = made.evaluate(settings=(f'test_evaluator.outfile_prefix={prefix}',))
        assert evaluation.code == 0, evaluation.err
        truth = made.data_root / 'annotations' / 'instances_val2017.json'
        content = json.loads(truth.read_text())
        found = json.loads(Path(f'{prefix}.segm.json').read_text())
        seen = {one['image_id'] for one in found}
        content['images'] = [image for image in content['images'] if image['id'] in seen]
        best = sorted(found, key=lambda one: -one['score'])[: 4 * len(seen)]
        content['annotations'] = [
            dict(one, id=number, iscrowd=0, area=one['bbox'][2] * one['bbox'][3])
            for number, one in enumerate(best, start=1)
        ]
        made.found = folder / 'found.json'
        made.found.write_text(json.dumps(content))
    return made

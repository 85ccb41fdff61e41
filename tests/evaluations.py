"""A small detector and a small segmentor, and evaluations of them in this process."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mm_models
import numpy as np
import tool_runs
import torch
from conftest import randomise
from mmengine.config import Config
from networks import TINY
from PIL import Image
from tool_runs import CONFIGS, run_here
from torch import nn

from repnext_mm.checkpoints.reading import read_weights
from repnext_mm.engine.cli import evaluate_main

METRICS = {'det': 'coco/bbox_mAP', 'seg': 'mIoU'}
ONE_POINT = {'det': 0.01, 'seg': 1.0}
NETWORK = 'repnext_m'
RUN_NUMBERS = itertools.count()


@dataclass
class Trained:
    """A config, a checkpoint that fits it, and what moves the config to the test's data.

    `truth` are the settings that make the model's own predictions the ground truth.
    """

    task: str
    config: Path
    checkpoint: Path
    options: list[str]
    truth: tuple[str, ...] = ()

    @property
    def data_root(self) -> Path:
        (root,) = (o for o in self.options if o.startswith('data_root='))
        return Path(root.removeprefix('data_root='))

    def evaluate(self, *args: Any, settings: tuple[str, ...] = (), **paths: Path) -> Evaluation:
        """Run tools/test.py, by default on `config` and `checkpoint`."""
        config, checkpoint = (paths.get(k, getattr(self, k)) for k in ('config', 'checkpoint'))
        # Results are named by the second: two quick evaluations would write into one file.
        work_dir = self.config.parent / 'work_dirs' / str(next(RUN_NUMBERS))
        options = [*args, *self.options, *self.truth, *settings]
        command = (evaluate_main, config, checkpoint, '--work-dir', work_dir, *options)
        done = run_here(*command, cwd=Path.cwd())
        return Evaluation(done.returncode, done.stdout, done.stderr, METRICS[self.task])


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


def backbone_of(model: Trained) -> nn.Module:
    """The backbone of a detector or a segmentor, with its weights."""
    network, arch = TINY[NETWORK]
    backbone = network(arch)
    tensors = read_weights(model.checkpoint).tensors
    own = {k.removeprefix('backbone.'): v for k, v in tensors.items() if k.startswith('backbone.')}
    backbone.load_state_dict(own)
    return backbone


def trained(task: str, folder: Path, options: list[str], base: Path | None = None) -> Trained:
    """A model with random weights, which are to a comparison what trained ones are.

    Random predictions miss the ground truth and would go on missing it when they change. So the
    ground truth is what the model itself predicts: its AP or mIoU is near its maximum, and
    whatever changes a box, the order of scores or a pixel's class lowers it.

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
    made.truth = own_boxes(made, folder) if task == 'det' else own_maps(made, folder)
    return made


def small_models(root: Path) -> dict[str, Trained]:
    """A detector and a segmentor, on a few small scenes."""
    data = tool_runs.tiny_shapes(root / 'shapes')
    return {
        task: trained(task, root / task, tool_runs.options(task, data)) for task in ('det', 'seg')
    }


def own_boxes(model: Trained, folder: Path) -> tuple[str, ...]:
    """Take the best boxes that a detector finds for the ground truth."""
    prefix = folder / 'found'
    evaluation = model.evaluate(settings=(f'test_evaluator.outfile_prefix={prefix}',))
    assert evaluation.code == 0, evaluation.err
    content = json.loads((model.data_root / 'annotations/instances_val2017.json').read_text())
    found = json.loads(Path(f'{prefix}.segm.json').read_text())
    seen = {one['image_id'] for one in found}
    content['images'] = [image for image in content['images'] if image['id'] in seen]
    best = sorted(found, key=lambda one: -one['score'])[: 4 * len(seen)]
    content['annotations'] = [
        dict(one, id=number, iscrowd=0, area=one['bbox'][2] * one['bbox'][3])
        for number, one in enumerate(best, start=1)
    ]
    (folder / 'found.json').write_text(json.dumps(content))
    return boxes_of(folder / 'found.json')


def boxes_of(file: Path) -> tuple[str, ...]:
    """The settings that make `file` a detector's ground truth."""
    return tuple(
        f'{part}.ann_file={file}' for part in ('test_dataloader.dataset', 'test_evaluator')
    )


def own_maps(model: Trained, folder: Path) -> tuple[str, ...]:
    """Take the classes that a segmentor gives to pixels for the ground truth."""
    truth = folder / 'found'
    evaluation = model.evaluate(settings=(f'test_evaluator.output_dir={truth}',))
    assert evaluation.code == 0, evaluation.err
    classes = {value for path in truth.iterdir() for value in np.unique(Image.open(path))}
    assert len(classes) > 2, 'too few classes to tell one prediction from another'
    return (f'test_dataloader.dataset.data_prefix.seg_map_path={truth}',)

"""Configs and checkpoints on a few real images, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import labeled_folders as made
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from repnext_mm.datasets.folders import Example, LabeledFolder
from repnext_mm.engine.cli import train_parser
from repnext_mm.engine.frameworks import import_framework
from repnext_mm.own_data.command import _add_options, make_plan
from repnext_mm.own_data.config import write_config
from repnext_mm.prediction.truth import mask_of


def eight(real: LabeledFolder) -> list[Example]:
    """Eight real images with one to five objects, the largest not small."""
    found = [
        e
        for e in made.some(real, 1000)
        if 1 <= len(e.objects) <= 5 and max(o.area or 0 for o in e.objects) > 8000
    ]
    return found[:8]


def write(real: LabeledFolder, examples: list[Example], root: Path, kind: str) -> Path:
    """A folder of the kind 'polygons' (Roboflow), 'boxes' (YOLO), 'masks' or 'classes'."""
    if kind == 'polygons':
        made.roboflow(real, examples, root)
    elif kind == 'boxes':
        made.yolo_boxes(real, examples, root)
    elif kind == 'masks':
        large = [o for e in examples for o in e.objects if (o.area or 0) > 20000]
        names = sorted({real.classes[o.label] for o in large})
        for example in examples:
            image = made.copy(real, example, root / 'images')
            labels = np.zeros((example.height, example.width), np.uint8)
            for item in sorted(example.objects, key=lambda o: -(o.area or 0)):
                inside = mask_of(item, (example.height, example.width))
                if (name := real.classes[item.label]) in names:
                    labels[inside] = 1 + names.index(name)
            (root / 'masks').mkdir(exist_ok=True)
            Image.fromarray(labels).save(root / 'masks' / f'{image.stem}.png')
        (root / 'classes.txt').write_text('\n'.join(['background', *names]))
    else:
        indoors = {'toilet', 'sink', 'oven', 'refrigerator', 'bed'}
        for example in examples:
            there = {real.classes[o.label] for o in example.objects} & indoors
            made.copy(real, example, root / ('indoors' if there else 'elsewhere'))
    return root


def arguments(*given: str) -> argparse.Namespace:
    parser = train_parser()
    _add_options(parser)
    return parser.parse_args(list(given))


def config(data: Path, work_dir: Path, *options: str) -> Path:
    """The config that `train` writes, of a network without pretrained weights."""
    args = arguments(
        str(data), f'--work-dir={work_dir}', '--pretrained=none', '--val-share=0', *options
    )
    return write_config(make_plan(args))


def checkpoint(path: Path, target: Path, seed: int = 0) -> Path:
    """A checkpoint of a run that has not trained yet, as MMEngine writes it."""
    cfg = Config.fromfile(path)
    model = build(cfg, seed)
    metainfo: Any = cfg.train_dataloader.dataset.metainfo.to_dict()
    meta = {'cfg': cfg.pretty_text, 'dataset_meta': metainfo, 'epoch': 1, 'iter': 1}
    torch.save({'meta': meta, 'state_dict': model.state_dict(), 'message_hub': {}}, target)
    return target


def build(cfg: Config, seed: int = 0) -> Any:
    import_framework(cfg.default_scope)
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith('fc_cls.weight'):  # so that some class stands out
            parameter.data.mul_(100)
    return model.eval()

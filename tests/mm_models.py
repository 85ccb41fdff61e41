"""Building models of mmdet and mmseg, and running them once on the sample data."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from conftest import REPO
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import BaseDataElement

from repnext_mm.datasets import shapes

SAMPLE = 128  # pixels


def build(cfg: Config) -> Any:
    """The config's model, without weights."""
    framework = import_module(f'{cfg.default_scope}.utils')
    framework.register_all_modules(init_default_scope=False)
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def sample_data(root: Path) -> Path:
    """Two training images, in both layouts."""
    return shapes.generate(root, shapes.Spec(train=2, val=1, size=SAMPLE))


def sample_batch(scope: str, root: Path, pipeline: list | None = None, size: int = SAMPLE) -> dict:
    """Two images of the sample data through a training pipeline, or through the sample's own.

    Whatever the pipeline resizes to, it resizes to `size`, for a prediction takes one size only.
    """
    method, folder = dict(mmdet=('mask_rcnn', 'coco'), mmseg=('semantic_fpn', 'ade'))[scope]
    cfg = Config.fromfile(REPO / 'configs' / f'{method}_repnext_m0_shapes.py')
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = str(root / folder)
    dataset.pipeline = copy.deepcopy(pipeline or dataset.pipeline)
    if scope == 'mmdet' and not any(t['type'] == 'Resize' for t in dataset.pipeline):
        # It notes the factor by which predictions are scaled back.
        dataset.pipeline.insert(-1, dict(type='Resize', scale=(size, size)))
    for transform in dataset.pipeline:
        for key in ('scale', 'crop_size'):
            if key in transform:
                transform[key] = (size, size)
        if 'ratio_range' in transform:
            transform['ratio_range'] = (1.0, 1.0)
    with DefaultScope.overwrite_default_scope(scope):
        return pseudo_collate([*DATASETS.build(dataset)])


def train_and_predict(model: Any, batch: dict) -> tuple[dict[str, Any], list[BaseDataElement]]:
    """One loss, which must reach the first layer, by name; and one prediction per image."""
    model = revert_sync_batchnorm(model)  # it needs a GPU
    model.train()
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    total, named = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert total > 0
    first = next(model.backbone.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch, training=False), mode='predict')
    assert len(results) == len(batch['inputs'])
    return named, results

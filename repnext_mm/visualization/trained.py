"""Pictures of what a checkpoint predicts on the validation data of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, DefaultScope

from ..checkpoints import read_run
from ..classification.tested import is_classifier
from ..engine.frameworks import import_framework
from ..engine.inference import build_trained
from .labels import classify, draw_answers
from .pictures import compare, draw_comparisons


def load_trained(checkpoint: Path, cfg: Config) -> tuple[Any, BaseModel]:
    """The validation data of a config, and its model with the weights of a checkpoint."""
    import_framework(cfg.get('default_scope'))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    return dataset, build_trained(cfg, read_run(checkpoint))


def draw_predictions(checkpoint: Path, cfg: Config, path: Path, count: int) -> Path:
    """Draw predictions of a checkpoint beside the truth; returns `path`."""
    dataset, model = load_trained(checkpoint, cfg)
    return draw_pictures(model, dataset, path, count, answers=is_classifier(cfg))


def draw_pictures(model: BaseModel, dataset: Any, path: Path, count: int, answers: bool) -> Path:
    """Draw labels of images from all over a data set, or regions of its first `count` images."""
    classes, images = dataset.metainfo['classes'], len(dataset)
    if answers:
        shown = range(0, images, -(-images // (4 * count)))
        return draw_answers(classify(model, dataset, shown), classes, path, per_row=count)
    comparisons = compare(model, dataset, range(min(count, images)))
    return draw_comparisons(comparisons, classes, path)

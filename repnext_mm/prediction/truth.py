"""Labels of an image in the form of a prediction, to be drawn and compared alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..datasets.folders import Example, LabeledFolder, Object
from ..datasets.folders.masks import read_indices
from ..engine.inference import Result


def truth_of(folder: LabeledFolder, example: Example, classes: Sequence[str]) -> Result:
    """The labels of an example, with the numbers that `classes` gives them.

    Args:
        folder: That it is from.
        example: One of its examples.
        classes: Of the model; each class of the folder is one of them.
    """
    numbers = np.array([classes.index(name) for name in folder.classes], np.int64)
    if folder.kind == 'classes':
        chosen = np.zeros(len(classes), np.float32)
        chosen[numbers[example.label or 0]] = 1
        return {'probabilities': chosen}
    if folder.kind == 'masks':
        indices = read_indices(folder, example)
        ignored = indices >= len(numbers)
        mapped = numbers[np.where(ignored, 0, indices)]
        return {'classes': np.where(ignored, 255, mapped)}
    objects = [item for item in example.objects if not item.crowd]
    boxes = np.array([item.box for item in objects], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    result: Result = {
        'boxes': boxes,
        'scores': np.ones(len(objects), np.float32),
        'labels': numbers[[item.label for item in objects]] if objects else np.zeros(0, np.int64),
    }
    if folder.kind == 'polygons':
        shape = example.height, example.width
        result['masks'] = np.array([mask_of(item, shape) for item in objects], bool).reshape(
            -1, *shape
        )
    return result


def mask_of(item: Object, shape: tuple[int, int]) -> np.ndarray:
    """The pixels `(H, W)` of an object, as pycocotools draws them."""
    from pycocotools import mask as coco_masks

    if isinstance(item.segmentation, list):
        runs = coco_masks.merge(coco_masks.frPyObjects(item.segmentation, *shape))
    elif isinstance(item.segmentation, dict):
        runs = item.segmentation
        if isinstance(runs['counts'], list):
            runs = coco_masks.frPyObjects(runs, *shape)
    else:
        return np.zeros(shape, bool)
    return coco_masks.decode(runs).astype(bool)

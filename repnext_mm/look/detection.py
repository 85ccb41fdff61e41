"""Detections beside the truth: AP by class, confusions, and errors by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np

from ..engine.inference import Result

#: TIDE (arXiv 2008.08115, section 2.2): a detection is right from the first IoU on, and on
#: background up to the second.
RIGHT, BACKGROUND = 0.5, 0.1
#: Kinds of errors by their names there.
KINDS = {
    'cls': 'classification: right place, wrong class',
    'loc': 'localization: right class, imprecise place',
    'both': 'both: wrong class and imprecise place',
    'dupe': 'duplicate: found before, with a higher score',
    'bkg': 'background: nothing is there',
    'miss': 'missed: an object that nothing else explains',
}
RECALLS = np.linspace(0, 1, 101)


@dataclass
class Found:
    """One detection after matching, or, with score None, an object that was missed.

    Args:
        image: Index of the image.
        label: Class of the detection, or of the object.
        score: Of the detection.
        kind: 'right', 'ignored', or one of `KINDS`.
        truth: Index of the object that it is right about, or would have been.
        fixed: Class of that object.
    """

    image: int
    label: int
    score: float | None
    kind: str
    truth: int | None = None
    fixed: int | None = None


@dataclass
class Evaluation:
    """What an evaluation of detections says.

    Args:
        classes: Names.
        objects: Number of objects of each class.
        rows: For each class: AP, AP50, AP75; NaN where it has no object.
        summary: The same over all classes, and AP of small, medium and large objects.
        precisions: Precision at `RECALLS` for each class, at an IoU of 0.5.
        confusion: `(C + 1, C + 1)`: objects by their class and the one found; last row: nothing was
            there; last column: nothing was found.
        found: Every detection and every missed object.
        gains: What AP50 would gain without the errors of each kind.
    """

    classes: tuple[str, ...]
    objects: list[int]
    rows: list[dict[str, float]]
    summary: dict[str, float]
    precisions: np.ndarray
    confusion: np.ndarray
    found: list[Found] = field(repr=False)
    gains: dict[str, float]


@dataclass
class Scene:
    """Truth and detections of one image."""

    shape: tuple[int, int]
    truth: Result
    crowds: Result
    prediction: Result


def evaluate(
    scenes: Sequence[Scene], classes: Sequence[str], threshold: float, masks: bool
) -> Evaluation:
    """Evaluate detections.

    Args:
        scenes: Of every image.
        classes: Names of the classes.
        threshold: Least score of a detection in the confusion matrix.
        masks: Compare masks instead of boxes.
    """
    evaluated = _coco(scenes, len(classes), masks)
    overlaps = [_overlaps(scene, masks) for scene in scenes]
    found = [
        item
        for number, (scene, pair) in enumerate(zip(scenes, overlaps, strict=True))
        for item in classify(number, scene, *pair)
    ]
    objects = np.bincount(
        np.concatenate([scene.truth['labels'] for scene in scenes]).astype(int),
        minlength=len(classes),
    )
    return Evaluation(
        tuple(classes),
        objects.tolist(),
        *evaluated,
        _confusion(scenes, overlaps, len(classes), threshold),
        found,
        gains(found, objects),
    )


# --- AP, by pycocotools


def _coco(
    scenes: Sequence[Scene], classes: int, masks: bool
) -> tuple[list[dict[str, float]], dict[str, float], np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.shape
        images.append({'id': number, 'height': height, 'width': width})
        for result, crowd in ((scene.truth, 0), (scene.crowds, 1)):
            for row in _rows(result, masks):
                extra = {'id': len(annotations) + 1, 'image_id': number, 'iscrowd': crowd}
                annotations.append({**row, **extra})
        results += [{**row, 'image_id': number} for row in _rows(scene.prediction, masks)]
    truth = COCO()
    truth.dataset = {
        'info': {},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i + 1, 'name': str(i)} for i in range(classes)],
    }
    empty = np.full((10, 101, classes, 4, 3), -1.0)
    with redirect_stdout(StringIO()):
        truth.createIndex()
        if results:
            evaluator = COCOeval(truth, truth.loadRes(results), 'segm' if masks else 'bbox')
            evaluator.evaluate()
            evaluator.accumulate()
            precision = evaluator.eval['precision']
        else:
            precision = np.where(
                _present(annotations, classes)[None, None, :, None, None], 0, empty
            )
    rows = [
        {
            'AP': _mean(precision[:, :, i, 0, 2]),
            'AP50': _mean(precision[0, :, i, 0, 2]),
            'AP75': _mean(precision[5, :, i, 0, 2]),
        }
        for i in range(classes)
    ]
    summary = {
        'AP': _mean(precision[..., 0, 2]),
        'AP50': _mean(precision[0, ..., 0, 2]),
        'AP75': _mean(precision[5, ..., 0, 2]),
        'AP small': _mean(precision[..., 1, 2]),
        'AP medium': _mean(precision[..., 2, 2]),
        'AP large': _mean(precision[..., 3, 2]),
    }
    return rows, summary, precision[0, :, :, 0, 2].T


def _present(annotations: Sequence[Mapping[str, Any]], classes: int) -> np.ndarray:
    there = np.zeros(classes, bool)
    for annotation in annotations:
        there[annotation['category_id'] - 1] = True
    return there


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else float('nan')


def _rows(result: Result, masks: bool) -> list[dict[str, Any]]:
    from ..prediction.outputs import encoded

    rows = []
    for i, (box, label) in enumerate(zip(result['boxes'], result['labels'], strict=True)):
        x0, y0, x1, y1 = (float(value) for value in box)
        row: dict[str, Any] = {'category_id': int(label) + 1, 'bbox': [x0, y0, x1 - x0, y1 - y0]}
        row['area'] = (x1 - x0) * (y1 - y0)
        if masks:
            row['segmentation'] = encoded(result['masks'][i])
            row['area'] = float(result['masks'][i].sum())
        if 'scores' in result:
            row['score'] = float(result['scores'][i])
        rows.append(row)
    return rows


# --- matching


def _overlaps(scene: Scene, masks: bool) -> tuple[np.ndarray, np.ndarray]:
    """IoU of detections with objects `(P, T)`, and with groups of objects `(P, G)`."""
    from pycocotools import mask as coco_masks

    def prepared(result: Result) -> Any:
        if masks:
            return [row['segmentation'] for row in _rows(result, True)]
        boxes = result['boxes'].astype(np.float64).copy()
        boxes[:, 2:] -= boxes[:, :2]
        return boxes

    tables: list[np.ndarray] = []
    for other, crowd in ((scene.truth, 0), (scene.crowds, 1)):
        shape = len(scene.prediction['boxes']), len(other['boxes'])
        if 0 in shape:
            tables.append(np.zeros(shape))
        else:
            iou = coco_masks.iou(prepared(scene.prediction), prepared(other), [crowd] * shape[1])
            tables.append(np.asarray(iou).reshape(shape))
    return tables[0], tables[1]


def classify(number: int, scene: Scene, overlap: np.ndarray, grouped: np.ndarray) -> list[Found]:
    """What each detection of an image is, and which objects are missed, as TIDE defines it."""
    labels, scores = scene.prediction['labels'], scene.prediction['scores']
    truth = scene.truth['labels']
    same = labels[:, None] == truth[None, :]
    # Detections are right in the order of their scores, each about the object it fits best.
    left = overlap * same
    matched = np.full(len(labels), -1)
    for i in np.argsort(-scores, kind='stable'):
        if left.shape[1] and left[i].max() >= RIGHT:
            matched[i] = left[i].argmax()
            left[:, matched[i]] = 0
    used = np.zeros(len(truth), bool)
    used[matched[matched >= 0]] = True
    reachable = np.zeros(len(truth), bool)
    found = []
    for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
        item = Found(number, int(label), float(score), 'right')
        found.append(item)
        if matched[i] >= 0:
            item.truth = int(matched[i])
            continue
        group = grouped[i] * (scene.crowds['labels'] == label)
        if group.size and group.max() > RIGHT:
            item.kind = 'ignored'
            continue
        item.kind, about = _kind(overlap[i], same[i], used)
        if about is not None:
            item.truth, item.fixed = about, int(truth[about])
            reachable[about] |= not used[about]
    for index in np.flatnonzero(~used & ~reachable):
        found.append(Found(number, int(truth[index]), None, 'miss', int(index)))
    return found


def _kind(overlap: np.ndarray, same: np.ndarray, used: np.ndarray) -> tuple[str, int | None]:
    """The kind of a false detection, and the object that it would be right about."""
    if not overlap.size:
        return 'bkg', None
    own, other, taken = overlap * same, overlap * ~same, overlap * same * used
    if BACKGROUND <= own.max() < RIGHT:
        return 'loc', int(own.argmax())
    if other.max() >= RIGHT:
        return 'cls', int(other.argmax())
    if taken.max() >= RIGHT:
        return 'dupe', None
    if overlap.max() < BACKGROUND:
        return 'bkg', None
    return 'both', None


# --- what errors cost


def average_precision(rows: Sequence[tuple[float, bool]], positives: int) -> float:
    """COCO's AP at one IoU of detections (score, right); NaN without objects."""
    if positives <= 0:
        return float('nan')
    if not rows:
        return 0.0
    right = np.array([r for _, r in sorted(rows, key=lambda row: -row[0])], float)
    true = right.cumsum()
    recall, precision = true / positives, true / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side='left')
    return float(np.append(envelope, 0.0)[places].mean())


def gains(found: Sequence[Found], objects: np.ndarray) -> dict[str, float]:
    """How much AP at an IoU of 0.5 gains if all errors of one kind are mended, one kind at a time.

    A wrong class becomes the right one and an imprecise place the object's, for the best of both
    about an object that no other detection found; every other error of the kind is left out.
    """
    before = _mean_ap(found, objects, None)
    return {kind: _mean_ap(found, objects, kind) - before for kind in KINDS}


def _mean_ap(found: Sequence[Found], objects: np.ndarray, mended: str | None) -> float:
    positives = objects.astype(int).copy()
    rows: dict[int, list[tuple[float, bool]]] = {}
    best: dict[tuple[int, int], Found] = {}
    taken = {(f.image, f.truth) for f in found if f.kind == 'right'}
    for item in found:
        if item.kind in ('cls', 'loc') and item.score is not None and item.truth is not None:
            key = (item.image, item.truth)
            if key not in taken and (key not in best or item.score > (best[key].score or 0)):
                best[key] = item
    chosen = {id(item) for item in best.values()}
    for item in found:
        if item.kind == 'ignored':
            continue
        if item.score is None:
            positives[item.label] -= mended == 'miss'
        elif item.kind != mended:
            rows.setdefault(item.label, []).append((item.score, item.kind == 'right'))
        elif id(item) in chosen:
            label = item.label if item.fixed is None else item.fixed
            rows.setdefault(label, []).append((item.score, True))
    values = [average_precision(rows.get(i, []), int(n)) for i, n in enumerate(positives)]
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float('nan')


def _confusion(
    scenes: Sequence[Scene],
    overlaps: Sequence[tuple[np.ndarray, np.ndarray]],
    classes: int,
    threshold: float,
) -> np.ndarray:
    """Objects by class and class found, whatever the class, at an IoU of 0.5."""
    table = np.zeros((classes + 1, classes + 1), int)
    for scene, (overlap, grouped) in zip(scenes, overlaps, strict=True):
        labels, scores = scene.prediction['labels'], scene.prediction['scores']
        truth = scene.truth['labels']
        free = np.ones(len(truth), bool)
        for i in np.argsort(-scores, kind='stable'):
            if scores[i] < threshold:
                break
            candidates = overlap[i] * free
            # Of the objects that it covers, its own class first.
            ranked = candidates + (candidates >= RIGHT) * (truth == labels[i])
            if ranked.size and candidates[ranked.argmax()] >= RIGHT:
                free[ranked.argmax()] = False
                table[truth[ranked.argmax()], labels[i]] += 1
            elif not (grouped.shape[1] and grouped[i].max() > RIGHT):
                table[classes, labels[i]] += 1
        for label in truth[free]:
            table[label, classes] += 1
    return table

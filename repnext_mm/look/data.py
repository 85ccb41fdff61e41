"""A data set itself: classes, sizes, places, and images that are nearly the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..datasets.folders import Example, LabeledFolder

#: Bits of 64 in which the hashes of two pictures of the same scene may differ.
NEAR = 6
#: Cells of the map of positions, and of the grid that hashes are of.
GRID, HASH = 48, 8


@dataclass
class Statistics:
    """What a folder contains.

    Args:
        counts: By split: number of objects, pixels (in millions) or images of each class.
        sides: Square roots of the boxes' areas, in pixels.
        aspects: Width / height of boxes.
        places: `(GRID, GRID)` how often a place of an image is in a box.
        most: Images with the most objects.
        none: Images without any.
        twins: Pairs of nearly equal images of train and val, with the bits in which they differ.
    """

    counts: dict[str, list[float]]
    sides: list[float] = field(default_factory=list)
    aspects: list[float] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.zeros((GRID, GRID)))
    most: list[tuple[Example, int]] = field(default_factory=list)
    none: list[Example] = field(default_factory=list)
    twins: list[tuple[Example, Example, int]] = field(default_factory=list)


def describe_data(
    folder: LabeledFolder,
    splits: dict[str, list[Example]],
    track: Callable[[Sequence[Example]], Iterable[Example]] = iter,
) -> Statistics:
    """Count, measure and compare what is in a folder.

    Args:
        folder: As it was read.
        splits: Examples of 'train' and 'val', as they are trained with.
        track: May show the progress of hashing.
    """
    result = Statistics({name: _counts(folder, found) for name, found in splits.items()})
    examples = [example for found in splits.values() for example in found]
    for example in examples:
        for item in example.objects:
            x, y, w, h = item.box
            if w <= 0 or h <= 0:
                continue
            result.sides.append(math.sqrt(w * h))
            result.aspects.append(w / h)
            left, right = (int(GRID * v / example.width) for v in (x, x + w))
            top, bottom = (int(GRID * v / example.height) for v in (y, y + h))
            result.places[max(top, 0) : bottom + 1, max(left, 0) : right + 1] += 1
    if folder.kind in ('boxes', 'polygons'):
        ranked = sorted(examples, key=lambda e: (-len(e.objects), e.file))
        result.most = [(e, len(e.objects)) for e in ranked[:8] if e.objects]
        result.none = [e for e in examples if not e.objects]
    result.twins = near_duplicates(folder.root, splits, track)
    return result


def _counts(folder: LabeledFolder, examples: Sequence[Example]) -> list[float]:
    from ..datasets.folders.masks import read_indices

    count = len(folder.classes)
    if folder.kind == 'classes':
        labels = Counter(example.label for example in examples)
        return [float(labels[i]) for i in range(count)]
    if folder.kind == 'masks':
        pixels = np.zeros(256, np.int64)
        for example in examples:
            pixels += np.bincount(read_indices(folder, example).reshape(-1), minlength=256)
        return (pixels[:count] / 1e6).tolist()
    labels = Counter(item.label for example in examples for item in example.objects)
    return [float(labels[i]) for i in range(count)]


def near_duplicates(
    root: Path,
    splits: dict[str, list[Example]],
    track: Callable[[Sequence[Example]], Iterable[Example]] = iter,
) -> list[tuple[Example, Example, int]]:
    """Images of val that are nearly one of train, the nearest first.

    Images that are in both splits are no finding: the user has asked for it.
    """
    same = {e.file for e in splits.get('train', ())} & {e.file for e in splits.get('val', ())}
    train = [e for e in splits.get('train', ()) if e.file not in same]
    val = [e for e in splits.get('val', ()) if e.file not in same]
    if not train or not val:
        return []
    hashes = {e.file: picture_hash(root / e.file) for e in track([*train, *val])}
    table = np.array([hashes[e.file] for e in train], np.uint8)
    found = []
    for example in val:
        different = np.unpackbits(table ^ hashes[example.file], axis=1).sum(1)
        for i in np.flatnonzero(different <= NEAR):
            found.append((train[i], example, int(different[i])))
    return sorted(found, key=lambda pair: (pair[2], pair[1].file, pair[0].file))


def picture_hash(path: Path) -> np.ndarray:
    """64 bits as 8 bytes: whether brightness rises from each cell of a small copy to the next.

    The difference hash: it stays nearly the same when a picture is resized, compressed or made
    brighter.
    """
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture).convert('L')
        small = np.asarray(upright.resize((HASH + 1, HASH), Image.Resampling.LANCZOS), np.int16)
    return np.packbits((small[:, 1:] > small[:, :-1]).reshape(-1))

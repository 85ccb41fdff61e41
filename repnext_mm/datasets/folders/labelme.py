"""LabelMe: a JSON file of shapes per image."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtimes.predictor import run_lengths
from .records import (
    DataError,
    Example,
    LabeledFolder,
    Object,
    named_classes,
    polygon_box,
    size_of,
    split_of,
)

NAME = 'LabelMe'
#: Corners of the polygon that a circle becomes.
CORNERS = 72
HEAD = 1 << 16


def find(root: Path) -> list[Path]:
    """The annotation files below a folder."""
    return [path for path in sorted(root.rglob('*.json')) if _looks_right(path)]


def _looks_right(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(HEAD)
    return b'"shapes"' in head and b'"categories"' not in head


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples of every split; shapes of one label and one group are one object.

    Raises:
        DataError: A file cannot be read, or no image was found.
    """
    notes: list[str] = []
    parsed: list[tuple[Path, Path, list[dict[str, Any]]]] = []
    lone = []
    for path in files:
        content = _load(path)
        image = _image_of(root, path, str(content.get('imagePath') or ''))
        if image is None:
            lone.append(path)
        else:
            parsed.append((path, image, content['shapes']))
    if not parsed:
        raise DataError(
            f'{root} has {len(files)} files of LabelMe, and the images that they name are not '
            'beside them; copy them there.'
        )
    skipped: Counter[str] = Counter()
    drawn: list[tuple[Path, Path, list[tuple[str, Any, str]]]] = []
    for path, image, shapes in parsed:
        size = size_of(image)
        drawn.append((path, image, _shapes(path, shapes, size, skipped)))
    names = (label for _, _, shapes in drawn for label, _, _ in shapes)
    classes = named_classes(root, (name for name in names if not name.startswith('__')))
    splits: dict[str, list[Example]] = {}
    boxes = outlines = 0
    for path, image, outlined in drawn:
        height, width = size_of(image)
        objects = []
        for label, segmentation, shape in outlined:
            if label.startswith('__'):  # LabelMe's own marks, such as __ignore__
                skipped[label] += 1
                continue
            box = _box(segmentation)
            boxes += shape == 'rectangle'
            outlines += shape != 'rectangle'
            objects.append(Object(classes.index(label), box, segmentation))
        parts = path.relative_to(root).parts[:-1]
        split = next((found for part in parts if (found := split_of(part))), 'train')
        example = Example(image.relative_to(root).as_posix(), height, width, objects)
        splits.setdefault(split, []).append(example)
    kind = 'polygons' if outlines else 'boxes'
    if kind == 'boxes':
        for example in (e for split in splits.values() for e in split):
            for item in example.objects:
                item.segmentation = None
    elif boxes:
        notes.append(f'{boxes} rectangles are the outlines of their objects.')
    for what, count in skipped.items():
        notes.append(f'{count} shapes of the kind {what} are left out.')
    if lone:
        notes.append(
            f'{len(lone)} annotation files have no image and are left out, the first is '
            f'{lone[0].relative_to(root)}.'
        )
    return LabeledFolder(root, NAME, kind, classes, splits, notes)  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{path} cannot be read as JSON ({error}).') from error
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        raise DataError(f'{path} has no list of shapes.')
    return content


def _image_of(root: Path, path: Path, name: str) -> Path | None:
    named = (path.parent / name.replace('\\', '/')).resolve()
    beside = [p for p in sorted(path.parent.glob(f'{path.stem}.*')) if p.suffix != '.json']
    for image in (named, path.parent / Path(name.replace('\\', '/')).name, *beside):
        if image.is_file() and image.resolve().is_relative_to(root.resolve()):
            return root / image.resolve().relative_to(root.resolve())
    return None


def _shapes(
    path: Path, shapes: list[Any], size: tuple[int, int], skipped: Counter[str]
) -> list[tuple[str, Any, str]]:
    """Label, segmentation and kind of each object."""
    groups: dict[Any, tuple[str, Any, str]] = {}
    for number, shape in enumerate(shapes):
        try:
            label, points = str(shape['label']), shape['points']
            kind = shape.get('shape_type') or 'polygon'
            outline = _outline(path, shape, kind, points, size)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f'{path}: shape {number + 1} cannot be read ({error}).') from error
        if outline is None:
            skipped[kind] += 1
            continue
        group = shape.get('group_id')
        key = (label, group) if group is not None else number
        if key in groups and isinstance(outline, list) and isinstance(groups[key][1], list):
            groups[key][1].extend(outline)
        else:
            groups[key if key not in groups else number] = (label, outline, kind)
    return list(groups.values())


def _outline(path: Path, shape: Any, kind: str, points: Any, size: tuple[int, int]) -> Any:
    if kind == 'polygon':
        flat = [float(value) for point in points for value in point]
        return [flat] if len(flat) >= 6 else None
    if kind == 'mask':
        return _mask(path, shape, points, size)
    if kind == 'rectangle':
        (x0, y0), (x1, y1) = points[0], points[-1] if len(points) == 2 else points[2]
        x0, x1, y0, y1 = *sorted((float(x0), float(x1))), *sorted((float(y0), float(y1)))
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    if kind == 'circle':
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
        ring = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        return [[value for point in ring for value in point]]
    return None


def _mask(path: Path, shape: Any, points: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """The run lengths of a mask, which is stored as a picture of its box; None if it is empty."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(shape['mask']))) as picture:
        inside = np.asarray(picture) > 0
    if not inside.any():
        return None
    full = np.zeros(size, bool)
    x, y = (round(value) for value in points[0])
    if x < 0 or y < 0 or y + inside.shape[0] > size[0] or x + inside.shape[1] > size[1]:
        raise DataError(f'{path} has a mask beyond the edge of its image.')
    full[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return run_lengths(full)


def _box(segmentation: Any) -> tuple[float, float, float, float]:
    if isinstance(segmentation, list):
        return polygon_box(segmentation)
    import numpy as np

    height, width = segmentation['size']
    counts = segmentation['counts']
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    rows, columns = np.nonzero(flat.reshape(height, width, order='F'))
    left, top = float(columns.min()), float(rows.min())
    return left, top, float(columns.max()) + 1 - left, float(rows.max()) + 1 - top

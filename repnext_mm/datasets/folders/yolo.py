"""YOLO's text files: one per image, a line per object, boxes or polygons from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import (
    NAME_FILES,
    SPLITS,
    DataError,
    Example,
    LabeledFolder,
    Object,
    images_in,
    polygon_box,
    read_names,
    read_text,
    size_of,
    split_of,
    unique_names,
)

NAME = 'YOLO'
SETTINGS = ('data.yaml', 'dataset.yaml', 'data.yml')
#: Coordinates beyond 0 and 1 by so much are rounding of the program that wrote them.
ROUNDING = 1e-3


def find(root: Path) -> list[Path]:
    """The file with the class names, if the folder is of this format."""
    for name in SETTINGS:
        if (root / name).is_file() and 'names' in read_text(root / name):
            return [root / name]
    for name in NAME_FILES:
        if (root / name).is_file() and any(_label_files(root)):
            return [root / name]
    if any(_label_files(root)):
        return [root]  # labels without names
    return []


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples of every split.

    Raises:
        DataError: A line is wrong, class names are missing, or there is no image.
    """
    (source,) = files
    if source == root:
        raise DataError(
            f'{root} has labels of YOLO and no class names; add data.yaml with names, or '
            'classes.txt with one name per line.'
        )
    notes: list[str] = []
    if source.suffix in ('.yaml', '.yml'):
        names, folders = _settings(root, source)
    else:
        names, folders = read_names(source), _folders(root)
    splits: dict[str, list[Example]] = {}
    shapes = {'boxes': 0, 'polygons': 0}
    unlabeled = used = 0
    for split, images in folders.items():
        examples = []
        for image in images:
            label = _label_of(image)
            height, width = size_of(image)
            example = Example(image.relative_to(root).as_posix(), height, width)
            if label.is_file():
                used += 1
                for line, number in _lines(label):
                    item, shape = _object(label, number, line, len(names), width, height)
                    shapes[shape] += 1
                    example.objects.append(item)
            else:
                unlabeled += 1
            examples.append(example)
        splits[split] = examples
    if not any(splits.values()):
        raise DataError(f'{root} has labels of YOLO, and no image was found for them.')
    if not used:
        raise DataError(
            f'{root} has {unlabeled} images and none has a label file; labels of YOLO are beside '
            'the images, or in labels/ where the images are in images/.'
        )
    if unlabeled:
        notes.append(f'{unlabeled} images have no label file: they are images without objects.')
    known = {_label_of(image) for images in folders.values() for image in images}
    lone = [path for path in _label_files(root) if path not in known]
    if lone:
        notes.append(
            f'{len(lone)} label files have no image and are left out, the first is '
            f'{lone[0].relative_to(root)}.'
        )
    kind = 'polygons' if shapes['polygons'] and not shapes['boxes'] else 'boxes'
    if shapes['polygons'] and shapes['boxes']:
        notes.append(
            f'{shapes["boxes"]} objects have no outline, so boxes alone are used (those around '
            f'{shapes["polygons"]} outlines too).'
        )
    return LabeledFolder(root, NAME, kind, names, splits, notes)  # type: ignore[arg-type]


def _settings(root: Path, path: Path) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    import yaml

    try:
        content: Any = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = ' '.join(str(error).split())
        raise DataError(f'{path} cannot be read as YAML ({reason}).') from error
    names = content.get('names') if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(f'{path}: names must count from 0 to {len(names) - 1}.')
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f'{path} has no list of names.')
    base = path.parent
    if content.get('path') and (base / str(content['path'])).is_dir():
        base = base / str(content['path'])
    folders: dict[str, list[Path]] = {}
    for split in SPLITS:
        given = content.get(split) or (content.get('valid') if split == 'val' else None)
        entries = given if isinstance(given, list) else [given] if given else []
        images = [image for entry in entries for image in _images(root, path, base, str(entry))]
        if images:
            folders[split] = list(dict.fromkeys(images))
    return unique_names(names, path), folders or _folders(root)


def _images(root: Path, path: Path, base: Path, entry: str) -> list[Path]:
    """The images that one entry of data.yaml means."""
    tail = Path(entry)
    # Roboflow writes paths from a folder beside; other exports keep those of another machine.
    inner = [Path(*tail.parts[i:]) for i in range(1, len(tail.parts))]
    for place in (base / tail, path.parent / tail, *(path.parent / part for part in inner)):
        resolved = place.resolve()
        if not place.exists() or not resolved.is_relative_to(root.resolve()):
            continue
        if place.is_dir():
            return [root / p.resolve().relative_to(root.resolve()) for p in images_in(place)]
        listed = [line.strip() for line in read_text(place).splitlines() if line.strip()]
        found = []
        for line in listed:
            options = [place.parent / line, base / line, root / line]
            image = next((option for option in options if option.is_file()), None)
            if image is None:
                raise DataError(f'{place} lists {line}, which does not exist.')
            found.append(root / image.resolve().relative_to(root.resolve()))
        return found
    return []


def _folders(root: Path) -> dict[str, list[Path]]:
    """Images by the folder of their split, where no file says it."""
    splits: dict[str, list[Path]] = {}
    for image in images_in(root):
        parts = image.relative_to(root).parts[:-1]
        split = next((found for part in parts if (found := split_of(part))), 'train')
        splits.setdefault(split, []).append(image)
    return splits


def _label_of(image: Path) -> Path:
    """The label file of an image: in labels/ instead of images/, else beside it."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == 'images':
            parts[i] = 'labels'
            return Path(*parts).with_suffix('.txt')
    return image.with_suffix('.txt')


def _label_files(root: Path) -> Iterator[Path]:
    """Text files that hold objects; empty ones are those of images without any."""
    for path in sorted(root.rglob('*.txt')):
        if path.name in NAME_FILES or path.name.lower().startswith('readme'):
            continue
        with path.open('rb') as file:
            first = file.readline(1 << 14).split()
        if len(first) >= 5 and all(_is_number(word) for word in first):
            yield path


def _is_number(word: bytes | str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield line, number


def _object(
    path: Path, number: int, line: str, classes: int, width: int, height: int
) -> tuple[Object, str]:
    where = f'{path}, line {number}'
    try:
        first, *values = [float(word) for word in line.split()]
    except ValueError as error:
        raise DataError(f'{where}: {line.strip()[:60]!r} is not a line of numbers.') from error
    label = int(first)
    if label != first or not 0 <= label < classes:
        raise DataError(f'{where}: the class {first:g} must be from 0 to {classes - 1}.')
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f'{where}: {len(values)} numbers after the class must be 4 (center x, center y, width, '
            'height), or the x and y of three points or more.'
        )
    if not all(math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING for value in values):
        raise DataError(f'{where}: coordinates must be from 0 to 1, as parts of the image.')
    if len(values) == 4:
        x, y, w, h = values
        box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        return Object(label, box), 'boxes'
    scaled = [value * side for value, side in zip(values, [width, height] * len(values))]
    return Object(label, polygon_box([scaled]), [scaled]), 'polygons'

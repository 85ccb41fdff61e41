"""What is read from a folder, whatever the format of its labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ... import files
from ..images import IMAGE_SUFFIXES, decoded_size, describe

#: What the labels of an image are: boxes, boxes with outlines, a class per pixel, one class.
Kind = Literal['boxes', 'polygons', 'masks', 'classes']

#: How folders and files of a split are called.
SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev'),
    'test': ('test', 'testing'),
}
#: Files with one class name per line.
NAME_FILES = ('classes.txt', 'labels.txt', 'names.txt', 'obj.names', 'predefined_classes.txt')


class DataError(ValueError):
    """A folder cannot be used as it is; one sentence with the fix."""


@dataclass
class Object:
    """One object of an image, in pixels of the image as it is decoded.

    Args:
        label: Index of its class.
        box: Left, top, width, height.
        segmentation: Polygons `[[x0, y0, x1, y1, ...], ...]`, or COCO's run lengths, or None.
        crowd: A group of objects that evaluation ignores.
        area: In pixels, as the file states it; None where it does not.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: list[list[float]] | dict[str, Any] | None = None
    crowd: bool = False
    area: float | None = None


@dataclass
class Example:
    """One image and its labels.

    Args:
        file: Path of the image, relative to the folder.
        height: Pixels as decoded.
        width: As `height`.
        objects: Of a detector.
        mask: Path of the label map, relative to the folder, of a segmentor.
        label: Of a classifier.
    """

    file: str
    height: int = 0
    width: int = 0
    objects: list[Object] = field(default_factory=list)
    mask: str | None = None
    label: int | None = None


@dataclass
class LabeledFolder:
    """A folder of images with labels.

    Args:
        root: The folder.
        format: What its labels are called, such as 'COCO'.
        kind: What they are.
        classes: Names in the order of the labels.
        splits: Examples of 'train', 'val' and 'test', as far as there are.
        notes: What a user should know of how it was read; one sentence each.
        colors: Class index by color of label maps `(R, G, B)`.
        values: Class index by value of label maps; None where each is its own.
        zero_is_ignored: Label maps have 0 for pixels without a class, and classes from 1 on.
    """

    root: Path
    format: str
    kind: Kind
    classes: tuple[str, ...]
    splits: dict[str, list[Example]]
    notes: list[str] = field(default_factory=list)
    colors: dict[tuple[int, int, int], int] | None = None
    values: dict[int, int] | None = None
    zero_is_ignored: bool = False

    def examples(self) -> Iterator[Example]:
        """Every example of every split."""
        for split in self.splits.values():
            yield from split


def split_of(name: str) -> str | None:
    """The split that a folder's or file's name says, if it says one."""
    words = [word for word in re.split(r'[^a-z]+', name.lower()) if word]
    for split, names in SPLITS.items():
        if any(word in names for word in words):
            return split
    return None


def images_in(folder: Path, recursive: bool = True) -> list[Path]:
    """Image files in a folder, sorted; hidden ones and folders are left out."""
    found = folder.rglob('*') if recursive else folder.iterdir()
    return sorted(
        path
        for path in found
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith('.')
        and '__MACOSX' not in path.parts
        and path.is_file()
    )


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image as it is decoded.

    Raises:
        DataError: It is no image.
    """
    try:
        return decoded_size(describe(path))
    except ValueError as error:
        raise DataError(str(error)) from error


def read_names(path: Path) -> tuple[str, ...]:
    """Class names, one per line."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    return unique_names([line for line in lines if line and not line.startswith('#')], path)


def read_text(path: Path) -> str:
    """The text of a file, also in UTF-16, which PowerShell writes.

    Raises:
        DataError: It cannot be read as text.
    """
    try:
        return files.read_text(path)[0]
    except (OSError, ValueError) as error:
        raise DataError(f'{path} cannot be read as text ({error}).') from error


def unique_names(names: Sequence[Any], path: Path) -> tuple[str, ...]:
    """Class names as texts.

    Raises:
        DataError: Two are equal, or one is empty.
    """
    texts = tuple(str(name).strip() for name in names)
    twice = sorted({name for name in texts if texts.count(name) > 1})
    if twice or '' in texts:
        what = f'the class {twice[0]!r} twice' if twice else 'a class without a name'
        raise DataError(f'{path} has {what}; give each class a name of its own.')
    return texts


def natural(name: str) -> list[Any]:
    """A key to sort names with: 'class 2' before 'class 10'."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r'(\d+)', name)]


def named_classes(root: Path, found: Iterable[str]) -> tuple[str, ...]:
    """The class names of a format that has no list of its own: of a list beside, or all, sorted.

    Raises:
        DataError: A class occurs that the list beside does not have.
    """
    names = sorted(set(found), key=natural)
    for file in NAME_FILES:
        if (root / file).is_file():
            listed = read_names(root / file)
            if missing := [name for name in names if name not in listed]:
                raise DataError(
                    f'{root / file} does not list {", ".join(map(repr, missing[:5]))}, which '
                    'objects have; add it, or remove the file.'
                )
            return listed
    return tuple(names)


def polygon_box(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The box around polygons: left, top, width, height."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def polygon_area(polygon: Sequence[float]) -> float:
    """In square pixels, by the shoelace formula."""
    xs, ys = polygon[::2], polygon[1::2]
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in pairs)) / 2


def area_of(item: Object) -> float:
    """In square pixels: as stated, of the polygons, or of the box."""
    if item.area is not None:
        return item.area
    if isinstance(item.segmentation, list) and item.segmentation:
        return sum(map(polygon_area, item.segmentation))
    return item.box[2] * item.box[3]


def coco_record(
    examples: Sequence[Example], classes: Sequence[str], image_root: Path | None = None
) -> dict[str, Any]:
    """Examples as the content of a COCO file; categories count from 1 in the order of classes.

    Args:
        examples: Of one split.
        classes: Their names.
        image_root: Put before the names of the images; None leaves them relative.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, example in enumerate(examples, 1):
        name = example.file if image_root is None else str(image_root / example.file)
        size = {'height': example.height, 'width': example.width}
        images.append({'id': number, 'file_name': name, **size})
        for item in example.objects:
            record: dict[str, Any] = {
                'id': len(annotations) + 1,
                'image_id': number,
                'category_id': item.label + 1,
                'bbox': list(item.box),
                'area': area_of(item),
                'iscrowd': int(item.crowd),
            }
            if item.segmentation is not None:
                record['segmentation'] = item.segmentation
            annotations.append(record)
    categories = [{'id': i, 'name': name} for i, name in enumerate(classes, 1)]
    return {'images': images, 'annotations': annotations, 'categories': categories}


def require_same_classes(lists: Mapping[Path, Sequence[str]]) -> tuple[str, ...]:
    """The one list of classes that all files have.

    Raises:
        DataError: They differ.
    """
    (first, names), *others = lists.items()
    for path, other in others:
        if list(other) != list(names):
            extra = sorted(set(other) ^ set(names))
            how = f'only one has {", ".join(map(repr, extra[:5]))}' if extra else 'in another order'
            raise DataError(
                f'{path} and {first} have different classes ({how}); give every split the same.'
            )
    return tuple(names)

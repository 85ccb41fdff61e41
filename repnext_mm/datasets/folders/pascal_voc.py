"""Pascal VOC: an XML file of boxes per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .records import (
    DataError,
    Example,
    LabeledFolder,
    Object,
    images_in,
    named_classes,
    read_text,
    size_of,
    split_of,
)

NAME = 'Pascal VOC'
#: Sources whose boxes are the first and the last pixel inside, counted from 1.
INCLUSIVE = re.compile(r'VOC|roboflow', re.IGNORECASE)


def find(root: Path) -> list[Path]:
    """The annotation files below a folder."""
    return [path for path in sorted(root.rglob('*.xml')) if _looks_right(path)]


def _looks_right(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(4096)
    return b'<annotation' in head and (b'<filename' in head or b'<object' in head)


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples of every split.

    Boxes of the challenge are the first and the last pixel inside, counted from 1, and so are those
    of Roboflow's programs; both name themselves as the source. Those of others are edges, from 0.

    Raises:
        DataError: A file cannot be read, or no image was found.
    """
    images: dict[str, list[Path]] = {}
    for image in images_in(root):
        if not image.parent.name.startswith('Segmentation'):  # label maps of the challenge
            images.setdefault(image.stem, []).append(image)
    rows: list[tuple[Path, Path, list[tuple[str, list[float], bool]]]] = []
    lone: list[Path] = []
    inclusive = False
    for path in files:
        tree = _tree(path)
        found = _image_of(path, tree.findtext('filename') or '', images)
        if found is None:
            lone.append(path)
            continue
        shift = int(bool(INCLUSIVE.search(tree.findtext('source/database') or '')))
        inclusive |= bool(shift)
        boxes = [_box(path, item, shift) for item in tree.findall('object')]
        rows.append((path, found, boxes))
    if not rows:
        raise DataError(
            f'{root} has {len(files)} files of Pascal VOC, and no image of their names; put the '
            'images beside them, or in JPEGImages/.'
        )
    classes = named_classes(root, (name for _, _, boxes in rows for name, _, _ in boxes))
    listed = _lists(root)
    splits: dict[str, list[Example]] = {}
    seen = set()
    for path, image, boxes in rows:
        height, width = size_of(image)
        seen.add(image)
        objects = [
            Object(
                classes.index(name),
                (x0, y0, x1 - x0, y1 - y0),
                crowd=difficult,
            )
            for name, (x0, y0, x1, y1), difficult in boxes
        ]
        split = listed.get(path.stem) or _folder_split(root, path) or 'train'
        example = Example(image.relative_to(root).as_posix(), height, width, objects)
        splits.setdefault(split, []).append(example)
    notes = []
    if inclusive:
        notes.append('Boxes name their first and last pixel, counted from 1, as in the challenge.')
    if any(item.crowd for split in splits.values() for e in split for item in e.objects):
        notes.append('Objects marked as difficult are ignored in training and evaluation.')
    if lone:
        notes.append(
            f'{len(lone)} annotation files have no image and are left out, the first is '
            f'{lone[0].relative_to(root)}.'
        )
    others = [p for found in images.values() for p in found if p not in seen]
    if others:
        notes.append(
            f'{len(others)} images have no annotation file and are left out, the first is '
            f'{others[0].relative_to(root)}.'
        )
    return LabeledFolder(root, NAME, 'boxes', classes, splits, notes)


def _tree(path: Path) -> ElementTree.Element:
    text = read_text(path)
    if '<!ENTITY' in text:
        raise DataError(f'{path} defines entities, which are refused.')
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f'{path} cannot be read as XML ({error}).') from error


def _image_of(path: Path, name: str, images: dict[str, list[Path]]) -> Path | None:
    """The image with the file's own stem, as `filename` is often that of another machine."""
    for stem in dict.fromkeys((path.stem, Path(name.replace('\\', '/')).stem)):
        found = images.get(stem, [])
        beside = [image for image in found if image.parent == path.parent]
        related = [image for image in found if image.parent.parent == path.parent.parent]
        for choice in (beside, related, found):
            if len(choice) == 1:
                return choice[0]
    return None


def _box(path: Path, item: ElementTree.Element, shift: int) -> tuple[str, list[float], bool]:
    """Name, corners and whether it is difficult."""
    name = (item.findtext('name') or '').strip()
    texts = [item.findtext(f'bndbox/{key}') for key in ('xmin', 'ymin', 'xmax', 'ymax')]
    try:
        values = [float(text) for text in texts]  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f'{path}: the object {name!r} has no box of four numbers.') from error
    if not name:
        raise DataError(f'{path} has an object without a name.')
    values = [values[0] - shift, values[1] - shift, *values[2:]]
    return name, values, (item.findtext('difficult') or '0').strip() == '1'


def _lists(root: Path) -> dict[str, str]:
    """The split of each image by its stem, as the challenge's lists say it."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob('ImageSets/Main/*.txt')):
        # Not trainval.txt, and not the lists of single classes.
        if re.fullmatch(r'[a-z]+[\d_-]*', path.stem) and (split := split_of(path.stem)):
            for line in read_text(path).splitlines():
                if line.split():
                    found[line.split()[0]] = split
    return found


def _folder_split(root: Path, path: Path) -> str | None:
    parts = path.relative_to(root).parts[:-1]
    return next((found for part in parts if (found := split_of(part))), None)

"""COCO's JSON, plain or as Roboflow, CVAT and Label Studio export it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .records import (
    DataError,
    Example,
    LabeledFolder,
    Object,
    images_in,
    require_same_classes,
    split_of,
    unique_names,
)

NAME = 'COCO'
#: Bytes at the beginning of a file in which the three lists of COCO are looked for.
HEAD = 1 << 16
#: Of the annotation files of one split, the one for detectors.
PREFERRED = ('instances_', '_annotations.coco')


def find(root: Path) -> list[Path]:
    """The annotation files below a folder."""
    return [path for path in _candidates(root) if _looks_right(path)]


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples that annotation files list.

    Raises:
        DataError: Two files are of one split, their classes differ, or an image is missing.
    """
    chosen = _by_split(root, files)
    notes: list[str] = []
    contents = {split: _load(path) for split, path in chosen.items()}
    categories = {chosen[split]: content['categories'] for split, content in contents.items()}
    used = {
        annotation.get('category_id')
        for content in contents.values()
        for annotation in content['annotations']
    }
    names: dict[Path, list[str]] = {}
    ids: dict[Path, dict[Any, int]] = {}
    for path, found in categories.items():
        kept = [category for category in found if not _is_project(category, found, used)]
        if len(kept) < len(found):
            dropped = next(category['name'] for category in found if category not in kept)
            note = f'Category 0, {dropped!r}, is the name of the project and no class.'
            notes += [note] if note not in notes else []
        names[path] = list(unique_names([category['name'] for category in kept], path))
        ids[path] = {category['id']: names[path].index(category['name']) for category in kept}
    if len({tuple(sorted(listed)) for listed in names.values()}) == 1:
        # Another order is no other set of classes: labels are by name.
        classes = tuple(next(iter(names.values())))
        ids = {
            path: {key: classes.index(names[path][label]) for key, label in labels.items()}
            for path, labels in ids.items()
        }
    else:
        classes = require_same_classes(names)
    splits = {}
    for split, content in contents.items():
        path = chosen[split]
        splits[split] = _examples(root, path, content, ids[path], notes)
    objects = [item for split in splits.values() for e in split for item in e.objects]
    with_masks = sum(item.segmentation is not None for item in objects)
    kind = 'polygons' if objects and with_masks == len(objects) else 'boxes'
    if kind == 'boxes' and with_masks:
        notes.append(
            f'{len(objects) - with_masks} of {len(objects)} objects have no mask, so boxes alone '
            'are used.'
        )
    origin = _origin(root, files)
    return LabeledFolder(root, origin, kind, classes, splits, notes)  # type: ignore[arg-type]


def _candidates(root: Path) -> list[Path]:
    patterns = ('*.json', '*/*.json', '*/*/*.json')
    return sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file())


def _looks_right(path: Path) -> bool:
    with path.open('rb') as file:
        head = file.read(HEAD)
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - HEAD))
        tail = file.read()
    text = head + tail
    if b'"shapes"' in head:  # LabelMe
        return False
    if size <= 2 * HEAD:
        return all(f'"{key}"'.encode() in text for key in ('images', 'annotations', 'categories'))
    # One of the lists may be in the middle of a large file.
    found = sum(
        f'"{key}"'.encode() in text for key in ('images', 'annotations', 'categories', 'file_name')
    )
    return found >= 2 and text.lstrip()[:1] == b'{'


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{path} cannot be read as JSON ({error}).') from error
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f'{path} has no list {key!r}, which a COCO file requires.')
    for category in content['categories']:
        if not isinstance(category, dict) or not {'id', 'name'} <= set(category):
            raise DataError(f'{path} has a category without id or name: {str(category)[:80]}.')
    return content


def _by_split(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        named[_split(root, path) or 'train'].append(path)
    chosen = {}
    for split, paths in named.items():
        best = [p for p in paths if any(p.name.startswith(start) for start in PREFERRED)] or paths
        if len(best) > 1:
            listed = ' and '.join(str(path) for path in best[:2])
            raise DataError(
                f'{listed} are both of the split {split}; keep one, or give the folder of one.'
            )
        chosen[split] = best[0]
    return chosen


def _split(root: Path, path: Path) -> str | None:
    """What the name of a file says, or that of its folder."""
    return split_of(path.stem) or (split_of(path.parent.name) if path.parent != root else None)


def _is_project(category: dict[str, Any], others: list[dict[str, Any]], used: set[Any]) -> bool:
    """Roboflow's category 0: the project, above all others, and of no object."""
    return (
        category['id'] == 0
        and 0 not in used
        and category.get('supercategory') in ('none', None, '')
        and len(others) > 1
        and all(o.get('supercategory') == category['name'] for o in others if o is not category)
    )


def _examples(
    root: Path, path: Path, content: dict[str, Any], labels: dict[Any, int], notes: list[str]
) -> list[Example]:
    images: dict[Any, Example] = {}
    finder = _Finder(root, path)
    missing = []
    for image in content['images']:
        try:
            name, key = str(image['file_name']), image['id']
            height, width = int(image['height']), int(image['width'])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f'{path}: an image has no {error}; each requires id, file_name, height, width.'
            ) from error
        found = finder.find(name)
        if found is None:
            missing.append(name)
            continue
        if key in images:
            raise DataError(f'{path} has two images with the id {key}; give each its own.')
        images[key] = Example(found, height, width)
    if missing:
        if not images:
            raise DataError(
                f'{path} lists {len(missing)} images, and none was found (the first is '
                f'{missing[0]}); put them in {path.parent}, or beside it in images/.'
            )
        notes.append(
            f'{len(missing)} images that {path.name} lists do not exist and are left out, the '
            f'first is {missing[0]}.'
        )
    gone = 0
    listed = {image['id'] for image in content['images']}
    for annotation in content['annotations']:
        example = images.get(annotation.get('image_id'))
        if example is None:
            gone += annotation.get('image_id') not in listed
            continue
        example.objects.append(_object(path, annotation, labels))
    if gone:
        notes.append(f'{gone} objects in {path.name} are of no image that it lists: left out.')
    return list(images.values())


def _object(path: Path, annotation: dict[str, Any], labels: dict[Any, int]) -> Object:
    where = f'{path}: the annotation {annotation.get("id")}'
    category = annotation.get('category_id')
    if category not in labels:
        raise DataError(f'{where} has the category {category}, which the file does not define.')
    box = annotation.get('bbox')
    segmentation = annotation.get('segmentation')
    if isinstance(segmentation, list):
        segmentation = [list(map(float, part)) for part in segmentation if len(part) >= 6] or None
    elif not isinstance(segmentation, dict):
        segmentation = None
    if not (isinstance(box, list) and len(box) == 4):
        raise DataError(f'{where} has no box of four numbers: left, top, width, height.')
    return Object(
        labels[category],
        tuple(float(value) for value in box),  # type: ignore[arg-type]
        segmentation,
        bool(annotation.get('iscrowd')),
        float(annotation['area']) if annotation.get('area') is not None else None,
    )


def _origin(root: Path, files: Sequence[Path]) -> str:
    names = {path.name for path in files}
    if '_annotations.coco.json' in names:
        return 'COCO (Roboflow)'
    if 'instances_default.json' in names:
        return 'COCO (CVAT)'
    if names == {'result.json'}:
        return 'COCO (Label Studio)'
    return NAME


class _Finder:
    """Where an image is that a COCO file names, which is relative to one of several folders."""

    def __init__(self, root: Path, file: Path) -> None:
        self.root = root
        named = split_of(file.stem)
        words = [file.stem.removeprefix('instances_') if named else '', _split(root, file) or '']
        bases = [file.parent, root, file.parent.parent]
        places = [base for base in bases if base.is_relative_to(root)]
        inner = [base / 'images' for base in places]
        self.places = [
            folder / word
            for folder in (*places, *inner)
            for word in dict.fromkeys(['', *(word for word in words if word)])
        ]
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str) -> str | None:
        """The path relative to the root, or None."""
        clean = name.replace('\\', '/')
        relative = PurePosixPath(clean)
        if not relative.is_absolute() and '..' not in relative.parts:
            for place in self.places:
                if (place / relative).is_file():
                    self.places.remove(place)  # most images are beside each other
                    self.places.insert(0, place)
                    return (place / relative).relative_to(self.root).as_posix()
        # Paths of another machine, and folders of other names: a file name that is there once.
        if self._index is None:
            self._index = defaultdict(list)
            for path in images_in(self.root):
                self._index[path.name].append(path)
        found = self._index.get(relative.name, [])
        return found[0].relative_to(self.root).as_posix() if len(found) == 1 else None

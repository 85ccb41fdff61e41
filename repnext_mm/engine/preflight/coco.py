"""COCO annotation files: reading them, completing what can be completed, naming the rest.

mmdetection drops an object that breaks one of its rules without a word. What is lost, and to which
rule, is only in the file itself.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...datasets.images import decoded_size, describe
from ...files import read_text
from ..errors import UserError
from .findings import Finding, error, some, warning
from .texts import clean

#: Objects of a set whose polygons are compared with their boxes.
COMPARED = 20_000
#: Of so many objects, one usually reaches into the last part of an image.
ENOUGH_OBJECTS = 50
#: More than this share of objects lost, or beyond the image, cannot be meant.
MOST_LOST = 0.5
MOST_BEYOND = 0.2
#: A box may reach this far beyond its image by rounding, in pixels.
ROUNDING = 2.0

LISTS = ('images', 'annotations', 'categories')


@dataclass
class CocoFile:
    """A COCO annotation file as mmdetection will see it.

    `completed` says what was missing and has been filled in; `content` differs from the file then.
    """

    path: Path
    content: dict[str, Any]
    completed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the categories, in the order of the file, which labels follow."""
        return [category['name'] for category in self.content['categories']]

    def text(self) -> str:
        """The content as JSON."""
        return json.dumps(self.content)


def read_coco(path: Path, images_dir: Path, *, without_annotations: bool = False) -> CocoFile:
    """Read `path` and complete it: numbers that are text, ids, areas, boxes and sizes.

    Args:
        path: The annotation file.
        images_dir: Folder of its images, whose sizes replace missing ones.
        without_annotations: Accept an image list, as published for test splits.

    Raises:
        UserError: It is not a COCO annotation file, or misses what nobody can complete.
    """
    content, said = _load(path, without_annotations)
    file = CocoFile(path, content, [said] if said else [])
    _complete_categories(file)
    _complete_images(file, images_dir)
    _complete_annotations(file)
    return file


def _load(path: Path, without_annotations: bool) -> tuple[dict[str, Any], str | None]:
    """The content, and what had to be understood to read it."""
    try:
        text, said = read_text(path)
        content = json.loads(text)
    except (ValueError, RecursionError) as reason:  # also a JSONDecodeError, and huge integers
        raise UserError(
            f'{path} is not valid JSON ({reason}); it may be cut short: get or export it again.'
        ) from reason
    except OSError as reason:
        raise UserError(f'the annotation file {path} cannot be read ({reason}).') from reason
    needed = [key for key in LISTS if not (without_annotations and key == 'annotations')]
    lacking = [
        key
        for key in needed
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if lacking:
        raise UserError(
            f'{path} is not a COCO annotation file: it lacks {", ".join(lacking)}; expected a JSON '
            f'object with {", ".join(LISTS)}.'
        )
    content = {'annotations': [], **content}
    for key in LISTS:
        for number, item in enumerate(content[key]):
            if not isinstance(item, dict):
                raise _bad(path, f'{key}[{number}] is {_shown(item)}', 'an object with fields')
    return content, said


def _bad(path: Path, what: str, expected: str, fix: str = 'correct the file') -> UserError:
    return UserError(f'{path}: {what}, expected {expected}; {fix}.')


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def as_number(value: object) -> float | int | None:
    """A finite number from JSON, also where it is written as text, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value) if not value.strip().lstrip('-').isdecimal() else int(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return value if abs(value) < 2**53 else None
    if isinstance(value, float) and math.isfinite(value):
        return value
    return None


def as_integer(value: object) -> int | None:
    """A whole number from JSON, also where it is written as text or as 3.0, or None."""
    number = as_number(value)
    return int(number) if number is not None and number == int(number) else None


def _complete_integers(
    file: CocoFile, key: str, name: str, allow_missing: bool = False
) -> list[int | None]:
    """Turn the integers `name` of the entries of a list into such; the fixes are noted."""
    values: list[int | None] = []
    changed = 0
    for number, item in enumerate(file.content[key]):
        value = item.get(name)
        if type(value) is int and -(2**53) < value < 2**53:
            values.append(value)
            continue
        whole = as_integer(value)
        if whole is None and not (allow_missing and value is None):
            raise _bad(
                file.path,
                f'{key}[{number}] has {name}={_shown(value)}'
                if name in item
                else f'{key}[{number}] has no {name}',
                'a whole number',
            )
        if whole is not None:
            item[name] = whole
            changed += 1
        values.append(whole)
    if changed:
        file.completed.append(f'{changed} times {name} of {key} was not written as a whole number')
    return values


def _require_unique(file: CocoFile, key: str, values: Sequence[Any], name: str) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise _bad(
            file.path,
            f'{len(twice)} values of {name} are used twice in {key}, the first is {twice[0]!r}',
            'each once',
        )


def _complete_categories(file: CocoFile) -> None:
    _require_unique(file, 'categories', _complete_integers(file, 'categories', 'id'), 'id')
    for number, category in enumerate(file.content['categories']):
        name = category.get('name')
        if not isinstance(name, str):
            raise _bad(
                file.path, f'categories[{number}] has name={_shown(name)}', 'the name as text'
            )
        if clean(name) != name:
            file.completed.append(
                f'the category {name!r} had invisible characters or spaces around its name'
            )
            category['name'] = clean(name)
    _require_unique(file, 'categories', file.names, 'name')


def _complete_images(file: CocoFile, images_dir: Path) -> None:
    images = file.content['images']
    _require_unique(file, 'images', _complete_integers(file, 'images', 'id'), 'id')
    for number, image in enumerate(images):
        if not isinstance(image.get('file_name'), str) or not image['file_name']:
            raise _bad(
                file.path,
                f'images[{number}] has file_name={_shown(image.get("file_name"))}',
                'the path of its file',
            )
    unknown = [i for i in images if i.get('width') is None or i.get('height') is None]
    for image in unknown:
        try:
            header = describe(images_dir / image['file_name'])
        except (OSError, ValueError) as reason:
            raise UserError(
                f'{file.path} gives no width and height of {image["file_name"]}, and the image '
                f'cannot be read ({reason}); add them to the file.'
            ) from reason
        image['width'], image['height'] = decoded_size(header)
    if unknown:
        file.completed.append(f'{len(unknown)} images had no width or height')
    for name in ('width', 'height'):
        sizes = _complete_integers(file, 'images', name)
        for image, size in zip(images, sizes, strict=True):
            if size is None or size < 1:
                raise _bad(
                    file.path,
                    f'image {image["id"]} ({image["file_name"]}) has {name}={size}',
                    'pixels from 1 on',
                )
    files = Counter(image['file_name'] for image in images)
    if repeated := [name for name, count in files.items() if count > 1]:
        file.findings.append(
            warning(
                f'{file.path} lists {len(repeated)} files under several image ids, the first is '
                f'{repeated[0]}: each counts as an image with its own objects; merge the entries '
                'unless that is meant.'
            )
        )


def _complete_annotations(file: CocoFile) -> None:
    annotations = file.content['annotations']
    ids = [annotation.get('id') for annotation in annotations]
    usable = all(type(i) is int and i != 0 for i in ids) and len(set(map(str, ids))) == len(ids)
    if not usable:
        # Nothing refers to them, and cocoapi counts a match with object 0 as none.
        for place, annotation in enumerate(annotations, 1):
            annotation['id'] = place
        file.completed.append(
            'the annotation ids were not all there, whole, unlike and unlike 0; they are numbered '
            'from 1'
        )
    _complete_integers(file, 'annotations', 'image_id')
    _complete_integers(file, 'annotations', 'category_id')

    counts: Counter[str] = Counter()
    for annotation in annotations:
        box = annotation.get('bbox')
        if not (type(box) is list and len(box) == 4 and all(type(v) in (int, float) for v in box)
                and all(map(math.isfinite, box))):  # fmt: skip
            annotation['bbox'] = _complete_box(file, annotation, counts)
        if type(annotation.get('iscrowd')) is not int:
            counts[f'iscrowd={_shown(annotation.get("iscrowd"))}'] += 1
            annotation['iscrowd'] = int(bool(as_number(annotation.get('iscrowd')) or 0))
        area = annotation.get('area')
        if type(area) not in (int, float) or not math.isfinite(area):
            number = as_number(area)
            counts['no area' if area is None else 'an area that is not a number'] += 1
            annotation['area'] = _area(annotation) if number is None else number
        segmentation = annotation.get('segmentation')
        if type(segmentation) is list and segmentation:
            kept = [p for p in segmentation if type(p) is not list or _is_polygon(p)]
            if len(kept) < len(segmentation) and kept:
                counts['polygons of fewer than three points beside others'] += 1
                annotation['segmentation'] = kept
    file.completed += [f'{count} objects had {what}' for what, count in counts.items()]


def _complete_box(file: CocoFile, annotation: dict[str, Any], counts: Counter[str]) -> list[float]:
    box = annotation.get('bbox')
    if isinstance(box, list | tuple) and len(box) == 4:
        numbers = [as_number(value) for value in box]
        if all(number is not None for number in numbers):
            counts['a box in text'] += 1
            return numbers  # type: ignore[return-value]
    elif (bounds := mask_bounds(annotation.get('segmentation'))) is not None:
        counts['no box but a mask'] += 1
        x1, y1, x2, y2 = bounds
        return [x1, y1, x2 - x1, y2 - y1]
    raise _bad(
        file.path,
        f'annotation {annotation["id"]} has bbox={_shown(box)}',
        'four finite numbers x, y, width, height in pixels',
        'correct or remove it',
    )


def _is_polygon(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    )


def mask_bounds(
    segmentation: object, size: tuple[int, int] | None = None
) -> tuple[float, float, float, float] | None:
    """The corners x1, y1, x2, y2 around the mask of an object, or None where there is none.

    Args:
        segmentation: Polygons, or run lengths.
        size: Height and width that run lengths must have.
    """
    if isinstance(segmentation, dict):
        return _run_length_bounds(segmentation, size)
    if not isinstance(segmentation, list):
        return None
    polygons = [p for p in segmentation if _is_polygon(p)]
    if not polygons:
        return None
    xs = [v for p in polygons for v in p[::2]]
    ys = [v for p in polygons for v in p[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def _run_length_bounds(
    rle: Mapping[str, Any], size: tuple[int, int] | None
) -> tuple[float, float, float, float] | None:
    from pycocotools import mask

    if size is None or _run_length_fault(rle, list(size)):
        return None
    if isinstance(rle['counts'], list):
        rle = mask.frPyObjects(rle, *size)
    x, y, w, h = mask.toBbox(rle).tolist()
    return (x, y, x + w, y + h) if w and h else None


def _area(annotation: Mapping[str, Any]) -> float:
    """The area of the polygons, as cocoapi's examples compute it, or else of the box."""
    segmentation = annotation.get('segmentation')
    if isinstance(segmentation, list) and (polygons := [p for p in segmentation if _is_polygon(p)]):
        total = 0.0
        for polygon in polygons:
            x, y = np.asarray(polygon[::2], float), np.asarray(polygon[1::2], float)
            total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
        return total
    return float(annotation['bbox'][2] * annotation['bbox'][3])


# --- what of it mmdetection keeps


@dataclass
class Kept:
    """Objects by what mmdetection does with them; `classes` gives those per class it keeps."""

    objects: int
    rules: dict[str, int]
    listed: dict[str, int]
    classes: dict[str, int]


RULES = {
    'no image': 'whose image is not in the file',
    'ignore': 'marked ignore=1',
    'outside': 'outside of their image',
    'empty': 'with area 0 or narrower than a pixel',
    'unknown': 'of a category that the file does not list',
    'other': 'of categories that are not among the classes',
}
#: A data set that leaves these out says so; the other rules take objects away.
MEANT = ('ignore', 'other')


def count_kept(file: CocoFile, classes: Sequence[str]) -> Kept:
    """Apply mmdetection's rules (`CocoDataset.parse_data_info`) to the objects of `file`.

    Findings about what is lost, with an example each, are added to the file's.
    """
    annotations = file.content['annotations']
    sizes = {i['id']: (i['width'], i['height']) for i in file.content['images']}
    names = {c['id']: c['name'] for c in file.content['categories']}
    wanted = {id for id, name in names.items() if name in set(classes)}
    boxes = np.asarray([a['bbox'] for a in annotations], float).reshape(-1, 4)
    sized = np.asarray([sizes.get(a['image_id'], (0, 0)) for a in annotations], float).reshape(
        -1, 2
    )
    ids = np.asarray([a['category_id'] for a in annotations], np.int64)
    x, y, w, h = boxes.T
    width, height = sized.T
    inside = np.maximum(0, np.minimum(x + w, width) - np.maximum(x, 0)) * np.maximum(
        0, np.minimum(y + h, height) - np.maximum(y, 0)
    )
    area = np.asarray([a['area'] for a in annotations], float)
    tests: dict[str, np.ndarray] = {
        'no image': width == 0,
        'ignore': np.asarray([bool(a.get('ignore')) for a in annotations], bool),
        'unknown': ~np.isin(ids, list(names)),
        'other': ~np.isin(ids, list(wanted)),
        'empty': (area <= 0) | (w < 1) | (h < 1),
        'outside': inside == 0,
    }
    rest = np.ones(len(annotations), bool)
    lost: dict[str, np.ndarray] = {}
    for rule, broken in tests.items():
        lost[rule] = rest & broken
        rest &= ~broken
    _report_lost(file, lost, boxes, ids, names)
    _report_beyond(file, boxes, sized, rest, annotations)
    _report_masks_beside_boxes(file, annotations, rest)

    listed = Counter(names[i] for i in ids.tolist() if i in names)
    kept = Counter(names[i] for i in ids[rest].tolist())
    return Kept(
        len(annotations),
        {rule: int(mask.sum()) for rule, mask in lost.items()},
        {name: listed[name] for name in classes},
        {name: kept[name] for name in classes},
    )


def _report_lost(
    file: CocoFile,
    lost: Mapping[str, np.ndarray],
    boxes: np.ndarray,
    ids: np.ndarray,
    names: Mapping[int, str],
) -> None:
    total = len(boxes) - sum(int(lost[rule].sum()) for rule in MEANT)
    taken = {r: int(m.sum()) for r, m in lost.items() if r not in MEANT and m.any()}
    if not taken:
        return
    rule = max(taken, key=lambda r: taken[r])
    first = int(np.argmax(lost[rule]))
    annotation = file.content['annotations'][first]
    parts = some(f'{count} {RULES[r]}' for r, count in taken.items())
    example = (
        f'annotation {annotation["id"]} of image {annotation["image_id"]} has '
        f'bbox={annotation["bbox"]}, area={annotation["area"]}, '
        f'category_id={annotation["category_id"]}'
    )
    hint = ''
    if 'unknown' in taken:
        hint = f'; the categories have the ids {some(sorted(names), 8)}'
        if _shifted(ids, names):
            hint += ', so the labels are probably shifted by one'
    elif len(boxes) and boxes[lost[rule]].size and float(np.abs(boxes[lost[rule]]).max()) <= 1:
        hint = '; the numbers look like shares of the image, and pixels are expected'
    sentence = (
        f'{file.path}: mmdetection drops {sum(taken.values())} of {total} objects: {parts}; '
        f'{example}{hint}; expected x, y, width, height in pixels, an area, and known ids: '
        'correct the file.'
    )
    beyond_doubt = sum(taken.values()) > MOST_LOST * total or _shifted(ids, names)
    file.findings.append(error(sentence) if beyond_doubt else warning(sentence))


def _shifted(ids: np.ndarray, names: Mapping[int, str]) -> bool:
    """Whether the category ids of the objects begin and end one beside those of the file."""
    if not len(ids) or not names:
        return False
    unknown = set(ids.tolist()) - set(names)
    return unknown in ({max(names) + 1}, {min(names) - 1})


def _report_beyond(
    file: CocoFile,
    boxes: np.ndarray,
    sized: np.ndarray,
    kept: np.ndarray,
    annotations: Sequence[Mapping[str, Any]],
) -> None:
    x, y, w, h = boxes.T
    far = (
        np.max([-x, -y, x + w - sized[:, 0], y + h - sized[:, 1]], axis=0)
        if len(boxes)
        else np.zeros(0)
    )
    beyond = kept & (far > ROUNDING)
    total = int(kept.sum())
    if beyond.any():
        first = annotations[int(np.argmax(beyond))]
        corners = kept & (w > x) & (h > y) & (w <= sized[:, 0] + 1) & (h <= sized[:, 1] + 1)
        count = int(beyond.sum())
        many = count > MOST_BEYOND * total
        hint = (
            'they look like corners x1, y1, x2, y2'
            if many and corners.sum() > 0.98 * total
            else 'width and height of the image or the boxes may be wrong'
        )
        sentence = (
            f'{file.path}: {count} of {total} boxes reach beyond their image, the first is '
            f'annotation {first["id"]} of image {first["image_id"]} with bbox={first["bbox"]}; '
            f'expected x, y, width, height in pixels: {hint}; correct the file.'
        )
        file.findings.append(error(sentence) if many else warning(sentence))
    elif total >= ENOUGH_OBJECTS:
        reach = [
            float(((x + w) / np.maximum(sized[:, 0], 1))[kept].max()),
            float(((y + h) / np.maximum(sized[:, 1], 1))[kept].max()),
        ]
        if min(reach) < 0.7:
            file.findings.append(
                warning(
                    f'{file.path}: none of the {total} boxes reaches beyond {max(reach):.0%} of '
                    f'the width and height of its image ({reach[0]:.0%}, {reach[1]:.0%}); the '
                    'boxes may belong to images of another size.'
                )
            )


def _report_masks_beside_boxes(
    file: CocoFile, annotations: Sequence[Mapping[str, Any]], kept: np.ndarray
) -> None:
    """Boxes and polygons that do not lie over each other: one of the two is wrong."""
    sizes = {i['id']: (i['height'], i['width']) for i in file.content['images']}
    places = np.flatnonzero(kept)
    places = places[:: max(1, len(places) // COMPARED)]
    compared = 0
    apart: list[tuple[Mapping[str, Any], Sequence[float]]] = []
    for place in places.tolist():
        annotation = annotations[place]
        if annotation['iscrowd']:
            continue
        bounds = mask_bounds(annotation.get('segmentation'), sizes[annotation['image_id']])
        if bounds is None:
            continue
        compared += 1
        x, y, w, h = annotation['bbox']
        if _overlap(bounds, (x, y, x + w, y + h)) < 0.5:
            apart.append((annotation, bounds))
    if not apart:
        return
    first, (x1, y1, x2, y2) = apart[0]
    shown = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
    sentence = (
        f'{file.path}: {len(apart)} of {compared} boxes do not lie over their masks, the first is '
        f'annotation {first["id"]} of image {first["image_id"]}: bbox={first["bbox"]}, expected '
        f'about {shown} (x, y, width, height in pixels) from its mask; correct the file.'
    )
    file.findings.append(
        error(sentence) if len(apart) > MOST_LOST * compared else warning(sentence)
    )


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 1.0


# --- masks


def check_masks(file: CocoFile, classes: Iterable[str]) -> None:
    """Every object of `classes` has a mask that mmdetection and cocoapi can read."""
    names = {c['id']: c['name'] for c in file.content['categories']}
    wanted = {id for id, name in names.items() if name in set(classes)}
    sizes = {i['id']: [i['height'], i['width']] for i in file.content['images']}
    without = [
        (annotation, reason)
        for annotation in file.content['annotations']
        if annotation['category_id'] in wanted and not annotation.get('ignore')
        and annotation['image_id'] in sizes
        and (reason := _mask_fault(annotation, sizes[annotation['image_id']]))
    ]  # fmt: skip
    if without:
        annotation, reason = without[0]
        file.findings.append(
            error(
                f'{file.path}: {len(without)} objects have no usable mask, the first is annotation '
                f'{annotation["id"]} of image {annotation["image_id"]}, whose segmentation '
                f'{reason}; add the masks, or use a detector without mask head, '
                'with_mask=False in the pipelines and metric="bbox" in the evaluators.'
            )
        )


def _mask_fault(annotation: Mapping[str, Any], size: list[int]) -> str | None:
    segmentation = annotation.get('segmentation')
    if not segmentation:
        return 'is absent' if 'segmentation' not in annotation else f'is {segmentation!r}'
    if isinstance(segmentation, list):
        if all(_is_polygon(p) for p in segmentation):
            return None
        return f'is {_shown(segmentation)}, expected polygons [[x1, y1, x2, y2, x3, y3, ...]]'
    if isinstance(segmentation, dict):
        return _run_length_fault(segmentation, size)
    return f'is {_shown(segmentation)}, expected polygons or run lengths'


def _run_length_fault(rle: Mapping[str, Any], size: list[int]) -> str | None:
    counts = rle.get('counts')
    if rle.get('size') != size:
        return f'has the size {_shown(rle.get("size"))}, and its image has {size} (height, width)'
    if isinstance(counts, list):
        good = all(type(c) is int and c >= 0 for c in counts) and sum(counts) == size[0] * size[1]
        return None if good else f'has counts that do not add up to {size[0]} x {size[1]} pixels'
    return None if isinstance(counts, str) else f'is {_shown(rle)}, expected size and counts'


# --- classes


def check_order(file: CocoFile, classes: Sequence[str], setting: str) -> None:
    """The names of `classes` are in the file, and in the order in which labels follow it."""
    names = file.names
    absent = [name for name in classes if name not in names]
    if absent:
        file.findings.append(
            error(
                f'{file.path} has the {len(names)} categories {some(names)}, but {setting} lists '
                f'{len(classes)} classes, of which {len(absent)} are not among them '
                f'({some(map(repr, absent))}); set metainfo=dict(classes=(...)) of the data set to '
                'names from the file, and num_classes of the heads to their number.'
            )
        )
        return
    in_file = [name for name in names if name in set(classes)]
    if in_file != list(classes):
        place = next(i for i, (a, b) in enumerate(zip(in_file, classes, strict=True)) if a != b)
        file.findings.append(
            error(
                f'{file.path} lists its categories in another order than {setting}: mmdetection '
                f'gives label {place} to {in_file[place]!r} and calls it {classes[place]!r}; '
                'use one order in all files, and set metainfo=dict(classes='
                f'{tuple(in_file)!r}) of every data set.'
            )
        )

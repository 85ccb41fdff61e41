"""Label maps: a picture per image whose values, or colors, are classes."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...files import replacing
from .records import (
    NAME_FILES,
    DataError,
    Example,
    LabeledFolder,
    images_in,
    read_names,
    read_text,
    size_of,
    split_of,
    unique_names,
)

NAME = 'label maps'
#: How folders of label maps are called, also after the name of a split.
FOLDERS = (
    *('masks', 'mask', 'labels', 'label', 'annotations', 'annotation', 'annot', 'gt', 'seg'),
    *('segmentationclass', 'segmentation', 'label_maps', 'seg_maps', 'masks_png'),
)
#: How label maps beside their images are called, after the image's name.
ENDINGS = ('_mask', '-mask', '_masks', '_label', '_labels', '_seg', '_gt', '_L')
SUFFIXES = ('.png', '.bmp', '.tif', '.tiff', '.gif')
IGNORED = 255

Color = tuple[int, int, int]


@dataclass
class Table:
    """What a file beside the label maps says of their classes."""

    path: Path
    names: tuple[str, ...]
    colors: dict[Color, int] | None = None
    values: dict[int, int] | None = None


def find(root: Path) -> list[Path]:
    """The label maps below a folder."""
    return [mask for _, mask in _pairs(root)]


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples of every split, and what the values of their label maps mean.

    Raises:
        DataError: Label maps are in color and no table names the colors, or of other sizes than
            their images, or have values without a class.
    """
    del files
    splits: dict[str, list[Example]] = defaultdict(list)
    pairs = _pairs(root)
    for image, mask in pairs:
        height, width = size_of(image)
        if (size := size_of(mask)) != (height, width):
            raise DataError(
                f'{mask} has {size[1]} x {size[0]} pixels and its image {image.name} has {width} x '
                f'{height}; make them equal.'
            )
        parts = image.relative_to(root).parts[:-1]
        split = next((found for part in parts if (found := split_of(part))), 'train')
        relative = [path.relative_to(root).as_posix() for path in (image, mask)]
        splits[split].append(Example(relative[0], height, width, mask=relative[1]))
    notes = []
    used = {path for pair in pairs for path in pair}
    lone = [path for path in images_in(root) if path not in used]
    if lone:
        notes.append(
            f'{len(lone)} pictures are left out, as an image has no label map of its name or a '
            f'label map no image; the first is {lone[0].relative_to(root)}.'
        )
    table = _table(root)
    masks = [mask for _, mask in pairs]
    with Image.open(masks[0]) as first:
        colored = first.mode not in ('1', 'L', 'P', 'I', 'I;16', 'F')
    folder = LabeledFolder(root, NAME, 'masks', (), dict(splits), notes)
    if colored:
        _set_colors(folder, table, masks)
    else:
        _set_values(folder, table, masks)
    return folder


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    """Images and their label maps, by split and name."""
    images: dict[tuple[str | None, str], list[Path]] = defaultdict(list)
    masks: dict[tuple[str | None, str], list[Path]] = defaultdict(list)
    # Instances, in the layout of Pascal VOC, are no classes.
    pictures = [p for p in images_in(root) if p.parent.name != 'SegmentationObject']
    stems = {(path.parent, path.stem) for path in pictures}
    for path in pictures:
        parts = path.relative_to(root).parts[:-1]
        split = next((found for part in parts if (found := split_of(part))), None)
        ending = next((e for e in ENDINGS if path.stem.endswith(e)), '')
        stem = path.stem.removesuffix(ending)
        inside = any(_is_mask_folder(part) for part in parts)
        beside = bool(ending) and (path.parent, stem) in stems
        if path.suffix.lower() in SUFFIXES and (inside or beside):
            masks[split, stem if ending else path.stem].append(path)
            if inside and ending:  # an image may itself end so
                masks[split, path.stem].append(path)
        elif not inside:
            images[split, path.stem].append(path)
    pairs: list[tuple[Path, Path]] = []
    for key, paths in images.items():
        candidates = masks.get(key, [])
        if len(paths) > 1 and candidates:  # equal names in several folders
            candidates = []
            for image in paths:
                near = [m for m in masks[key] if _inner(root, m) == _inner(root, image)]
                pairs += [(image, near[0])] if len(near) == 1 else []
        elif len(candidates) == 1:
            pairs.append((paths[0], candidates[0]))
        elif candidates:
            raise DataError(
                f'{candidates[0]} and {candidates[1]} are both label maps of {paths[0].name}; keep '
                'one.'
            )
    return sorted(pairs)


def _is_mask_folder(name: str) -> bool:
    lower = name.lower()
    if lower in FOLDERS:
        return True
    # CamVid's train_labels and trainannot
    match = re.fullmatch(r'(train|val|valid|validation|test)[_-]?(\w+)', lower)
    return bool(match and match[2] in FOLDERS)


def _inner(root: Path, path: Path) -> tuple[str, ...]:
    """The folders on the way to a file, but those that say split, images or label maps."""
    parts = path.relative_to(root).parts[:-1]
    return tuple(
        p for p in parts if not (_is_mask_folder(p) or split_of(p) or p.lower() == 'images')
    )


# --- what values and colors mean


def _table(root: Path) -> Table | None:
    """The first file of a known kind that names the classes."""
    for name, parse in TABLES.items():
        for path in (root / name, *sorted(root.glob(f'*/{name}'))):
            if path.is_file():
                return parse(path)
    return None


def _pixel_values(path: Path) -> Table:
    """Roboflow's `Pixel Value, Class`."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines())]
    return _checked(
        path, [(row[1], int(row[0])) for row in rows[1:] if len(row) >= 2], 'Pixel Value, Class'
    )


def _name_and_color(path: Path) -> Table:
    """CamVid's `name,r,g,b` with a header."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines())]
    rows = [row for row in rows if len(row) >= 4 and row[1].isdigit()]
    return _checked(path, [(r[0], (int(r[1]), int(r[2]), int(r[3]))) for r in rows], 'name,r,g,b')


def _label_map(path: Path) -> Table:
    """CVAT's `name:r,g,b:parts:actions`."""
    rows = []
    for line in read_text(path).splitlines():
        if line.strip() and not line.startswith('#'):
            name, _, rest = line.partition(':')
            numbers = re.findall(r'\d+', rest.partition(':')[0])
            if len(numbers) == 3:
                rows.append((name.strip(), (int(numbers[0]), int(numbers[1]), int(numbers[2]))))
    return _checked(path, rows, 'name:r,g,b::')


def _color_and_name(path: Path) -> Table:
    """CamVid's older `r g b name`."""
    rows = [line.split() for line in read_text(path).splitlines()]
    rows = [row for row in rows if len(row) >= 4 and all(word.isdigit() for word in row[:3])]
    return _checked(
        path,
        [(' '.join(r[3:]), (int(r[0]), int(r[1]), int(r[2]))) for r in rows],
        'r g b name',
    )


def _plain(path: Path) -> Table:
    return Table(path, read_names(path))


def _checked(path: Path, rows: Sequence[tuple[str, Any]], layout: str) -> Table:
    if not rows:
        raise DataError(f'{path} has no line of the form {layout}.')
    names = unique_names([name for name, _ in rows], path)
    keys = {key: index for index, (_, key) in enumerate(rows)}
    if len(keys) < len(rows):
        raise DataError(f'{path} gives two classes the same color or value.')
    if isinstance(rows[0][1], tuple):
        return Table(path, names, colors=keys)
    return Table(path, names, values=keys)


TABLES: dict[str, Callable[[Path], Table]] = {
    '_classes.csv': _pixel_values,
    'class_dict.csv': _name_and_color,
    'labelmap.txt': _label_map,
    'label_colors.txt': _color_and_name,
    'codes.txt': _plain,
    **dict.fromkeys(NAME_FILES, _plain),
}


def _set_colors(folder: LabeledFolder, table: Table | None, masks: Sequence[Path]) -> None:
    if table is None or table.colors is None:
        seen: Counter[Color] = Counter()
        for mask in masks[:20]:
            seen.update(map(tuple, np.unique(_pixels(mask).reshape(-1, 3), axis=0).tolist()))
        some = ', '.join(str(list(color)) for color, _ in seen.most_common(5))
        raise DataError(
            f'the label maps of {folder.root} are in color ({some} ...) and nothing says which '
            'class a color is; add class_dict.csv with lines name,r,g,b.'
        )
    folder.classes, folder.colors = table.names, table.colors
    folder.notes.append(f'Colors of label maps are classes as in {table.path.name}.')


def _set_values(folder: LabeledFolder, table: Table | None, masks: Sequence[Path]) -> None:
    values: dict[int, Path] = {}
    for mask in masks:
        for value in np.unique(_pixels(mask)).tolist():
            values.setdefault(int(value), mask)
    if table and table.colors is not None and _palette(masks[0]):
        folder.classes, folder.colors = table.names, table.colors
        folder.notes.append(f'Colors of the palette are classes as in {table.path.name}.')
        return
    if table is None and _is_ade(folder.root) and max(values) <= 150:
        from mmseg.datasets import ADE20KDataset

        folder.classes, folder.zero_is_ignored = ADE20KDataset.METAINFO['classes'], True
        folder.format = 'label maps (ADE20K)'
        folder.notes.append('Value 0 is no class, as in ADE20K; classes count from 1.')
        return
    plain = sorted(value for value in values if value != IGNORED)
    if table is None:
        if set(values) == {0, IGNORED}:
            folder.classes, folder.values = ('background', 'foreground'), {0: 0, IGNORED: 1}
            folder.notes.append('The values are 0 and 255: background and foreground.')
            return
        if plain != list(range(len(plain))):
            folder.values = {value: index for index, value in enumerate(plain)}
        names = [f'class {value}' for value in plain]
        folder.classes = tuple(names)
        folder.notes.append(
            f'Nothing names the classes of the values {plain[0]} to {plain[-1]}; add classes.txt '
            'with a name per line to have their names.'
        )
        return
    count = len(table.names)
    folder.classes = table.names
    if table.values is not None:
        ordered = all(value == index for value, index in table.values.items())
        folder.values = None if ordered else table.values
        unknown = [v for v in plain if v not in table.values]
    elif plain and max(plain) == count and table.names[0].lower() not in ('background', '_bg_'):
        folder.zero_is_ignored = True
        folder.notes.append(
            f'{table.path.name} has {count} names and values go to {count}: 0 is no class.'
        )
        unknown = []
    else:
        unknown = [v for v in plain if v >= count]
    if unknown:
        raise DataError(
            f'{values[unknown[0]]} has the value {unknown[0]}, and {table.path} names '
            f'{count} classes; add its name, or set these pixels to {IGNORED}.'
        )


def _is_ade(root: Path) -> bool:
    return (root / 'objectInfo150.txt').is_file() or root.name.lower().startswith('ade')


def _palette(path: Path) -> list[int] | None:
    with Image.open(path) as picture:
        return picture.getpalette() if picture.mode == 'P' else None


def _pixels(path: Path) -> np.ndarray:
    """Values `(H, W)`, or colors `(H, W, 3)`.

    Raises:
        DataError: It cannot be decoded.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in ('1', 'L', 'P', 'I', 'I;16', 'F'):
                return np.asarray(picture).astype(np.int64)
            return np.asarray(picture.convert('RGB'))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f'the label map {path} cannot be decoded ({error}).') from error


# --- copies that mmseg can read


def must_convert(folder: LabeledFolder) -> bool:
    """Whether mmseg cannot read the label maps as they are."""
    return folder.colors is not None or folder.values is not None


def write_index_masks(
    folder: LabeledFolder, examples: Iterable[Example], target: Path
) -> dict[str, str]:
    """Write label maps whose values are class indices; pixels of no class become 255.

    Args:
        folder: What their colors or values mean.
        examples: Whose label maps.
        target: Folder for the copies, which are called as the image with `.png` behind.

    Returns:
        The path of each copy by that of its image, relative to `target`.

    Raises:
        DataError: A color has no class.
    """
    written = {}
    for example in examples:
        indices = read_indices(folder, example)
        path = target / f'{example.file}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Image.fromarray(indices).save(temporary, format='PNG')
        written[example.file] = f'{example.file}.png'
    return written


def read_indices(folder: LabeledFolder, example: Example) -> np.ndarray:
    """Class indices `(H, W)` of an example's label map; 255 is no class.

    Raises:
        DataError: A color has no class, or the file cannot be decoded.
    """
    assert example.mask is not None
    source = folder.root / example.mask
    pixels = _pixels(source)
    if folder.zero_is_ignored:
        pixels = np.where(pixels == 0, IGNORED, pixels - 1)
    result = np.full(pixels.shape[:2], IGNORED, np.uint8)
    if folder.colors is not None:
        if pixels.ndim == 2:
            colors = np.asarray(_palette(source) or [], np.int64).reshape(-1, 3)
            pixels = colors[pixels]
        codes = _code(pixels.astype(np.int64))
        known = {int(_code(np.array(c))): index for c, index in folder.colors.items()}
        white = int(_code(np.array((255, 255, 255))))
        for code in np.unique(codes).tolist():
            if code in known:
                result[codes == code] = known[code]
            elif code != white:
                color = [code >> 16, code >> 8 & 255, code & 255]
                raise DataError(
                    f'{source} has the color {color}, which the table of classes does not have; '
                    'add it.'
                )
        return result
    mapping: Mapping[int, int] = folder.values or {i: i for i in range(len(folder.classes))}
    for value, index in mapping.items():
        result[pixels == value] = index
    return result


def _code(colors: np.ndarray) -> np.ndarray:
    return colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]

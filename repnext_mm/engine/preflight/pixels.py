"""Images and label maps of a built data set, read by the transforms of its own pipeline."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...datasets.images import (
    ImageHeader,
    decoded_size,
    describe,
    require_bounded,
    unused_depth,
)
from ...files import require_regular
from .findings import Finding, error, some, warning
from .sources import spread

#: Files of a data set that are decoded, and seconds for it.
SAMPLED, SECONDS = 16, 10.0
#: Label maps that are read where the first ones hold one class only.
MORE_MAPS = 200
#: Seconds for reading sizes from the headers of files.
HEADER_SECONDS = 5.0
#: Transforms of mm that read an image or its annotations, by the names of their classes.
IMAGE_LOADERS = ('LoadImageFromFile',)
ANNOTATION_LOADERS = ('LoadAnnotations',)


@dataclass
class Pixels:
    """What the sampled files of a data set hold.

    Attributes:
        images: Decoded images.
        headers: Images whose size was read from the header.
        maps: Label maps that were read.
        labels: Pixels of each class in them.
        ignored: Pixels that no loss and no metric counts.
    """

    images: int = 0
    headers: int = 0
    maps: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


def check_pixels(
    split: str, dataset: Any, infos: Sequence[dict[str, Any]], classes: Sequence[str]
) -> Pixels:
    """Read some images and label maps of `dataset` exactly as its pipeline does."""
    pixels = Pixels()
    transforms = list(getattr(getattr(dataset, 'pipeline', None), 'transforms', ()))
    load_image = _first(transforms, IMAGE_LOADERS)
    load_annotations = _first(transforms, ANNOTATION_LOADERS)
    if load_image is None or not infos or not infos[0].get('img_path'):
        return pixels
    local = (getattr(dataset, 'backend_args', None) or {}).get('backend', 'local') == 'local'
    if local:
        _check_headers(pixels, infos, load_image)
    counts = np.zeros(len(classes) or 256, np.int64)
    start = time.monotonic()
    sample = spread(infos, SAMPLED)
    for info in sample:
        if pixels.images and time.monotonic() - start > SECONDS:
            break
        results = _load_image(pixels, info, load_image)
        if results is None:
            return pixels
        if not _check_size(pixels, info, results):
            return pixels
        if load_annotations is not None and not _load_annotations(
            pixels, split, info, results, load_annotations
        ):
            return pixels
        labels = results.get('gt_seg_map')
        if labels is not None and not _count(pixels, dataset, info, results, classes, counts):
            return pixels
    if local:
        with suppress(ValueError):  # what cannot be read has been said
            if note := unused_depth(info['img_path'] for info in sample):
                pixels.findings.append(warning(note))
    if pixels.maps:
        if load_annotations is not None and np.count_nonzero(counts) <= 1:
            _read_more(pixels, split, dataset, infos, load_annotations, classes, counts)
        _check_labels(pixels, split, infos, classes, counts)
    return pixels


def _first(transforms: Sequence[Any], names: Sequence[str]) -> Any:
    return next(
        (t for t in transforms if any(c.__name__ in names for c in type(t).__mro__)),
        None,
    )


def _load_image(pixels: Pixels, info: dict[str, Any], load: Any) -> dict[str, Any] | None:
    path = Path(info['img_path'])
    reason = ''
    results = None
    try:
        _refuse_hostile(path)
        results = load(copy.deepcopy(info))
    except Exception as failure:
        reason = f' ({" ".join(str(failure).split())[:200]})'
    if results is None or results.get('img') is None:
        size = path.stat().st_size if path.is_file() else 0
        pixels.findings.append(
            error(
                f'the image {path} cannot be decoded ({size} bytes){reason}; replace the file, or '
                'remove it from the data set.'
            )
        )
        return None
    pixels.images += 1
    pixels.sizes[results['img'].shape[:2]] += 1
    return results


def _refuse_hostile(path: Path) -> None:
    """Raise a ValueError for what would block or not fit into memory.

    What is not on this disk is left to the pipeline's own backend.
    """
    if path.exists():
        require_bounded(require_regular(path))


def _check_size(pixels: Pixels, info: dict[str, Any], results: dict[str, Any]) -> bool:
    height, width = results['img'].shape[:2]
    given = (info.get('height'), info.get('width'))
    if None in given or tuple(given) == (height, width):
        return True
    pixels.findings.append(_size_finding(info, (height, width), None))
    return False


def _size_finding(
    info: dict[str, Any], decoded: tuple[int, int], counted: tuple[int, int] | None
) -> Finding:
    path = Path(info['img_path'])
    try:
        turned = describe(path).exif_orientation > 1
    except (OSError, ValueError):
        turned = False
    why = ''
    if turned:
        why = (
            f' (its EXIF orientation is {describe(path).exif_orientation}, and mm turns the image: '
            'turn the file for good, or make the annotations for the turned one)'
        )
    elif decoded == (info['width'], info['height']):
        why = ' (width and height are exchanged)'
    many = f'{counted[0]} of {counted[1]} images have another size than their annotations, ' if (
        counted
    ) else ''  # fmt: skip
    return error(
        f'{many}{path} has {decoded[1]} x {decoded[0]} pixels, and its annotations say '
        f'{info["width"]} x {info["height"]}{why}; correct width and height, and with them boxes '
        'and masks.'
    )


def _check_headers(pixels: Pixels, infos: Sequence[dict[str, Any]], load: Any) -> None:
    """Sizes of as many images as a few seconds allow, from their headers."""
    if getattr(load, 'imdecode_backend', 'cv2') not in ('cv2', 'pillow'):
        return
    color = getattr(load, 'color_type', 'color')
    turns = color != 'unchanged' and not color.endswith('ignore_orientation')
    start = time.monotonic()
    wrong: list[tuple[dict[str, Any], tuple[int, int]]] = []
    unclear: list[tuple[dict[str, Any], ImageHeader]] = []
    for info in _all_over(infos):
        if time.monotonic() - start > HEADER_SECONDS:
            break
        try:
            header = describe(Path(info['img_path']))
        except (OSError, ValueError):
            continue  # decoding it says what is wrong, and mm may read what Pillow cannot
        pixels.headers += 1
        size = decoded_size(header) if turns else (header.height, header.width)
        given = (info.get('height'), info.get('width'))
        if None not in given and size != tuple(given):
            wrong.append((info, size))
        elif header.exif_orientation > 1 and turns:
            swaps = header.exif_orientation >= 5
            told = None not in given and swaps and header.height != header.width
            if not told:
                unclear.append((info, header))
    if wrong:
        info, size = wrong[0]
        pixels.findings.append(_size_finding(info, size, (len(wrong), pixels.headers)))
    if unclear:
        info, header = unclear[0]
        pixels.findings.append(
            warning(
                f'{len(unclear)} of {pixels.headers} images carry an EXIF orientation, by which mm '
                f'turns them, the first is {info["img_path"]} with {header.exif_orientation}; make '
                'sure that their annotations belong to the turned image.'
            )
        )


def _all_over(items: Sequence[Any]) -> Iterator[Any]:
    """All of `items`, in an order whose beginning is already spread over them."""
    step = 1
    while step * 64 < len(items):
        step *= 2
    seen: set[int] = set()
    while step:
        for index in range(0, len(items), step):
            if index not in seen:
                seen.add(index)
                yield items[index]
        step //= 2


def _load_annotations(
    pixels: Pixels, split: str, info: dict[str, Any], results: dict[str, Any], load: Any
) -> bool:
    """Whether the annotations of an image load; they are added to `results`."""
    results.setdefault('seg_fields', [])
    set_up, asked = info.get('reduce_zero_label'), getattr(load, 'reduce_zero_label', None)
    if set_up is not None and asked is not None and set_up != asked:
        pixels.findings.append(
            error(
                f'reduce_zero_label is {set_up} in the {split} data set and {asked} in '
                'LoadAnnotations of its pipeline; set both alike, in every split.'
            )
        )
        return False
    if getattr(load, 'with_mask', False):
        without = [i for i in info.get('instances', ()) if 'mask' not in i]
        if without:
            pixels.findings.append(
                error(
                    f'{info["img_path"]} has {len(without)} objects without a mask, the first with '
                    f'bbox={without[0].get("bbox")}, and LoadAnnotations has with_mask=True; add '
                    'the masks, or use a detector without mask head and with_mask=False.'
                )
            )
            return False
    try:
        if labels := info.get('seg_map_path'):
            _refuse_hostile(Path(labels))
        results.update(load(results))
    except Exception as failure:
        path = info.get('seg_map_path')
        what = f'the label map {path}' if path else f'the annotations of {info["img_path"]}'
        text = ' '.join(str(failure).split())[:200]
        pixels.findings.append(
            error(
                f'{what} cannot be read ({type(failure).__name__}: {text}); correct or replace it.'
            )
        )
        return False
    return True


def _count(
    pixels: Pixels,
    dataset: Any,
    info: dict[str, Any],
    results: dict[str, Any],
    classes: Sequence[str],
    counts: np.ndarray,
) -> bool:
    """Whether a label map fits its image and the classes; its pixels are added to `counts`."""
    labels, path = results['gt_seg_map'], info.get('seg_map_path')
    if labels.ndim != 2:
        pixels.findings.append(
            error(
                f'the label map {path} has {labels.shape[-1]} channels; expected one, which holds '
                'the number of the class of each pixel, not a color.'
            )
        )
        return False
    if 'img' in results and labels.shape != results['img'].shape[:2]:
        height, width = results['img'].shape[:2]
        pixels.findings.append(
            error(
                f'the label map {path} has {labels.shape[1]} x {labels.shape[0]} pixels, and its '
                f'image {info["img_path"]} has {width} x {height}; expected equal sizes: export '
                'the label map again, and mind an EXIF orientation of the image.'
            )
        )
        return False
    ignored = results.get('ignore_index', getattr(dataset, 'ignore_index', 255))
    counted = labels[labels != ignored]
    pixels.ignored += labels.size - counted.size
    pixels.maps += 1
    if counted.size and (counted.max() >= len(counts) or counted.min() < 0):
        shift = int(bool(info.get('reduce_zero_label')))
        label = int(counted.max()) if counted.max() >= len(counts) else int(counted.min())
        pixels.findings.append(
            error(
                f'the label map {path} holds the label {label + shift}, but the classes of the '
                f'config reach to {len(counts) - 1 + shift}; correct metainfo, reduce_zero_label '
                'or the file.'
            )
        )
        return False
    counts += np.bincount(counted.reshape(-1).astype(np.int64), minlength=len(counts))
    return True


def _read_more(
    pixels: Pixels,
    split: str,
    dataset: Any,
    infos: Sequence[dict[str, Any]],
    load: Any,
    classes: Sequence[str],
    counts: np.ndarray,
) -> None:
    """More label maps, until a second class occurs."""
    start = time.monotonic()
    for info in spread(infos, MORE_MAPS):
        if np.count_nonzero(counts) > 1 or time.monotonic() - start > SECONDS:
            return
        results = copy.deepcopy(info)
        if not _load_annotations(pixels, split, info, results, load) or not _count(
            pixels, dataset, info, results, classes, counts
        ):
            return


def _check_labels(
    pixels: Pixels,
    split: str,
    infos: Sequence[dict[str, Any]],
    classes: Sequence[str],
    counts: np.ndarray,
) -> None:
    names = classes or [str(label) for label in range(len(counts))]
    pixels.labels = dict(zip(names, counts.tolist(), strict=True))
    if any(finding.level == 'error' for finding in pixels.findings):
        return
    present = [name for name, count in pixels.labels.items() if count]
    if len(names) < 2 or len(present) > 1:
        return
    first = infos[0].get('seg_map_path')
    sentence = (
        f'in {pixels.maps} label maps of the {split} data, as {first}, '
        f'{f"only the class {present[0]!r}" if present else "no class"} occurs beside '
        f'{pixels.ignored} ignored pixels; expected labels of the classes {some(names)}'
    )
    if pixels.ignored:
        pixels.findings.append(
            error(
                f'{sentence}: the label 255 is ignored, so masks of 0 and 255 need 255 replaced by '
                '1, and reduce_zero_label=True ignores the label 0.'
            )
        )
    else:
        pixels.findings.append(warning(f'{sentence}.'))

"""Image files, read exactly as mm reads them, and described from their header alone.

A file is decoded only once its header has said that it is an image of bearable size: a PNG of a few
megabytes can ask for many gigabytes.
"""

from __future__ import annotations

import contextlib
import re
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

#: More pixels, or a larger file, are refused before anything is decoded.
MOST_PIXELS = 500_000_000
MOST_BYTES = 2 << 30
#: What OpenCV and Pillow both read. Others go to mm's decoder unseen, which has limits of its own.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'DIB', 'GIF', 'PPM', 'JPEG2000', 'AVIF', 'SUN')
#: Of a TIFF file.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 257, 258, 262, 274, 277
#: Values of 16 bits that stay below a quarter of the highest come from a sensor of fewer bits.
HIGHEST, LEAST_USED = 65535, 1 << 14
MOST_DECODED = 8
#: What a folder of images may contain.
IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.gif', '.avif', '.jp2'),
)


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its image, before it is decoded.

    Attributes:
        width: Pixels as stored, before the EXIF orientation is applied.
        height: As `width`.
        bits: Of one value of one channel; of a palette, those of its colors.
        channels: Of a pixel as stored; a palette's colors have 3.
        exif_orientation: 1 to 8. Orientations from 5 on exchange width and height.
        format: As Pillow names it: 'JPEG', 'PNG', 'TIFF' ...
    """

    width: int
    height: int
    bits: int
    channels: int
    exif_orientation: int
    format: str


class ImageTooLarge(ValueError):
    """An image would need more memory than there may be."""


def decoded_size(header: ImageHeader) -> tuple[int, int]:
    """Height and width after the image is turned as its EXIF orientation says."""
    size = (header.height, header.width)
    return size[::-1] if header.exif_orientation >= 5 else size


def describe(path: str | Path) -> ImageHeader:
    """The header of an image file.

    Raises:
        ValueError: It is missing, no regular file, or no image of a known format.
    """
    path = Path(path)
    if (header := _header(path)) is None:
        raise ValueError(
            f'{path} is no image of a known format ({", ".join((*FORMATS, "TIFF"))}); replace or '
            'remove it.'
        )
    return header


def read_image(path: str | Path, loader: Mapping[str, Any] | None = None) -> np.ndarray:
    """An image as mm's `LoadImageFromFile` reads it.

    Args:
        path: An image file.
        loader: The config of the transform that loads images (`imdecode_backend`, `color_type`,
            `to_float32` ...); its default where None.

    Returns:
        `(H, W, 3)` uint8, BGR; `loader` may ask for grey, 16 bits or float32.

    Raises:
        ValueError: It is missing, no regular file, too large, or mm cannot decode it.
    """
    path = Path(path)
    require_bounded(path)
    try:
        import cv2
        import mmcv.transforms  # noqa: F401  (registers the transform)
        from mmengine.registry import TRANSFORMS
    except ImportError as error:
        raise ValueError(
            f'{path} is read as mm reads it, which needs mmcv ({error}); '
            '`repnext-mm doctor` says what to install.'
        ) from error
    transform = TRANSFORMS.build({'type': 'LoadImageFromFile', **(loader or {})})
    try:
        loaded = transform.transform({'img_path': str(path)})
    except (AssertionError, cv2.error) as error:
        raise ValueError(_undecoded(path)) from error
    except Exception as error:  # of any decoder
        raise ValueError(_undecoded(path, ' '.join(str(error).split())[:200])) from error
    if loaded is None:  # `ignore_empty`
        raise ValueError(_undecoded(path))
    return loaded['img']


def image_loader(pipeline: Iterable[Any]) -> dict[str, Any] | None:
    """The config of the transform of a pipeline that loads images; None without one."""
    for step in pipeline:
        kind = step.get('type')
        if 'LoadImage' in (kind if isinstance(kind, str) else getattr(kind, '__name__', '')):
            return dict(step)
    return None


def unused_depth(paths: Iterable[str | Path]) -> str | None:
    """A warning where images of 16 bits use few of them: mm keeps the upper 8, so they are dark.

    Args:
        paths: Image files; the first few of those with 16 bits are decoded.

    Raises:
        ValueError: As `read_image`.
    """
    deep = [path for path in map(Path, paths) if (h := _header(path)) and h.bits == 16]
    deep = deep[:MOST_DECODED]
    stored = (read_image(path, {'color_type': 'unchanged'}) for path in deep)
    highest = max((int(image.max()) for image in stored), default=HIGHEST)
    if highest >= LEAST_USED:
        return None
    return (
        f'{len(deep)} images of 16 bits, {deep[0]} the first, have values up to {highest} of '
        f'{HIGHEST}, and mm, which keeps the upper 8 bits, loads at most {highest >> 8} of 255; '
        'multiply their values, or save them with 8 bits.'
    )


def _undecoded(path: Path, reason: str = '') -> str:
    details = '; '.join(filter(None, (f'{path.stat().st_size} bytes', reason)))
    return f'the image {path} cannot be decoded ({details}); replace or remove it.'


def require_bounded(path: Path) -> None:
    header = _header(path)
    if header is not None and header.width * header.height > MOST_PIXELS:
        raise ImageTooLarge(
            f'the image {path} has {header.width} x {header.height} pixels, more than the '
            f'{MOST_PIXELS} that are decoded; cut it into tiles or remove it.'
        )
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ImageTooLarge(
            f'the image {path} has {size} bytes, more than the {MOST_BYTES} that are read; '
            'cut it into tiles or remove it.'
        )


def _header(path: Path) -> ImageHeader | None:
    """The header, or None where the format is unknown or the header damaged."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = 'folder' if stat.S_ISDIR(status.st_mode) else 'pipe, socket or device'
            raise ValueError(f'{path} is a {kind} and no image file; remove it.')
        with path.open('rb') as file:
            for read in (_read_tiff, _read_known):
                file.seek(0)
                # Damaged headers fail in many ways, and Pillow warns of some.
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    if header := read(file):
                        return header
    except OSError as error:
        raise ValueError(f'the image {path} cannot be read: {error.strerror}.') from error
    return None


def _read_tiff(file: BinaryIO) -> ImageHeader | None:
    """Of a TIFF of any number of channels; Pillow opens only some."""
    start = file.read(8)
    if start[:4] not in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return None
    if b'+' in start[:4]:
        start += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    palette = tags.get(PHOTOMETRIC) == 3
    bits = tags.get(BITS, (1,))
    return ImageHeader(
        int(tags[WIDTH]),
        int(tags[HEIGHT]),
        8 if palette else max(bits),
        3 if palette else int(tags.get(SAMPLES, 1)),
        _orientation(tags),
        'TIFF',
    )


def _read_known(file: BinaryIO) -> ImageHeader | None:
    """Without the limit of `PIL.Image.open`, which is lower than ours."""
    Image.init()
    start = file.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:  # an older Pillow
            continue
        opener, accepts = Image.OPEN[name]
        if accepts and accepts(start) is not True:
            continue
        file.seek(0)
        with contextlib.closing(opener(file, '')) as image:
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # as mm, which then turns nothing
                exif.load(image.info.get('exif', b''))
            bands = image.getbands()
            return ImageHeader(
                *image.size,
                _bits(image),
                3 if bands == ('P',) else len(bands),
                _orientation(exif),
                image.format or name,
            )
    return None


def _bits(image: Any) -> int:
    """Of a value as stored; Pillow opens colors of 16 bits as if they had 8."""
    raw = str([tile[3] for tile in image.tile])
    if re.search(r';16|65535', raw):
        return 16
    kinds = {'1': 1, 'I': 32, 'F': 32}
    return 16 if image.mode.startswith('I;16') else kinds.get(image.mode, 8)


def _orientation(tags: Mapping[int, Any]) -> int:
    value = tags.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1

"""Images as mm reads them, and what their headers say before anything is decoded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: What a folder of images may contain.
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
#: Decoded, such an image takes 1.5 GB; a file of a few MB can claim many times that.
MOST_PIXELS = 500_000_000
#: 8 bits of an image of 16 stay below this if it uses at most 12 of them.
DARK = 17
ORIENTATION = 0x0112  # the tag of EXIF
BITS = {'1': 1, 'I': 32, 'I;16': 16, 'I;16B': 16, 'I;16L': 16, 'F': 32}


class ImageTooLarge(ValueError):
    """An image would need more memory than there may be."""


@dataclass(frozen=True)
class ImageHeader:
    """Size in pixels, bits of a channel, channels and EXIF orientation (1: as it is stored)."""

    width: int
    height: int
    bits: int
    channels: int
    exif_orientation: int
    format: str


def describe(path: str | Path) -> ImageHeader:
    """Read the header of an image.

    Raises:
        ValueError: It is not a regular file or no image.
        ImageTooLarge: It has more than `MOST_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():  # opening a pipe or a device could wait for ever
        raise ValueError(f'the image {path} is not a regular file; give an image file.')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path) as image:
                orientation = image.getexif().get(ORIENTATION, 1)
                header = ImageHeader(
                    image.width,
                    image.height,
                    BITS.get(image.mode, 8),
                    len(image.getbands()),
                    orientation if orientation in range(1, 9) else 1,
                    str(image.format),
                )
    except Image.DecompressionBombError as error:
        pixels = next((word for word in str(error).split() if word.strip('(').isdecimal()), '?')
        raise _too_large(path, f'{pixels.strip("(")} pixels') from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f'the image {path} cannot be read ({error}); replace or remove it.'
        ) from error
    if header.width * header.height > MOST_PIXELS:
        raise _too_large(path, f'{header.width} x {header.height} pixels')
    return header


def _too_large(path: Path, size: str) -> ImageTooLarge:
    return ImageTooLarge(
        f'the image {path} has {size}, and at most {MOST_PIXELS:,} are read; scale it down or cut '
        'it into pieces.'
    )


def decoded_size(header: ImageHeader) -> tuple[int, int]:
    """Height and width after the image is turned as its EXIF orientation says."""
    size = (header.height, header.width)
    return size[::-1] if header.exif_orientation >= 5 else size


def read_image(path: str | Path) -> np.ndarray:
    """An image `(H, W, 3)` with the channels B, G, R from 0 to 255, as mmcv's LoadImageFromFile.

    It is decoded by what mmcv decodes with unless a pipeline says otherwise: OpenCV in color, which
    turns the image by its EXIF orientation and keeps the upper 8 bits of 16.

    Raises:
        ValueError: It cannot be decoded, or its header asks for too much memory.
    """
    import cv2

    path = Path(path)
    try:
        describe(path)
    except ValueError as error:
        if isinstance(error, ImageTooLarge) or not path.is_file():
            raise  # what only Pillow cannot read, OpenCV may read
    reason = ''
    image = None
    try:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        reason = f' ({" ".join(str(error).split())[:200]})'
    if image is None:
        raise ValueError(
            f'the image {path} cannot be decoded ({path.stat().st_size} bytes){reason}; replace or '
            'remove it.'
        )
    return image


def is_dark(header: ImageHeader, image: np.ndarray) -> bool:
    """Whether an image of 16 bits uses at most 12 of them, and is nearly black as mm reads it."""
    return header.bits > 8 and image.dtype == np.uint8 and 0 < int(image.max()) < DARK

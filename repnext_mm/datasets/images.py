"""TEMPORARY until part D."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


@dataclass(frozen=True)
class ImageHeader:
    width: int
    height: int
    bits: int
    channels: int
    exif_orientation: int
    format: str


def decoded_size(header):
    size = header.height, header.width
    return size[::-1] if header.exif_orientation >= 5 else size


def describe(path):
    if not Path(path).is_file():
        raise ValueError(f'{path} is not a regular file')
    with Image.open(path) as im:
        bits = 16 if im.mode.startswith('I') else 8
        return ImageHeader(
            im.width, im.height, bits, len(im.getbands()), im.getexif().get(274, 1), im.format
        )

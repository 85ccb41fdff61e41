"""Images are read as mm reads them, and described, bounded and refused before they are decoded."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from repnext_mm.datasets.images import (
    MOST_BYTES,
    MOST_PIXELS,
    ImageHeader,
    describe,
    read_image,
    unused_depth,
)

COLORS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[274] = 6


def encoded(kind: str, mode: str = 'RGB', **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(COLORS)
    image = image.convert('L').convert(mode) if mode == 'I;16' else image.convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_opencv(suffix: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


#: Bits, channels and orientation of each.
IMAGES: dict[str, tuple[bytes, int, int, int]] = {
    'grey.png': (encoded('PNG', 'L'), 8, 1, 1),
    'grey16.png': (encoded('PNG', 'I;16'), 16, 1, 1),
    'color16.png': (by_opencv('.png', COLORS.astype(np.uint16) * 257), 16, 3, 1),
    'color16.tif': (by_opencv('.tif', COLORS.astype(np.uint16) * 257), 16, 3, 1),
    'color16.ppm': (by_opencv('.ppm', COLORS.astype(np.uint16) * 257), 16, 3, 1),
    'alpha.png': (encoded('PNG', 'RGBA'), 8, 4, 1),
    'plain.webp': (encoded('WEBP'), 8, 3, 1),
    'grey_alpha.png': (encoded('PNG', 'LA'), 8, 2, 1),
    'palette.png': (encoded('PNG', 'P'), 8, 3, 1),
    'palette.tif': (encoded('TIFF', 'P'), 8, 3, 1),
    'palette.gif': (encoded('GIF', 'P'), 8, 3, 1),
    'bits.png': (encoded('PNG', '1'), 1, 1, 1),
    'cmyk.jpg': (encoded('JPEG', 'CMYK'), 8, 4, 1),
    'plain.bmp': (encoded('BMP'), 8, 3, 1),
    'plain.jpg': (encoded('JPEG'), 8, 3, 1),
    'turned.jpg': (encoded('JPEG', exif=TURNED), 8, 3, 6),
    'turned.png': (encoded('PNG', exif=TURNED), 8, 3, 6),
    'turned.tif': (encoded('TIFF', exif=TURNED), 8, 3, 6),
}


@pytest.mark.compat
@pytest.mark.parametrize('name', IMAGES)
def test_read_as_mm_reads(name: str, tmp_path: Path) -> None:
    content, bits, channels, orientation = IMAGES[name]
    path = tmp_path / name
    path.write_bytes(content)
    header = describe(path)
    assert header == ImageHeader(36, 24, bits, channels, orientation, header.format)
    for loader in (
        {},
        {'color_type': 'unchanged'},
        {'color_type': 'grayscale', 'to_float32': True},
        {'imdecode_backend': 'pillow'},
    ):
        wanted = LoadImageFromFile(**loader).transform({'img_path': str(path)})['img']
        given = read_image(path, {'type': 'LoadImageFromFile', **loader})
        assert given.dtype == wanted.dtype
        np.testing.assert_array_equal(given, wanted)
    assert read_image(path).dtype == np.uint8


@pytest.mark.compat
@pytest.mark.parametrize('name', ['plain.jpg', 'grey.png', 'color16.tif', 'plain.webp'])
def test_cut_files_are_refused_where_mm_refuses_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = IMAGES[name][0]
    path.write_bytes(content[: len(content) // 2])
    try:
        wanted = LoadImageFromFile().transform({'img_path': str(path)})['img']
    except AssertionError:
        with pytest.raises(ValueError, match=f'{name} cannot be decoded'):
            read_image(path)
    else:
        np.testing.assert_array_equal(read_image(path), wanted)


def test_what_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'text.png').write_text('no image')
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / 'missing.png', Path('/dev/zero')):
        for read in (describe, read_image):
            with pytest.raises(ValueError, match=str(path)):
                read(path)


@pytest.mark.compat
def test_backend_that_is_not_installed(tmp_path: Path) -> None:
    path = tmp_path / 'a.jpg'
    path.write_bytes(IMAGES['plain.jpg'][0])
    with pytest.raises(ValueError, match='none_such'):
        read_image(path, {'imdecode_backend': 'none_such'})


def png(width: int, height: int) -> bytes:
    """A complete PNG of one bit per pixel, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack('>I', len(data))
            + (body := kind + data)
            + zlib.crc32(body).to_bytes(4, 'big')
        )

    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * height), 1)
    chunks = (chunk(b'IHDR', header), chunk(b'IDAT', pixels), chunk(b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def test_small_files_of_huge_images(tmp_path: Path) -> None:
    path = tmp_path / 'bomb.png'
    path.write_bytes(png(30_000, 20_000))
    assert path.stat().st_size < 1_000_000
    assert describe(path).width == 30_000
    with pytest.raises(ValueError, match=f'30000 x 20000 pixels, .* {MOST_PIXELS}'):
        read_image(path)
    with path.open('r+b') as file:  # sparse
        file.write(png(8, 8))
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=f'{MOST_BYTES + 1} bytes'):
        read_image(path)


def test_larger_than_pillow_opens(tmp_path: Path) -> None:
    """Pillow refuses above 0.18 gigapixel, which mm loads."""
    path = tmp_path / 'large.png'
    path.write_bytes(png(20_000, 10_000))
    assert describe(path) == ImageHeader(20_000, 10_000, 1, 1, 1, 'PNG')


@given(name=st.sampled_from([*IMAGES]), data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_headers(name: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(IMAGES[name][0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 400) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert 1 <= describe(path).exif_orientation <= 8


@pytest.mark.compat
@pytest.mark.parametrize('bits, warned', [(10, True), (12, True), (14, True), (16, False)])
def test_unused_depth(bits: int, warned: bool, tmp_path: Path) -> None:
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for path in paths[:2]:
        pixels = COLORS[..., 0].astype(np.uint16) * 257 >> 16 - bits
        cv2.imwrite(str(path), pixels)
    paths[2].write_bytes(IMAGES['plain.jpg'][0])
    text = unused_depth(paths)
    assert (text is not None) == warned
    if text:
        assert f'2 images of 16 bits, {paths[0]}' in text
        assert f'up to {(1 << bits) - 1} of 65535' in text
    assert unused_depth(paths[2:]) is None

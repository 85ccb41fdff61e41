"""Images are read as mm reads them; what asks for too much is refused by its header."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repnext_mm.datasets.images import (
    ImageTooLarge,
    decoded_size,
    describe,
    read_image,
)
from repnext_mm.deploy.calibration import calibration_images
from repnext_mm.deploy.errors import UsageError

pytestmark = pytest.mark.compat
PICTURE = np.add.outer(np.arange(48) * 4, np.arange(64)).astype(np.uint8)


def save(path: Path, mode: str) -> Path:
    if mode == 'I;16':
        Image.fromarray(PICTURE.astype(np.uint16) * 257).save(path)
    elif mode == 'turned':
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(PICTURE).convert('RGB').save(path, exif=exif)
    else:
        Image.fromarray(PICTURE).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    'mode, suffix',
    [
        ('RGB', '.jpg'),
        ('CMYK', '.jpg'),
        ('turned', '.jpg'),
        ('L', '.png'),
        ('RGBA', '.png'),
        ('P', '.png'),
        ('1', '.png'),
        ('I;16', '.png'),
        ('RGB', '.webp'),
        ('RGB', '.bmp'),
    ],
)
def test_same_pixels_as_mm(mode: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip('mmcv', reason='mmcv is not installed')
    from mmcv.transforms import LoadImageFromFile

    path = save(tmp_path / f'image{suffix}', mode)
    expected = LoadImageFromFile()({'img_path': str(path)})['img']
    image = read_image(path)
    np.testing.assert_array_equal(image, expected)
    assert decoded_size(describe(path)) == image.shape[:2]


def test_header(tmp_path: Path) -> None:
    header = describe(save(tmp_path / 'a.png', 'I;16'))
    assert (header.width, header.height, header.bits, header.channels) == (64, 48, 16, 1)
    assert describe(save(tmp_path / 'a.jpg', 'turned')).exif_orientation == 6


@pytest.mark.parametrize('size', [(60_000, 60_000), (30_000, 17_000)])
def test_kilobytes_that_decode_to_gigabytes(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / 'bomb.png'
    Image.new('1', size).save(path)
    assert path.stat().st_size < 1 << 20
    for read in (describe, read_image):
        with pytest.raises(ImageTooLarge, match=path.name):
            read(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.png')
    for path in (tmp_path / 'pipe.png', Path('/dev/zero'), tmp_path):
        with pytest.raises(ValueError, match='regular file'):
            read_image(path)


@pytest.mark.parametrize('content', [b'', b'text', None])
def test_damaged_image(content: bytes | None, tmp_path: Path) -> None:
    path = save(tmp_path / 'image.jpg', 'RGB')
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=path.name):
        read_image(path)


def test_notes_on_a_folder_to_calibrate_on(tmp_path: Path) -> None:
    for number in range(16):
        dark = PICTURE.astype(np.uint16) * 16
        Image.fromarray(dark).save(tmp_path / f'{number}.png')
    (tmp_path / 'readme.heic').write_bytes(b'x')
    left_out, dark_images = calibration_images(tmp_path, (32, 32)).notes()
    assert '1 of 17' in left_out
    assert '.heic' in left_out
    assert '16 of 16' in dark_images


def test_calibration_refuses_what_mm_cannot_read(tmp_path: Path) -> None:
    for number in range(16):
        path = save(tmp_path / f'{number}.jpg', 'RGB')
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UsageError, match='jpg'):
        calibration_images(tmp_path, (32, 32))[0]

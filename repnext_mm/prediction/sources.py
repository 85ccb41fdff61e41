"""What is predicted on: images, folders, patterns, lists, videos."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..datasets.folders.records import images_in
from ..datasets.images import IMAGE_SUFFIXES
from ..engine.errors import UserError

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
LISTS = ('.txt', '.lst')


@dataclass(frozen=True)
class Source:
    """An image or a video, and what its outputs are called.

    Args:
        path: The file.
        name: Path of its outputs below the output folder, with the file's own ending.
        video: It is one.
    """

    path: Path
    name: str
    video: bool = False


class BrokenSource(ValueError):
    """A source that cannot be read, or not to its end; one sentence."""


def find_sources(given: Sequence[str]) -> list[Source]:
    """Every image and video that the arguments mean, in their order.

    Names of outputs are those of the files; of two equal ones, with the folders that tell them
    apart, so that they depend on nothing else.

    Raises:
        UserError: An argument means nothing that is there.
    """
    found: list[tuple[Path, Path]] = []  # a file, and the folder that its name is relative to
    for text in given:
        found += _expand(text)
    unique = list(dict.fromkeys(found))
    names = {pair: pair[0].relative_to(pair[1]).as_posix() for pair in unique}
    counts = Counter(names.values())
    clashing = [pair for pair in unique if counts[names[pair]] > 1]
    if clashing:
        root = Path(os.path.commonpath([pair[0].absolute().parent for pair in clashing]))
        for pair in clashing:
            names[pair] = pair[0].absolute().relative_to(root).as_posix()
    return [Source(path, names[path, base], path.suffix.lower() in VIDEOS) for path, base in unique]


def _expand(text: str) -> list[tuple[Path, Path]]:
    if text == '-':
        lines = [line.strip() for line in sys.stdin if line.strip()]
        if not lines:
            raise UserError('- reads names of images from the standard input, which is empty.')
        return [(Path(line), Path(line).parent) for line in lines]
    path = Path(text)
    if path.is_dir():
        videos = [p for p in sorted(path.rglob('*')) if p.suffix.lower() in VIDEOS and p.is_file()]
        inside = sorted([*images_in(path), *videos])
        if not inside:
            raise UserError(f'{path} contains no image and no video.')
        return [(item, path) for item in inside]
    if not path.exists() and any(mark in text for mark in '*?['):
        matched = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        files = [p for p in matched if p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEOS)]
        if not files:
            raise UserError(f'no image and no video matches {text!r}.')
        return [(item, item.parent) for item in files]
    if path.is_file() and path.suffix.lower() in LISTS:
        rows = [line.strip() for line in path.read_text('utf-8-sig').splitlines() if line.strip()]
        listed = [p if (p := Path(row)).is_absolute() else path.parent / row for row in rows]
        return [(item, item.parent) for item in listed]
    return [(path, path.parent)]


def frames(path: Path, stride: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Every `stride`-th frame of a video with its number, `(H, W, 3)` uint8, blue first.

    Raises:
        BrokenSource: It cannot be opened, or ends before the length that it states.
    """
    import cv2

    if not path.is_file():
        raise BrokenSource(f'there is no file {path}.')
    opened = cv2.VideoCapture(str(path))
    try:
        stated = int(opened.get(cv2.CAP_PROP_FRAME_COUNT))
        number = 0
        while True:
            there, frame = opened.read()
            if not there:
                break
            if number % stride == 0:
                yield number, frame
            number += 1
        if number == 0:
            raise BrokenSource(f'{path} is not a video that can be read.')
        if number < stated:
            raise BrokenSource(f'{path} ends after {number} of {stated} frames.')
    finally:
        opened.release()


def video_facts(path: Path) -> tuple[int, float]:
    """Frames that a video states, and frames per second; 0 frames where it cannot be opened."""
    import cv2

    opened = cv2.VideoCapture(str(path))
    try:
        rate = float(opened.get(cv2.CAP_PROP_FPS)) or 25.0
        return max(int(opened.get(cv2.CAP_PROP_FRAME_COUNT)), 0), rate
    finally:
        opened.release()


def reader(read: Callable[[Path], np.ndarray]) -> Callable[[Path], np.ndarray]:
    """`read` with one kind of error."""

    def checked(path: Path) -> np.ndarray:
        if not path.exists():
            raise BrokenSource(f'there is no file {path}.')
        try:
            return read(path)
        except (ValueError, OSError) as error:
            raise BrokenSource(str(error)) from error

    return checked

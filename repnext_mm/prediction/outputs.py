"""What is written of predictions: pictures, COCO's results, label maps, YOLO's labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ..engine.inference import Result
from ..files import replacing, write_text
from ..runtimes.predictor import as_record, draw

#: What `--save` may name.
KINDS = ('pictures', 'json', 'masks', 'yolo')
JSON = 'predictions.json'


class Outputs:
    """Files of predictions below a folder; those written so far stay, whatever happens.

    Args:
        folder: Made when the first file is written.
        kinds: Of `KINDS`.
        settings: Of the predictor.
        threshold: Least score of what is written.
    """

    def __init__(
        self, folder: Path, kinds: Sequence[str], settings: Mapping[str, Any], threshold: float
    ) -> None:
        self.folder = folder
        self.kinds = kinds
        self.settings = settings
        self.threshold = threshold
        self.records: list[dict[str, Any]] = []
        self._images = 0
        self._video: Any = None

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the records, also of an interrupted run."""
        self.end_video()
        if 'json' in self.kinds and self._images:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / JSON, json.dumps(self.records))

    def add(
        self,
        name: str,
        image: np.ndarray,
        result: Result,
        truth: Result | None = None,
        frame: int | None = None,
        rate: float | None = None,
    ) -> None:
        """Write what there is of one image, or of one frame of a video."""
        self._images += 1
        self.records += records_of(result, self.settings, name, self._images, self.threshold, frame)
        if 'pictures' in self.kinds:
            picture = draw(image, result, self.settings, self.threshold)
            if truth is not None:
                picture = beside(draw(image, truth, self.settings, 0.0), picture)
            if frame is None:
                self._save_picture(picture, self.folder / name)
            else:
                self._add_frame(name, picture, rate or 25.0)
        stem = name if frame is None else f'{name}_{frame:06}'
        if 'masks' in self.kinds and ('classes' in result or 'masks' in result):
            save_png(self.folder / 'masks' / f'{without_ending(stem)}.png', label_map(result))
        if 'yolo' in self.kinds and 'boxes' in result:
            lines = yolo_lines(result, image.shape[:2], self.threshold)
            path = self.folder / 'labels' / f'{without_ending(stem)}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, ''.join(f'{line}\n' for line in lines))

    def _save_picture(self, picture: np.ndarray, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rgb = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
        kind = 'JPEG' if path.suffix.lower() in ('.jpg', '.jpeg') else 'PNG'
        path = path if path.suffix.lower() in ('.jpg', '.jpeg', '.png') else Path(f'{path}.png')
        with replacing(path) as temporary:
            rgb.save(temporary, format=kind, quality=92)

    def _add_frame(self, name: str, picture: np.ndarray, rate: float) -> None:
        import cv2

        path = (self.folder / name).with_suffix('.mp4')
        odd = [side % 2 for side in picture.shape[:2]]  # the codec requires even sides
        picture = np.pad(picture, ((0, odd[0]), (0, odd[1]), (0, 0)), 'edge')
        if self._video is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = picture.shape[1], picture.shape[0]
            code = cv2.VideoWriter_fourcc(*'mp4v')  # type: ignore[attr-defined]
            self._video = cv2.VideoWriter(str(path), code, rate, size)
        self._video.write(np.ascontiguousarray(picture))

    def end_video(self) -> None:
        """Complete the video that is being written."""
        if self._video is not None:
            self._video.release()
            self._video = None


def records_of(
    result: Result,
    settings: Mapping[str, Any],
    name: str,
    image_id: int,
    threshold: float,
    frame: int | None = None,
) -> list[dict[str, Any]]:
    """Results of one image in COCO's form, with the names of file and class beside the numbers.

    `pycocotools.coco.COCO.loadRes` reads those of detectors. Categories count from 1 in the order
    of the classes. A segmentor has one record with pixels by class, a classifier one with its most
    likely classes.
    """
    where: dict[str, Any] = {'image_id': image_id, 'file_name': name}
    if frame is not None:
        where['frame'] = frame
    if 'boxes' not in result:
        return [{**where, **as_record(result, settings)}]
    found = []
    for i, (box, score, label) in enumerate(
        zip(result['boxes'], result['scores'], result['labels'], strict=True)
    ):
        if score < threshold:
            continue
        x0, y0, x1, y1 = (float(value) for value in box)
        row: dict[str, Any] = {
            **where,
            'category_id': int(label) + 1,
            'category_name': settings['classes'][label],
            'bbox': [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
            'score': round(float(score), 6),
        }
        if 'masks' in result:
            row['segmentation'] = encoded(result['masks'][i])
        found.append(row)
    return found


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask `(H, W)`."""
    from pycocotools import mask as coco_masks

    runs = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(runs['size']), 'counts': runs['counts'].decode('ascii')}


def label_map(result: Result) -> np.ndarray:
    """Classes `(H, W)`, or numbers of objects from 1 on with the best on top."""
    if 'classes' in result:
        classes = result['classes']
        return classes.astype(np.uint8 if classes.max(initial=0) < 256 else np.uint16)
    masks = result['masks']
    count = len(masks)
    full = np.zeros(masks.shape[1:], np.uint8 if count < 256 else np.uint16)
    for i in range(count - 1, -1, -1):
        full[masks[i]] = i + 1
    return full


def yolo_lines(result: Result, shape: Sequence[int], threshold: float) -> Iterable[str]:
    """Class, center and size of each box as parts of the image, as labels are."""
    height, width = shape
    for box, score, label in zip(result['boxes'], result['scores'], result['labels'], strict=True):
        if score >= threshold:
            x0, x1 = np.clip(box[[0, 2]], 0, width) / width
            y0, y1 = np.clip(box[[1, 3]], 0, height) / height
            values = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            yield ' '.join([str(int(label)), *(f'{value:.6f}' for value in values)])


def save_png(path: Path, values: np.ndarray) -> None:
    """Write a label map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(values).save(temporary, format='PNG')


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of equal height with a gap between."""
    height = max(left.shape[0], right.shape[0])
    gap = np.full((height, 8, 3), 255, np.uint8)
    parts = []
    for picture in (left, right):
        full = np.full((height, picture.shape[1], 3), 255, np.uint8)
        full[: picture.shape[0]] = picture
        parts.append(full)
    return np.concatenate([parts[0], gap, parts[1]], 1)


def without_ending(name: str) -> str:
    """A name without what is behind its last dot."""
    return str(PurePosixPath(name).with_suffix(''))

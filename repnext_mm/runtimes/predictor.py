"""Run an exported classifier, detector or segmentor: with numpy, Pillow or OpenCV, and its runtime.

    python predict.py photo.jpg --out drawn.png --json

    from predict import Model
    found = Model('model.json')('photo.jpg')   # or an array (H, W, 3) uint8, blue first as OpenCV's

This file stands alone: copy it, `model.json` and one file that `model.json` lists (`.onnx`, or a
folder with OpenVINO's `.xml` and `.bin`) to where they are used. Install `numpy`, `pillow` or
`opencv-python`, and `onnxruntime` or `openvino`. An image is prepared and its outputs are finished
with the arithmetic of mmdet and mmseg, so the results are those of their `predict`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

SCHEMA = 1
IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
#: No image is resized or padded to more pixels.
MOST_PIXELS = 1 << 28
#: Weights of OpenCV's bilinear interpolation, as whole numbers.
BITS = 11
#: Classes of a classifier that are shown.
MOST_LIKELY = 5

Settings = Mapping[str, Any]
Result = dict[str, np.ndarray]


class PredictError(ValueError):
    """A model or an image cannot be used; one sentence."""


# --- an image, as the model requires it


def read_image(path: str | Path) -> np.ndarray:
    """`(H, W, 3)` uint8, blue first, turned as EXIF says.

    Raises:
        PredictError: It is not an image.
    """
    if cv2 is not None:
        data = np.fromfile(path, np.uint8) if Path(path).is_file() else np.empty(0, np.uint8)
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        except cv2.error:  # more pixels than it reads
            image = None
    else:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as opened:
                image = np.asarray(ImageOps.exif_transpose(opened).convert('RGB'))[..., ::-1]
        except (OSError, ValueError, Image.DecompressionBombError):
            image = None
    if image is None:
        raise PredictError(f'{path} is not an image that can be read.')
    return np.ascontiguousarray(image)


def require_pixels(width: int, height: int) -> None:
    """Refuse sizes that would fill the memory, or that are none."""
    if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise PredictError(f'an image would get {width} x {height} pixels, which is refused.')


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """What `cv2.resize` makes of an image `(H, W, 3)` uint8, bilinear, to the last bit."""
    require_pixels(width, height)
    if cv2 is not None:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    left, right, x0, x1 = _weights(width, image.shape[1], at_edge=True)
    upper, lower, y0, y1 = _weights(height, image.shape[0], at_edge=False)
    rows = image[:, left].astype(np.int32) * x0[:, None] + image[:, right] * x1[:, None]
    above, below = rows[upper] >> 4, rows[lower] >> 4
    total = ((above * y0[:, None, None]) >> 16) + ((below * y1[:, None, None]) >> 16)
    return np.clip((total + 2) >> 2, 0, 255).astype(np.uint8)


def _weights(new: int, old: int, at_edge: bool) -> tuple[np.ndarray, ...]:
    """Two pixels for each new one and their weights; OpenCV rounds those at its edges per axis."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    low = np.floor(at).astype(np.int64)
    part = (at - low).astype(np.float32)
    if at_edge:
        part[(low < 0) | (low >= old - 1)] = 0
    one = np.float32(1 << BITS)
    first = np.rint((np.float32(1) - part) * one).astype(np.int32)
    second = np.rint(part * one).astype(np.int32)
    if at_edge:
        low = low.clip(0, old - 1)
    return low.clip(0, old - 1), (low + 1).clip(0, old - 1), first, second


def fitting(width: int, height: int, scale: Sequence[int]) -> tuple[int, int]:
    """The size within `scale` (long side, short side) of the same aspect ratio, as mmcv rounds."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(width * float(factor) + 0.5), int(height * float(factor) + 0.5)


def resized(image: np.ndarray, step: Settings) -> np.ndarray:
    """One step of the test pipeline of mm: a resize."""
    height, width = image.shape[:2]
    if step.get('multiple'):
        size = tuple(-(-side // step['multiple']) * step['multiple'] for side in (width, height))
    elif step.get('factor'):
        scaled = [int(side * step['factor'] + 0.5) for side in (width, height)]
        size = fitting(width, height, scaled) if step.get('keep_ratio') else tuple(scaled)
    elif step.get('keep_ratio'):
        size = fitting(width, height, step['scale'])
    else:
        size = tuple(step['scale'])
    return image if size == (width, height) else resize(image, *size)


def padded(image: np.ndarray, step: Settings) -> np.ndarray:
    """One step of the test pipeline of mm: padding on the right and below."""
    height, width = image.shape[:2]
    if step.get('square'):
        new = (max(height, width),) * 2
    elif step.get('size'):
        new = tuple(max(a, b) for a, b in zip((height, width), step['size'][::-1]))
    else:
        divisor = step['divisor']
        new = -(-height // divisor) * divisor, -(-width // divisor) * divisor
    require_pixels(new[1], new[0])
    full = np.empty((*new, 3), image.dtype)
    full[:] = np.array(step.get('value', 0), image.dtype)
    full[:height, :width] = image
    return full


def shortened(image: np.ndarray, step: Settings) -> np.ndarray:
    """Resized by Pillow until the short side has so many pixels, as torchvision rounds."""
    from PIL import Image

    height, width = image.shape[:2]
    side = step['side']
    long = int(side * max(height, width) / min(height, width))
    size = (side, long) if width <= height else (long, side)
    require_pixels(*size)
    if size == (width, height):
        return image
    kind = Image.Resampling[step['filter'].upper()]
    resampled = Image.fromarray(np.ascontiguousarray(image[..., ::-1])).resize(size, kind)
    return np.asarray(resampled)[..., ::-1]


def cropped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image, as torchvision rounds; zeros around one that is smaller."""
    rows, columns = image.shape[:2]
    if rows < height or columns < width:
        above, left = (max(new - old, 0) // 2 for new, old in ((height, rows), (width, columns)))
        full = np.zeros((max(rows, height), max(columns, width), 3), image.dtype)
        full[above : above + rows, left : left + columns] = image
        image, (rows, columns) = full, full.shape[:2]
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return image[top : top + height, left : left + width]


def prepare(
    image: np.ndarray, settings: Settings, size: Sequence[int] | None = None
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
    """Run the test pipeline.

    Args:
        image: `(H, W, 3)` uint8, blue first.
        settings: The content of model.json.
        size: Height and width of the file, where these are fixed: the image is resized to fit.

    Returns:
        `(1, 3, H, W)` float32; height and width without padding; factors of width and height.
    """
    factors = np.ones(2)
    for step in settings['steps']:
        if 'pad' in step:
            image = padded(image, step['pad'])
            continue
        if 'shorter' in step:
            image = shortened(image, step['shorter'])
            continue
        if 'crop' in step:
            image = cropped(image, *step['crop'])
            continue
        how = dict(step['resize'])
        if size is not None and not how.get('multiple'):
            how = {'scale': (size[1], size[0]), 'keep_ratio': how.get('keep_ratio', False)}
            if settings['task'] == 'segmentation':
                how['keep_ratio'] = False
        before = image.shape[:2]
        image = resized(image, how) if not how.get('keep_ratio') else _kept(image, how, size)
        factors = factors * (image.shape[1] / before[1], image.shape[0] / before[0])
    inside = image.shape[:2]
    divisor = settings.get('divisor') or 1
    rows, columns = size or (-(-side // divisor) * divisor for side in inside)
    exact = settings['task'] == 'classification'  # more would be looked at than is tested
    if rows < inside[0] or columns < inside[1] or (exact and (rows, columns) != inside):
        raise PredictError(
            f'an image of {inside[0]} x {inside[1]} pixels does not fit into the file, which '
            f'requires {rows} x {columns}; export with --dynamic all, or another --size.'
        )
    normalize = settings.get('normalize')
    x = image.astype(np.float32)
    if normalize:
        x = x[..., ::-1] if normalize['swap'] else x
        x = (x - np.float32(normalize['mean'])) / np.float32(normalize['std'])
    full = np.full((1, 3, rows, columns), settings.get('pad_value', 0), np.float32)
    full[0, :, : inside[0], : inside[1]] = x.transpose(2, 0, 1)
    return full, (inside[0], inside[1]), (float(factors[0]), float(factors[1]))


def _kept(image: np.ndarray, how: Settings, size: Sequence[int] | None) -> np.ndarray:
    """Resized with its aspect ratio; into a fixed size, not only within its sides as a set."""
    if size is None:
        return resized(image, how)
    height, width = image.shape[:2]
    factor = min(size[0] / height, size[1] / width)
    new = int(width * factor + 0.5), int(height * factor + 0.5)
    return image if new == (width, height) else resize(image, *new)


# --- outputs, as mm finishes them


def finish(
    outputs: Mapping[str, np.ndarray],
    settings: Settings,
    original: tuple[int, int],
    inside: tuple[int, int],
    factors: tuple[float, float],
) -> Result:
    """Results of one image in pixels of the original.

    Args:
        outputs: Of one image, without the batch axis.
        original: Height and width of the image as it was loaded.
        inside: As `prepare` returns it.
        factors: As `prepare` returns them.

    Returns:
        For a detector `boxes (n, 4)`, `scores (n,)`, `labels (n,)` and maybe `masks (n, H, W)`, the
        best first; for a segmentor `classes (H, W)`; for a classifier `probabilities (C,)`.
    """
    if settings['task'] == 'classification':
        logits = outputs['logits'].astype(np.float64)
        powers = np.exp(logits - logits.max())
        return {'probabilities': (powers / powers.sum()).astype(np.float32)}
    if settings['task'] == 'segmentation':
        if 'logits' in outputs:
            logits = outputs['logits']
            classes = logits.argmax(0) if len(logits) > 1 else logits[0] > 0
        else:
            classes = outputs['classes']
        return {'classes': _nearest(classes, original).astype(np.int64)}
    if 'rule' in settings:
        outputs = suppressed(outputs, settings['rule'])
    found = outputs['scores'] > 0
    boxes = outputs['boxes'][found] / np.array([*factors, *factors], np.float32)
    result = {
        'boxes': boxes,
        'scores': outputs['scores'][found],
        'labels': outputs['labels'][found].astype(np.int64),
    }
    if 'masks' in outputs:
        masks, threshold = outputs['masks'][found], settings['mask_threshold']
        if settings['masks'] == 'boxes':
            result['masks'] = paste(masks, boxes, *original, threshold)
        else:
            stride = settings['mask_stride']
            result['masks'] = _image_masks(masks, stride, original, factors, threshold)
    return result


def _nearest(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of classes at another size, for files without the input `out_size`."""
    if classes.shape == size:
        return classes
    rows, columns = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(np.int64)
        for new, old in zip(size, classes.shape)
    )
    return classes[rows[:, None], columns[None]]


def suppressed(outputs: Mapping[str, np.ndarray], rule: Settings) -> dict[str, np.ndarray]:
    """Detections from every box and score of a file without NMS, as mmdet selects them."""
    parts: list[tuple[np.ndarray, ...]] = []
    for level in range(sum(name.startswith('boxes') for name in outputs)):
        boxes, scores = outputs[f'boxes{level}'], outputs[f'scores{level}']
        factors = outputs.get(f'factors{level}')
        if rule['best_class']:
            labels = scores.argmax(1)
            rows = np.arange(len(scores))
            keep = scores[rows, labels] >= rule['score_thr']
            rows, labels = rows[keep], labels[keep]
        else:
            rows, labels = np.nonzero(scores > rule['score_thr'])
            if 0 < rule['nms_pre'] < len(rows):
                order = np.argsort(-scores[rows, labels], kind='stable')[: rule['nms_pre']]
                rows, labels = rows[order], labels[order]
        chosen = scores[rows, labels]
        chosen = chosen if factors is None else chosen * factors[rows]
        parts.append((boxes[rows], chosen, labels))
    boxes, scores, labels = (np.concatenate(part) for part in zip(*parts))
    large = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > rule['min_bbox_size']
    if rule['min_bbox_size'] >= 0:
        boxes, scores, labels = boxes[large], scores[large], labels[large]
    keep = nms(
        boxes,
        scores,
        np.zeros_like(labels) if rule['class_agnostic'] else labels,
        rule['iou_threshold'],
    )[: rule['max_per_img']]
    return {'boxes': boxes[keep], 'scores': scores[keep], 'labels': labels[keep]}


def nms(boxes: np.ndarray, scores: np.ndarray, ids: np.ndarray, threshold: float) -> np.ndarray:
    """Rows that are kept, the best first; boxes of different ids do not suppress each other.

    They are moved apart by their id, with mmcv's rounding.
    """
    if not len(boxes):
        return np.empty(0, np.int64)
    edge = np.maximum(boxes.max() + np.float32(1), np.float32(0))
    x0, y0, x1, y1 = (boxes + (ids.astype(np.float32) * edge)[:, None]).T
    area = (x1 - x0) * (y1 - y0)
    order = np.argsort(-scores, kind='stable')
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        width = np.maximum(np.minimum(x1[first], x1[order]) - np.maximum(x0[first], x0[order]), 0)
        height = np.maximum(np.minimum(y1[first], y1[order]) - np.maximum(y0[first], y0[order]), 0)
        shared = width * height
        order = order[~(shared / (area[first] + area[order] - shared) > threshold)]
    return np.array(kept, np.int64)


def paste(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float
) -> np.ndarray:
    """Masks of boxes `(n, size, size)` as masks of the image `(n, H, W)`: bilinear, as in mmdet."""
    full = np.zeros((len(masks), height, width), bool)
    for out, mask, (x0, y0, x1, y1) in zip(full, masks, boxes.astype(np.float32)):
        left, top = max(int(np.floor(x0)) - 1, 0), max(int(np.floor(y0)) - 1, 0)
        right, bottom = min(int(np.ceil(x1)) + 1, width), min(int(np.ceil(y1)) + 1, height)
        if right <= left or bottom <= top:
            continue
        rows = _sampling(top, bottom, y0, y1, mask.shape[0])
        columns = _sampling(left, right, x0, x1, mask.shape[1])
        out[top:bottom, left:right] = rows @ mask.astype(np.float32) @ columns.T >= threshold
    return full


def _sampling(start: int, stop: int, low: np.float32, high: np.float32, size: int) -> np.ndarray:
    """`(stop - start, size)`: how torch's `grid_sample` weighs a mask's pixels, zero outside."""
    with np.errstate(divide='ignore', invalid='ignore'):
        at = (np.arange(start, stop, dtype=np.float32) + np.float32(0.5) - low) / (high - low)
        at = at * 2 - 1
    at = np.where(np.isinf(at), np.float32(0), at)
    at = (at + 1) * np.float32(size) / 2 - np.float32(0.5)
    at = np.nan_to_num(at, nan=-9)
    floor = np.floor(at)
    part = (at - floor).astype(np.float32)
    weights = np.zeros((len(at), size), np.float32)
    for first, weight in ((floor, 1 - part), (floor + 1, part)):
        place = first.clip(-1, size).astype(np.int64)
        inside = (place >= 0) & (place < size)
        weights[np.nonzero(inside)[0], place[inside]] += weight[inside]
    return weights


def _image_masks(
    logits: np.ndarray,
    stride: int,
    original: tuple[int, int],
    factors: tuple[float, float],
    threshold: float,
) -> np.ndarray:
    """RTMDet-Ins: logits over the image at a stride, to masks of the original."""
    # As mmdet, which swaps the factors of width and height; they are nearly the same.
    rows, columns = (
        _stretching(old, old * stride, factor)[:limit]
        for old, factor, limit in zip(logits.shape[1:], factors, original)
    )
    full = np.zeros((len(logits), *original), bool)
    with np.errstate(divide='ignore'):  # the sigmoid of more than this is above the threshold
        cut = np.log(threshold) - np.log(1 - threshold)
    for out, each in zip(full, logits):
        out[: len(rows), : len(columns)] = rows @ each.astype(np.float32) @ columns.T > cut
    return full


def _stretching(old: int, large: int, factor: float) -> np.ndarray:
    """`(new, old)`: how pixels of the original weigh those of a map, which is enlarged first."""
    return _interpolation(large, int(np.ceil(large * (1 / factor)))) @ _interpolation(old, large)


def _interpolation(old: int, new: int) -> np.ndarray:
    """`(new, old)`: how torch's bilinear `interpolate` weighs pixels, without `align_corners`."""
    at = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), old - 1)
    part = (at - low).astype(np.float32)
    weights = np.zeros((new, old), np.float32)
    weights[np.arange(new), low] = 1 - part
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += part
    return weights


# --- a model


class Model:
    """An exported model; call it with an image.

    Args:
        path: `model.json`, its folder, or one of the files that it lists.
        threads: To compute on; the runtime chooses when None.
        precision: What OpenVINO computes in: 'f32', 'bf16' or 'f16'.
        run: Runs the model in place of the runtime: arrays by name in, arrays by name out.

    Attributes:
        settings: What model.json says.
        classes: Names of the classes.

    Raises:
        PredictError: There is no such model, or its runtime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        precision: str | None = None,
        run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        self.path, self.settings = find_model(Path(path))
        try:
            record, dynamic = self.settings['file'], self.settings['file']['dynamic']
            self.size: Sequence[int] | None = None if 'hw' in dynamic else record['size']
            self.batch = None if 'batch' in dynamic else int(record['batch'])
            self.inputs: Sequence[str] = [str(name) for name in record['inputs']]
            self.classes: Sequence[str] = [str(name) for name in self.settings['classes']]
            _ = self.settings['palette'][0], self.settings['task'], self.settings['steps']
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PredictError(
                f'the model.json of {self.path} is not complete ({error!r}); export again.'
            ) from error
        self.run = run or _open(self.path, threads, precision)

    def __call__(self, image: np.ndarray | str | Path) -> Result:
        """Results of one image, see `finish`.

        Raises:
            PredictError: It is not an image, or does not fit into the file.
        """
        array = image if isinstance(image, np.ndarray) else read_image(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
            raise PredictError(
                f'an image of shape {array.shape} and type {array.dtype} was given; give '
                '(H, W, 3) uint8, blue first, or a path.'
            )
        ready, inside, factors = prepare(array, self.settings, self.size)
        outputs = self.infer(ready, inside, array.shape[:2])
        return finish(outputs, self.settings, array.shape[:2], inside, factors)

    def infer(
        self, ready: np.ndarray, inside: tuple[int, int], original: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """The file's outputs for one prepared image, without the batch axis."""
        batch = self.batch or 1
        values = {
            'image': np.repeat(ready, batch, 0),
            'image_size': np.repeat(np.array([inside], np.float32), batch, 0),
            'out_size': np.array(original, np.int64),
        }
        outputs = self.run({name: values[name] for name in self.inputs})
        return {name: np.asarray(value)[0] for name, value in outputs.items()}


def find_model(path: Path) -> tuple[Path, dict[str, Any]]:
    """A file to run, and its settings.

    Raises:
        PredictError: There is none, or it is not the file that model.json describes.
    """
    folder = path if (path / 'model.json').exists() else path.parent
    try:
        settings = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise PredictError(
            f'{folder / "model.json"} cannot be read ({error}); an export writes it beside its '
            'files.'
        ) from error
    files = settings.get('files') if isinstance(settings, dict) else None
    listing = isinstance(files, list) and all(
        isinstance(f, dict) and isinstance(f.get('path'), str) for f in files
    )
    if not (listing and files and settings.get('schema') == SCHEMA):
        raise PredictError(f'{folder / "model.json"} is not one of schema {SCHEMA}; export again.')
    named = path.name if path.name != 'model.json' and path != folder else None
    files = [f for f in settings['files'] if named in (None, f['path'])]
    runnable = [f for f in files if f['path'].endswith(('.onnx', '_openvino'))] or files
    there = [f for f in runnable if (folder / f['path']).exists()]
    if not there:
        listed = ', '.join(f['path'] for f in settings['files'])
        raise PredictError(f'{path} is not there, or not one of {listed} of model.json.')
    record = there[0]
    file = folder / record['path']
    if folder.resolve() not in file.resolve().parents:
        raise PredictError(f'{file} is not in the folder of its model.json; export again.')
    if digest(file) != record.get('sha256'):
        raise PredictError(f'{file} is not the file that model.json describes; export again.')
    return file, {**settings, 'file': record}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder.

    What was fetched into the folder of a page later, its `runtime`, is not counted.
    """
    total = hashlib.sha256()
    inside = sorted(p for p in path.rglob('*') if p.is_file())
    for file in inside if path.is_dir() else [path]:
        if path.is_dir():
            if file.relative_to(path).parts[0] == 'runtime':
                continue
            total.update(f'{file.relative_to(path)}\n{file.stat().st_size}\n'.encode())
        with file.open('rb') as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _open(
    path: Path, threads: int | None, precision: str | None
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    kind = 'onnxruntime' if path.suffix == '.onnx' else 'openvino'
    if kind == 'openvino' and not (path / 'model.xml').is_file():
        raise PredictError(
            f'{path} is neither ONNX nor OpenVINO; `repnext-mm predict` runs files of PyTorch.'
        )
    try:
        return (_open_onnx if kind == 'onnxruntime' else _open_openvino)(path, threads, precision)
    except ImportError as error:
        raise PredictError(f'{path} needs {kind}: pip install {kind}.') from error


def _open_onnx(path: Path, threads: int | None, precision: str | None) -> Any:
    import onnxruntime

    if precision not in (None, 'f32'):
        raise PredictError(f'precision {precision} is a setting of OpenVINO; {path} is ONNX.')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(names, arrays)))


def _open_openvino(path: Path, threads: int | None, precision: str | None) -> Any:
    import openvino

    options: dict[str, Any] = {'INFERENCE_PRECISION_HINT': precision or 'f32'}
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    core = openvino.Core()
    model = core.read_model(path / 'model.xml')
    names = [output.any_name for output in model.outputs]  # compiling may lose them
    compiled = core.compile_model(model, 'CPU', options)
    return lambda arrays: dict(zip(names, (np.array(value) for value in compiled(arrays).values())))


# --- for people


def draw(image: np.ndarray, result: Result, settings: Settings, threshold: float) -> np.ndarray:
    """A picture of the results on the image, `(H, W, 3)` uint8, blue first."""
    from PIL import Image, ImageDraw

    picture = np.array(image[..., ::-1], np.float32)
    palette = np.array(settings['palette'], np.float32)
    if 'probabilities' in result:
        return _titled(image, as_record(result, settings)['best'])
    if 'classes' in result:
        inside = result['classes'] < len(palette)  # 255 is no class
        picture[inside] = 0.5 * picture[inside] + 0.5 * palette[result['classes'][inside]]
        return np.ascontiguousarray(picture.astype(np.uint8)[..., ::-1])
    shown = [i for i, score in enumerate(result['scores']) if score >= threshold][::-1]
    colors = [palette[label % len(palette)] for label in result['labels']]
    for i in shown:
        if 'masks' in result:
            inside = result['masks'][i]
            picture[inside] = 0.5 * picture[inside] + 0.5 * colors[i]
    canvas = Image.fromarray(picture.astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    line = max(1, round(min(image.shape[:2]) / 250))
    for i in shown:
        x0, y0, x1, y1 = (float(value) for value in result['boxes'][i])
        color = tuple(int(value) for value in colors[i])
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=line)
        text = f'{settings["classes"][result["labels"][i]]} {result["scores"][i]:.2f}'
        left = max(min(x0 + 2, image.shape[1] - pen.textlength(text) - 2), 0)
        place = pen.textbbox((left, max(y0 - 11, 0)), text)
        pen.rectangle((place[0] - 2, place[1] - 1, place[2] + 2, place[3] + 1), fill=color)
        ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
        pen.text((left, max(y0 - 11, 0)), text, fill=ink)
    return np.asarray(canvas)[..., ::-1]


def _titled(image: np.ndarray, best: Sequence[Settings]) -> np.ndarray:
    """The image with its most likely classes in a strip beneath."""
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    lines = [f'{row["score"]:.2f} {row["name"]}' for row in best]
    canvas = Image.new('RGB', (max(width, 160), height + 14 * len(lines) + 6), (255, 255, 255))
    canvas.paste(Image.fromarray(np.ascontiguousarray(image[..., ::-1])), (0, 0))
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((4, height + 3 + 14 * number), line, fill=(0, 0, 0))
    return np.asarray(canvas)[..., ::-1]


def as_record(result: Result, settings: Settings, threshold: float = 0.0) -> dict[str, Any]:
    """Results as JSON values: run lengths of COCO, numbers of pixels, the most likely classes."""
    names = settings['classes']
    if 'probabilities' in result:
        scores = result['probabilities']
        order = np.argsort(-scores, kind='stable')[:MOST_LIKELY]
        rows = [{'label': int(i), 'name': names[i], 'score': float(scores[i])} for i in order]
        return {'best': [{**row, 'score': round(row['score'], 6)} for row in rows]}
    if 'classes' in result:
        labels, counts = np.unique(result['classes'], return_counts=True)
        pixels = {str(names[label]): int(n) for label, n in zip(labels, counts)}
        return {'pixels': pixels}
    found = []
    for i, (box, score, label) in enumerate(
        zip(result['boxes'], result['scores'], result['labels'])
    ):
        if score < threshold:
            continue
        row: dict[str, Any] = {
            'label': int(label),
            'name': names[label],
            'score': round(float(score), 6),
            'box': [round(float(value), 3) for value in box],
        }
        if 'masks' in result:
            row['mask'] = run_lengths(result['masks'][i])
        found.append(row)
    return {'detections': found}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed encoding: lengths of runs, by column, of 0 first."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    counts = [int(n) for n in np.diff(ends)]
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def _save(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.stem}.partial{path.suffix}')
    try:
        Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the images and what is done with them."""
    add: Any = parser.add_argument
    add('images', nargs='+', help='images, or folders of images')
    add('--out', type=Path, help='picture with the results; a folder for several images')
    add('--json', action='store_true', help='print the results as JSON')
    add('--threshold', type=float, default=0.3, help='least score that is drawn (default 0.3)')
    add('--threads', type=int, help="to compute on (default: the runtime's)")
    add('--precision', choices=('f32', 'bf16', 'f16'), help='of OpenVINO')


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where an image could not be read."""
    parser = argparse.ArgumentParser(description='Run an exported model on images.')
    here = str(Path(__file__).parent)
    parser.add_argument('--model', default=here, help='model.json, its folder, or a file')
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        model = Model(args.model, args.threads, args.precision)
        return predict_all(model, args.images, args.out, args.json, args.threshold)
    except (PredictError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def predict_all(
    model: Model, given: Sequence[str], out: Path | None, as_json: bool, threshold: float
) -> int:
    """Predict, print and draw; images that cannot be read are named, and the result is 1."""
    paths = [p for name in given for p in listed(Path(name))]
    many = len(paths) > 1 or (out is not None and not out.suffix)
    if out is not None and not many and out.suffix.lower() not in IMAGES:
        raise PredictError(f'--out {out} is no name of a picture; give one such as drawn.png.')
    if out is not None and out.exists() and any(out.samefile(p) for p in paths if p.exists()):
        raise PredictError(f'--out {out} is one of the images; give another name.')
    records, failed, written = [], 0, set[str]()
    for path in paths:
        try:
            image = read_image(path)
            result = model(image)
        except PredictError as error:
            print(f'skipped: {error}', file=sys.stderr)
            failed += 1
            continue
        height, width = image.shape[:2]
        facts = {'file': str(path), 'width': width, 'height': height}
        records.append({**facts, **as_record(result, model.settings)})
        if out is not None:
            name = path.name  # of several images of one name, the further ones are numbered
            while many and name in written:
                name = f'{len(written)}_{path.name}'
            written.add(name)
            target = out / f'{name}.png' if many else out
            _save(draw(image, result, model.settings, threshold), target)
        if not as_json:
            shown = as_record(result, model.settings, threshold)
            if 'best' in shown:
                rows = [f'{row["name"]} {row["score"]:.2f}' for row in shown['best']]
            elif 'detections' in shown:
                rows = [f'{row["name"]} {row["score"]:.2f}' for row in shown['detections']]
            else:
                rows = [f'{name} {n / (width * height):.0%}' for name, n in shown['pixels'].items()]
            print(f'{path}: {", ".join(rows) or "nothing found"}')
    if as_json:
        print(json.dumps(records))
    return 1 if failed or not paths else 0


def listed(path: Path) -> list[Path]:
    """The images in a folder, or the one image."""
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
    return [path]


if __name__ == '__main__':
    sys.exit(main())

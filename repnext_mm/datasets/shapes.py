"""Shapes: a sample data set that is generated, so that training can be tried without a download.

Each scene is a textured ground under a sky, with shapes in front. Shapes differ in size, stretch,
rotation, colour and texture, hide each other, leave the frame and cast shadows. Their class is
their outline; their hue hints at it, as it does in nature, which lets a network learn in minutes.
Now and then a crowd of tiny shapes is annotated as one region (``iscrowd``), as in COCO. The same
scenes are written three times::

    root/shapes.json                                      the generator, its version and parameters
    root/coco/{train2017,val2017}/000000000001.jpg        COCO layout
    root/coco/annotations/instances_{train,val}2017.json
    root/ade/images/{training,validation}/*.jpg           ADE20K layout
    root/ade/annotations/{training,validation}/*.png      0 = void, then CLASSES from 1
    root/imagenet/{train,val}/CLASS/*.jpg                 ImageNet layout, a crop for each thing

Masks hold visible pixels only, and boxes and areas follow from the masks. Instance masks are
run-length encoded, because a ring or a half-hidden shape is no single polygon. Label maps are meant
for ``reduce_zero_label=True``, as ADE20K's: 0 marks the blurred line of the horizon.
"""

from __future__ import annotations

import colorsys
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image

# Raise it whenever the same parameters would give other files: `ensure` then renews old folders.
VERSION = 2
MARKER = 'shapes.json'
GENERATOR = 'repnext_mm.datasets.shapes'
Track = Callable[[Iterable[int], str], Iterable[int]]

JPEG_QUALITY = 92
CROP = 72  # side of a classifier's image; training takes 64 of them
MIN_VISIBLE = 0.4  # share of a shape's pixels that later shapes must leave visible
HUE_SPREAD = 0.06  # of a class, as standard deviation; classes are 0.2 apart
MIN_AREA = 0.0016  # smallest visible area, as a share of the image's: 26 pixels of 128 x 128


class ShapesError(ValueError):
    """The sample data set cannot be made as asked; the message is one sentence for the user."""


# --- outlines: signed distance in shape units, negative inside; `form` in [0, 1) varies the outline


def _disc(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    return np.hypot(u, v) - 0.9


def _ring(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    half_width = 0.18 + 0.08 * form
    return np.abs(np.hypot(u, v) - (0.95 - half_width)) - half_width


def _square(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    angles = np.deg2rad((90, 210, 330))
    return np.max([np.cos(a) * u + np.sin(a) * v for a in angles], axis=0) - 0.55


def _star(u: np.ndarray, v: np.ndarray, form: float) -> np.ndarray:
    points, inner = 5, 0.38 + 0.1 * form
    # Fold the plane onto half a point: one edge, from the tip (1, 0) to the notch, is left.
    sector = 2 * np.pi / points
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    edge_u, edge_v = inner * np.cos(sector / 2) - 1, inner * np.sin(sector / 2)
    distance = (radius * np.cos(angle) - 1) * edge_v - radius * np.sin(angle) * edge_u
    return distance / np.hypot(edge_u, edge_v)


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'disc': _disc,
    'ring': _ring,
    'square': _square,
    'triangle': _triangle,
    'star': _star,
}
THINGS = tuple(OUTLINES)
STUFF = ('sky', 'ground')
CLASSES = THINGS + STUFF  # label maps; detection has THINGS only

# --- fills: how much of a shape's second colour shows, in shape units

FILLS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'plain': lambda u, v, pitch: np.zeros_like(u),
    'gradient': lambda u, v, pitch: u / 2 + 0.5,
    'stripes': lambda u, v, pitch: 2 * np.sin(pitch * u) + 0.5,
    'checks': lambda u, v, pitch: 4 * np.sin(pitch * u) * np.sin(pitch * v) + 0.5,
    'dots': lambda u, v, pitch: 2 * np.sin(pitch * u) * np.sin(pitch * v) - 0.5,
}


@dataclass(frozen=True)
class Spec:
    """What to generate: ``train`` and ``val`` images of ``size`` x ``size`` pixels."""

    train: int = 1000
    val: int = 100
    size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            'train': (1, 999_999),
            'val': (1, 999_999),
            'size': (64, 2048),
            'seed': (0, 2**63),
        }
        for name, (low, high) in allowed.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ShapesError(
                    f'{name} must be a whole number from {low} to {high}, not {value!r}.'
                )


@dataclass
class Instance:
    """A thing of a scene: ``label`` indexes THINGS, ``mask`` (H, W) is what shows of it."""

    label: int
    mask: np.ndarray
    crowd: bool = False


@dataclass
class Scene:
    """An RGB ``image`` (H, W, 3) uint8, its ``labels`` (H, W) uint8 and its ``instances``."""

    image: np.ndarray
    labels: np.ndarray
    instances: list[Instance] = field(default_factory=list)


# --- scenes


def _noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 1) -> np.ndarray:
    """Smooth noise in [0, 1], (size, size): random values at the corners of cells x cells.

    Each further octave halves the cells.
    """
    total = np.zeros((size, size))
    weight_sum = 0.0
    for octave in range(octaves):
        count, weight = cells << octave, 0.6**octave
        grid = rng.random((count + 1, count + 1))
        at = np.arange(size) * (count / size)
        low = at.astype(int)
        mix = at - low
        mix = mix * mix * (3 - 2 * mix)
        rows = grid[low] * (1 - mix)[:, None] + grid[low + 1] * mix[:, None]
        total += weight * (rows[:, low] * (1 - mix) + rows[:, low + 1] * mix)
        weight_sum += weight
    return total / weight_sum


def _colour(
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
    hue: float | None = None,
) -> np.ndarray:
    hue = rng.random() if hue is None else hue % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value)))


def _blend(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None]
    return under * (1 - alpha) + over * alpha


def _backdrop(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sky over ground: RGB in [0, 1], (size, size, 3), and the label map with the horizon void."""
    y, x = np.mgrid[:size, :size] / size
    cells = int(rng.integers(2, 5))
    sky = _blend(
        _blend(_colour(rng, (0.1, 0.5), (0.5, 0.9)), _colour(rng, (0.0, 0.3), (0.7, 1.0)), y),
        np.ones(3),
        np.clip(2.5 * _noise(rng, size, cells, 3) - 1.2, 0, 0.7),
    )
    relief = _noise(rng, size, int(rng.integers(6, 20)), 3)
    if rng.random() < 0.5:  # furrows that run to the horizon
        pitch, slope = rng.uniform(20, 60), rng.uniform(-1, 1)
        relief = 0.6 * relief + 0.4 * (0.5 + 0.5 * np.sin(pitch * (x + slope * y) + 4 * relief))
    ground = _blend(
        _colour(rng, (0.1, 0.5), (0.2, 0.5)),
        _colour(rng, (0.1, 0.4), (0.4, 0.8)),
        np.clip(2 * relief - 0.5, 0, 1),
    )
    horizon = rng.uniform(0.15, 0.6) + rng.uniform(0, 0.2) * (_noise(rng, size, 3)[0] - 0.5)
    below = (y - horizon) * size  # pixels
    labels = np.where(below > 0, CLASSES.index('ground') + 1, CLASSES.index('sky') + 1)
    labels[np.abs(below) < max(1.0, size / 128)] = 0
    return _blend(sky, ground, np.clip(below / 2 + 0.5, 0, 1)), labels.astype(np.uint8)


class _Painter:
    """Paints shapes back to front and keeps, for every pixel, the instance that shows there."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.image, self.labels = _backdrop(rng, size)
        self.owner = np.full((size, size), -1)
        self.areas: list[int] = []  # pixels of each instance before others hid it
        self.classes: list[int] = []
        self.crowds: list[bool] = []
        self.grain = 0.85 + 0.3 * _noise(rng, size, size // 5, 2)
        angle = rng.uniform(0, 2 * np.pi)
        self.light = (np.cos(angle), np.sin(angle))

    def paint(
        self, image: np.ndarray, mask: np.ndarray, label: int, centre: np.ndarray, radius: float
    ) -> None:
        """Paint one shape and its shadow into ``image`` and its pixels into ``mask``."""
        rng = self.rng
        # What a shape and its shadow can reach: stretch 1.2, corners at 1.13, shadow 0.3 further.
        low = np.maximum(centre - 1.8 * radius - 3, 0).astype(int)
        high = np.maximum(centre + 1.8 * radius + 3, 0).astype(int)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        rows, columns = mask[window].shape
        y, x = np.mgrid[:rows, :columns] + 0.5
        x, y = x + low[0] - centre[0], y + low[1] - centre[1]

        form, angle = rng.random(), rng.uniform(0, 2 * np.pi)
        stretch = np.exp(rng.uniform(-0.18, 0.18))
        scales = (radius * stretch, radius / stretch)
        outline = OUTLINES[THINGS[label]]

        def turned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return (
                (np.cos(angle) * x + np.sin(angle) * y) / scales[0],
                (np.cos(angle) * y - np.sin(angle) * x) / scales[1],
            )

        u, v = turned(x, y)
        distance = outline(u, v, form) * min(scales)  # pixels
        coverage = np.clip(0.5 - distance, 0, 1)

        offset = rng.uniform(0.1, 0.3) * radius
        shifted = turned(x + offset * self.light[0], y + offset * self.light[1])
        softness = 1 + 0.15 * radius
        shadow = np.clip(0.5 - outline(*shifted, form) * min(scales) / softness, 0, 1)

        hue = label / len(THINGS) + rng.normal(0, HUE_SPREAD)
        first = _colour(rng, (0.5, 1.0), (0.45, 1.0), hue)
        second = _colour(rng, (0.3, 1.0), (0.25, 1.0), hue + rng.normal(0, HUE_SPREAD))
        fill = FILLS[str(rng.choice(list(FILLS)))]
        rgb = _blend(first, second, np.clip(fill(u, v, rng.uniform(4, 11)), 0, 1))
        lit = np.clip((x * self.light[0] + y * self.light[1]) / radius, -1, 1)
        shade = self.grain[window] * (1 + rng.uniform(0, 0.35) * lit)
        if rng.random() < 0.4:  # a darker rim
            shade = np.where(distance > -max(1.0, 0.08 * radius), 0.55 * shade, shade)
        under = image[window] * (1 - 0.45 * shadow)[..., None]
        image[window] = _blend(under, rgb * shade[..., None], coverage)
        mask[window] |= coverage > 0.5

    def add(self, label: int, shapes: list[tuple[np.ndarray, float]], crowd: bool = False) -> bool:
        """Paint the shapes, (centre, radius) each in pixels, as one instance.

        Return False, with nothing painted, if too little of it or of another would show.
        """
        image, mask = self.image.copy(), np.zeros(self.owner.shape, bool)
        for centre, radius in shapes:
            self.paint(image, mask, label, centre, radius)
        owner = np.where(mask, len(self.areas), self.owner)
        areas = [*self.areas, int(mask.sum())]
        visible = np.bincount(owner[owner >= 0], minlength=len(areas))
        if np.any(visible < np.maximum(MIN_VISIBLE * np.array(areas), MIN_AREA * mask.size)):
            return False
        self.image, self.owner, self.areas = image, owner, areas
        self.classes.append(label)
        self.crowds.append(crowd)
        return True

    def scene(self) -> Scene:
        image = self.image * self.rng.uniform(0.85, 1.1) + self.rng.normal(
            0, 0.012, self.image.shape
        )
        labels = self.labels.copy()
        instances = []
        for index, (label, crowd) in enumerate(zip(self.classes, self.crowds, strict=True)):
            mask = self.owner == index
            labels[mask] = label + 1
            instances.append(Instance(label, mask, crowd))
        return Scene((np.clip(image, 0, 1) * 255).round().astype(np.uint8), labels, instances)


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels; equal generators give equal scenes."""
    painter = _Painter(rng, size)
    if rng.random() < 0.04:
        middle = rng.uniform(0.2, 0.8, 2)
        swarm = [
            ((middle + rng.normal(0, 0.07, 2)) * size, rng.uniform(0.018, 0.03) * size)
            for _ in range(int(rng.integers(9, 15)))
        ]
        painter.add(int(rng.integers(len(THINGS))), swarm, crowd=True)
    wanted = 0 if rng.random() < 0.02 else int(rng.integers(1, 6))
    centres: list[np.ndarray] = []
    for _ in range(3 * wanted):  # a shape that would hide another is given up
        if len(centres) == wanted:
            break
        radius = np.exp(rng.uniform(np.log(0.11), np.log(0.3))) * size
        centre = rng.uniform(0.05, 0.95, 2) * size
        if centres and rng.random() < 0.4:  # close to another one, to hide a part of it
            angle = rng.uniform(0, 2 * np.pi)
            near = centres[int(rng.integers(len(centres)))]
            centre = np.clip(near + radius * np.array((np.cos(angle), np.sin(angle))), 0, size)
        if painter.add(int(rng.integers(len(THINGS))), [(centre, radius)]):
            centres.append(centre)
    return painter.scene()


# --- files

SPLITS = {  # ours: COCO's folder, ADE20K's folder
    'train': ('train2017', 'training'),
    'val': ('val2017', 'validation'),
}


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's run lengths of a mask (H, W): column by column, zeros first, not compressed."""
    flat = mask.ravel(order='F')
    starts = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], starts, [flat.size]))).tolist()
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def _annotation(instance: Instance) -> dict:
    rows, columns = (np.flatnonzero(instance.mask.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return {
        'category_id': instance.label + 1,
        'segmentation': encode_rle(instance.mask),
        'area': int(instance.mask.sum()),
        'bbox': [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        'iscrowd': int(instance.crowd),
    }


def _crop(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A square around a thing, 1.4 times its size and CROP pixels wide, for classifiers."""
    height, width = image.shape[:2]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    y, x = ((side[0] + side[-1] + 1) / 2 for side in (rows, columns))
    half = 0.7 * max(len(rows), len(columns)) + 2
    box = (max(x - half, 0), max(y - half, 0), min(x + half, width), min(y + half, height))
    cropped = Image.fromarray(image).crop(tuple(round(value) for value in box))
    return cropped.resize((CROP, CROP), Image.Resampling.BICUBIC)


def _encode(array: np.ndarray | Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _write_split(root: Path, spec: Spec, split: str, first_id: int, numbers: Iterable[int]) -> None:
    coco_name, ade_name = SPLITS[split]
    coco_images = root / 'coco' / coco_name
    ade_images, ade_labels = (root / 'ade' / kind / ade_name for kind in ('images', 'annotations'))
    crops = [root / 'imagenet' / split / name for name in THINGS]
    for folder in (coco_images, ade_images, ade_labels, *crops):
        folder.mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in numbers:
        # One stream per image: a scene does not depend on how many are made.
        scene = draw_scene(
            np.random.default_rng((spec.seed, list(SPLITS).index(split), number)), spec.size
        )
        image_id = first_id + number
        jpeg = _encode(scene.image, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
        (coco_images / f'{image_id:012d}.jpg').write_bytes(jpeg)
        stem = f'ADE_{split}_{number + 1:08d}'
        (ade_images / f'{stem}.jpg').write_bytes(jpeg)
        (ade_labels / f'{stem}.png').write_bytes(_encode(scene.labels, 'PNG'))
        images.append(
            {
                'id': image_id,
                'file_name': f'{image_id:012d}.jpg',
                'width': spec.size,
                'height': spec.size,
            }
        )
        for instance in scene.instances:
            annotation = {'id': len(annotations) + 1, 'image_id': image_id, **_annotation(instance)}
            annotations.append(annotation)
            if not instance.crowd:
                jpeg = _encode(_crop(scene.image, instance.mask), 'JPEG', quality=JPEG_QUALITY)
                name = f'{split}_{annotation["id"]:08d}.jpg'
                (crops[instance.label] / name).write_bytes(jpeg)
    content = {
        'info': {
            'description': 'Shapes, a generated sample data set',
            'version': str(VERSION),
            **asdict(spec),
        },
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(THINGS, 1)
        ],
    }
    folder = root / 'coco' / 'annotations'
    folder.mkdir(exist_ok=True)
    (folder / f'instances_{coco_name}.json').write_text(json.dumps(content))


def _marker(spec: Spec) -> dict:
    return {'generator': GENERATOR, 'version': VERSION, **asdict(spec)}


def read_marker(root: str | os.PathLike) -> Spec | None:
    """Return the parameters of the data set at ``root``; None if it is absent, damaged or outdated.

    Raises ShapesError if ``root`` is something else: a file, or a folder not made by this module.
    """
    spec, usable = _inspect(Path(root))
    return spec if usable else None


def _inspect(root: Path) -> tuple[Spec | None, bool]:
    """The parameters that the marker of ``root`` names, if any, and whether all files are there."""
    if not root.exists():
        return None, False
    if not root.is_dir():
        raise ShapesError(
            f'{root} is a file, so the sample data set cannot go there; give another folder.'
        )
    if not any(root.iterdir()):
        return None, False
    try:
        marker = json.loads((root / MARKER).read_text())
        ours = marker['generator'] == GENERATOR
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ShapesError(
            f'{root} is not a sample data set (it has no {MARKER} of ours) and is left as it is; '
            'give another folder, or move this one away.'
        )
    try:
        spec = Spec(**{f.name: marker[f.name] for f in fields(Spec)})
    except (KeyError, ShapesError):
        return None, False
    return spec, marker == _marker(spec) and _is_whole(root, spec)


def _is_whole(root: Path, spec: Spec) -> bool:
    counts = {}
    for split, (coco_name, ade_name) in SPLITS.items():
        if not (root / 'coco' / 'annotations' / f'instances_{coco_name}.json').is_file():
            return False
        counts[root / 'coco' / coco_name] = getattr(spec, split)
        counts[root / 'ade' / 'images' / ade_name] = getattr(spec, split)
        counts[root / 'ade' / 'annotations' / ade_name] = getattr(spec, split)
    crops = [root / 'imagenet' / split / name for split in SPLITS for name in THINGS]
    return all(folder.is_dir() for folder in crops) and all(
        folder.is_dir() and len(os.listdir(folder)) == count for folder, count in counts.items()
    )


def generate(root: str | os.PathLike, spec: Spec | None = None, track: Track | None = None) -> Path:
    """Write the data set to ``root`` and return ``root``; an earlier one there is replaced.

    The folder is complete or not there at all. ``track(numbers, description)`` may wrap the loop
    over the images to show progress, like ``rich.progress.track``.

    Raises ShapesError if ``root`` cannot be written or holds anything else.
    """
    root, spec = Path(root), spec or Spec()
    _inspect(root)  # refuses a folder that is not ours
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Beside `root`, for the rename that ends the work must not cross file systems.
        scratch = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    except OSError as error:
        raise ShapesError(
            f'The sample data set cannot be written to {root} ({error.strerror}); '
            'give a folder that you may write to.'
        ) from error
    try:
        new, old = scratch / 'new', scratch / 'old'
        for split in SPLITS:
            numbers: Iterable[int] = range(getattr(spec, split))
            if track is not None:
                numbers = track(numbers, f'Drawing {split} images')
            # Image ids differ between the splits, as COCO's do.
            _write_split(
                new,
                spec,
                split,
                first_id=1 if split == 'train' else 1 + spec.train,
                numbers=numbers,
            )
        (new / MARKER).write_text(json.dumps(_marker(spec), indent=2) + '\n')
        if root.exists():
            root.rename(old)
        try:
            new.rename(root)
        except OSError:
            # Another process (a rank of a distributed run, say) was faster: its files are as good.
            if read_marker(root) != spec:
                if old.exists() and not root.exists():
                    old.rename(root)
                raise
    except OSError as error:
        raise ShapesError(
            f'The sample data set cannot be written to {root} ({error.strerror}).'
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def ensure(root: str | os.PathLike, spec: Spec | None = None, track: Track | None = None) -> Path:
    """Generate the data set unless ``root`` has it, complete, of this VERSION and as ``spec`` says.

    Without ``spec``, the parameters of what is there stay, and are the default ones if nothing is.
    Raises ShapesError as `generate` does.
    """
    found, usable = _inspect(Path(root))
    if not usable or (spec is not None and found != spec):
        generate(root, spec or found, track)
    return Path(root)

"""Images to calibrate int8 on: from a folder, or from the data set of an mmdet or mmseg config."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..configs import is_config_name
from ..datasets.images import IMAGE_SUFFIXES, describe, is_dark, read_image
from ..normalization import IMAGENET_MEAN, IMAGENET_STD
from .errors import UsageError
from .exporters import Preprocess

#: Fewer images are refused, and below the second number there is a warning: ranges of activations
#: are then those of single images.
MIN_IMAGES, ENOUGH_IMAGES = 16, 128
#: What most configs of mm do to an image, which they load as BGR.
IMAGENET = Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD, swap=True)
#: For an artifact that normalises by itself.
RAW = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), swap=False)
#: Correlation of neighbouring pixels: above 0.8 in photographs and drawings, 0 in noise.
LEAST_CORRELATION = 0.5


class CalibrationImages(Sequence[np.ndarray]):
    """Images as a backbone requires them, `(1, 3, H, W)` float32 each, read when asked for.

    Args:
        size: H and W; images are scaled to cover it and cropped at the centre.
        preprocess: Applied to the images as OpenCV loads them, BGR from 0 to 255.
        limit: At most so many images, chosen at random, but the same ones each time.
        count: How many there are.
    """

    def __init__(
        self, size: tuple[int, int], preprocess: Preprocess, limit: int | None, count: int
    ) -> None:
        self.size = size
        self.preprocess = preprocess
        order = list(range(count))
        random.Random(0).shuffle(order)
        self.order = order[:limit]

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Image number `index` as loaded, `(3, h, w)` of any size, BGR from 0 to 255."""

    def notes(self) -> list[str]:
        """What a user should know about the images, in sentences."""
        return []

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = cover(self.load(self.order[index]).float()[None], self.size)
        return self.preprocess.apply(image).numpy()


class FolderImages(CalibrationImages):
    """Images below a folder."""

    def __init__(self, folder: Path, size: Any, preprocess: Any, limit: Any) -> None:
        self.folder = folder
        files = sorted(p for p in folder.rglob('*') if p.is_file())
        self.files = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        self.left_out = [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES]
        super().__init__(size, preprocess, limit, len(self.files))

    def load(self, index: int) -> Tensor:
        try:
            pixels = read_image(self.files[index])
        except (OSError, ValueError) as error:
            raise UsageError(
                f'calibration: {str(error).rstrip(".")}, as mm could not read it either.'
            ) from error
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def notes(self) -> list[str]:
        """Files that are left out, and images that mm reads as nearly black."""
        notes = []
        if self.left_out:
            suffixes = sorted({path.suffix or path.name for path in self.left_out})
            notes.append(
                f'{len(self.left_out)} of {len(self.left_out) + len(self.files)} files in '
                f'{self.folder} are left out for their suffix ({", ".join(suffixes[:5])}); images '
                f'end in {", ".join(IMAGE_SUFFIXES)}.'
            )
        dark = [p for p in (self.files[i] for i in self.order) if _reads_dark(p)]
        if dark:
            notes.append(
                f'{len(dark)} of {len(self.order)} calibration images have 16 bits of which the '
                f'upper ones are empty, so mm reads them as nearly black, the first is {dark[0]}; '
                'scale their values to the full range.'
            )
        return notes


class DatasetImages(CalibrationImages):
    """Images of a config's training data (test data without), through its test pipeline."""

    def __init__(self, dataset: Any, size: Any, preprocess: Any, limit: Any) -> None:
        self.dataset = dataset
        super().__init__(size, preprocess, limit, len(dataset))

    def load(self, index: int) -> Tensor:
        from mmengine.registry import DefaultScope

        with DefaultScope.overwrite_default_scope(self.dataset.scope):
            inputs = self.dataset[index]['inputs']
        return inputs[0] if isinstance(inputs, list) else inputs  # several under test-time changes


def calibration_images(
    source: str | Path,
    size: tuple[int, int],
    preprocess: Preprocess | None = None,
    limit: int | None = ENOUGH_IMAGES,
    options: Mapping[str, Any] | None = None,
) -> CalibrationImages:
    """The images of a folder, or of the data set of a config.

    Args:
        source: A folder, searched in depth, or a config.
        size: H and W that the artifact requires.
        preprocess: None is the config's `data_preprocessor`, and for a folder `IMAGENET`.
        limit: At most so many.
        options: Settings of the config to override, as `--cfg-options` does.

    Raises:
        UsageError: There is no such source, or it has fewer than `MIN_IMAGES` images.
        UserError: The config or its data cannot be read.
    """
    path = Path(source)
    images: CalibrationImages
    if not path.is_dir() and is_config_name(str(path)):
        dataset, own = _dataset(path, options or {})
        images = DatasetImages(dataset, size, preprocess or own, limit)
    elif path.is_dir():
        images = FolderImages(path, size, preprocess or IMAGENET, limit)
    else:
        raise UsageError(
            f'--calib {source} is neither a folder of images nor a config; int8 is '
            'calibrated on images like those it will see, never on random numbers.'
        )
    check_count(len(images), str(source))
    return images


def check_count(count: int, source: str) -> None:
    """Raise UsageError for too few images."""
    if count < MIN_IMAGES:
        raise UsageError(
            f'{source} has {count} images for calibration; give at least {MIN_IMAGES}, better '
            f'{ENOUGH_IMAGES} or more.'
        )


def _reads_dark(path: Path) -> bool:
    try:
        return is_dark(describe(path), read_image(path))
    except (OSError, ValueError):
        return False  # reading it for calibration says what is wrong


def check_pictures(images: Sequence[np.ndarray]) -> None:
    """Refuse noise and blank images.

    Raises:
        UsageError: Neighbouring pixels have nothing to do with each other.
    """
    correlations = []
    for image in images:
        pairs = image[..., :-1].ravel(), image[..., 1:].ravel()
        flat = min(pair.std() for pair in pairs) == 0
        correlations.append(0.0 if flat else float(np.corrcoef(*pairs)[0, 1]))
    if np.median(correlations) < LEAST_CORRELATION:
        raise UsageError(
            'the calibration images are noise or blank (correlation of neighbouring pixels '
            f'{np.median(correlations):.2f}, in pictures above {LEAST_CORRELATION}); random '
            'calibration data is refused, for its ranges are not those of real images.'
        )


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`(N, 3, h, w)` scaled, with its shape kept, until it covers `size`, and cropped to it."""
    height, width = image.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        scaled = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        image = F.interpolate(image, scaled, mode='bilinear', antialias=True)
    top, left = (image.shape[2] - size[0]) // 2, (image.shape[3] - size[1]) // 2
    return image[:, :, top : top + size[0], left : left + size[1]]


def _dataset(path: Path, options: Mapping[str, Any]) -> tuple[Any, Preprocess]:
    """The data set of a config that is calibrated on, and what is done to its images."""
    from mmengine.registry import DATASETS, DefaultScope

    from ..engine.cli import import_framework
    from ..engine.config_file import load_config
    from ..engine.preflight import check_sources, require

    cfg = load_config(str(path), dict(options), None, 'none')
    scope = cfg.get('default_scope') or 'mmengine'
    import_framework(cfg.get('default_scope'))
    loaders = {split: cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')}
    # What the metric is measured on is better not calibrated on as well.
    split = next((name for name, loader in loaders.items() if loader), None)
    seen = next((loaders[name] for name in ('test', 'val', 'train') if loaders[name]), None)
    if split is None or seen is None:
        raise UsageError(f'{path} has no data set to calibrate on; give a folder of images.')
    require(check_sources(cfg, (split,)).findings)
    settings = _innermost(loaders[split].dataset)
    settings.update(pipeline=_innermost(seen.dataset).pipeline, test_mode=True)
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build(settings)
    dataset.scope = scope
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    return dataset, Preprocess.of(preprocessor) or RAW


def _innermost(settings: Any) -> Any:
    """The first data set inside wrappers such as RepeatDataset and ConcatDataset."""
    while 'dataset' in settings or 'datasets' in settings:
        settings = settings.get('dataset') or settings.datasets[0]
    return settings

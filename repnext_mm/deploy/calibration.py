"""Images to calibrate int8 on: from a folder, or from the data set of an mmdet or mmseg config."""

from __future__ import annotations

import os
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..configs import is_config_name
from ..datasets.images import IMAGE_SUFFIXES, image_loader, read_image, unused_depth
from ..normalization import IMAGENET_MEAN, IMAGENET_STD
from .errors import UsageError
from .targets import Preprocess

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
        loader: The config of the transform that loads them; mm's default where None.

    Attributes:
        left_out: What the source has besides and is not used, as a sentence; '' for nothing.
    """

    left_out = ''

    def __init__(
        self,
        size: tuple[int, int],
        preprocess: Preprocess,
        limit: int | None,
        count: int,
        loader: Mapping[str, Any] | None,
    ) -> None:
        self.size = size
        self.preprocess = preprocess
        self.loader = loader
        order = list(range(count))
        random.Random(0).shuffle(order)
        self.order = order[:limit]

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Image number `index` as loaded, `(3, h, w)` of any size, BGR from 0 to 255."""

    @abstractmethod
    def file(self, index: int) -> Path:
        """Where it is from."""

    def warnings(self) -> list[str]:
        """What to say before they are used."""
        files = [file for file in map(self.file, self.order) if file.is_file()]
        keeps_depth = (self.loader or {}).get('color_type') == 'unchanged'
        dark = None if keeps_depth else unused_depth(files)
        return [*filter(None, (self.left_out, dark))]

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

    def __init__(
        self, folder: Path, size: Any, preprocess: Any, limit: Any, loader: Any = None
    ) -> None:
        files = sorted(_files(folder))
        self.files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if others := Counter(f.suffix or 'none' for f in files if f not in {*self.files}):
            shown = ', '.join(f'{suffix} ({count})' for suffix, count in others.most_common(5))
            self.left_out = (
                f'{others.total()} of {len(files)} files in {folder} are left out for their '
                f'suffix: {shown}; images are {", ".join(IMAGE_SUFFIXES)}'
            )
        super().__init__(size, preprocess, limit, len(self.files), loader)

    def load(self, index: int) -> Tensor:
        return load_picture(self.files[index], self.loader)

    def file(self, index: int) -> Path:
        return self.files[index]


class DatasetImages(CalibrationImages):
    """Images of a config's training data (test data without), through its test pipeline."""

    def __init__(self, dataset: Any, size: Any, preprocess: Any, limit: Any, loader: Any) -> None:
        self.dataset = dataset
        super().__init__(size, preprocess, limit, len(dataset), loader)

    def load(self, index: int) -> Tensor:
        from mmengine.registry import DefaultScope

        try:
            with DefaultScope.overwrite_default_scope(self.dataset.scope):
                inputs = self.dataset[index]['inputs']
        except AssertionError as error:  # of mm's loader
            raise UsageError(
                f'the calibration image {self.file(index)} cannot be decoded ({error}); replace '
                'or remove it.'
            ) from error
        return inputs[0] if isinstance(inputs, list) else inputs  # several under test-time changes

    def file(self, index: int) -> Path:
        return Path(self.dataset.get_data_info(index)['img_path'])


def load_picture(path: Path, loader: Mapping[str, Any] | None = None) -> Tensor:
    """An image file as mm loads it, `(3, h, w)`, BGR from 0 to 255.

    Raises:
        UsageError: mm cannot decode it, or it has not three channels then.
    """
    try:
        pixels = read_image(path, loader)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UsageError(
            f'{path} is loaded as {pixels.shape} by {dict(loader or {})}, and a backbone requires '
            'three channels; replace the image, or correct color_type.'
        )
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


def calibration_images(
    source: str | Path,
    size: tuple[int, int],
    preprocess: Preprocess | None = None,
    limit: int | None = ENOUGH_IMAGES,
    options: Mapping[str, Any] | None = None,
    loader: Mapping[str, Any] | None = None,
) -> CalibrationImages:
    """The images of a folder, or of the data set of a config.

    Args:
        source: A folder, searched in depth, or a config.
        size: H and W that the artifact requires.
        preprocess: None is the config's `data_preprocessor`, and for a folder `IMAGENET`.
        limit: At most so many.
        options: Settings of the config to override, as `--cfg-options` does.
        loader: How the images of a folder are loaded: the config of mm's `LoadImageFromFile`, its
            default where None. Those of a data set are loaded by its own pipeline.

    Raises:
        UsageError: There is no such source, or it has fewer than `MIN_IMAGES` images.
        UserError: The config or its data cannot be read.
    """
    path = Path(source)
    images: CalibrationImages
    if not path.is_dir() and is_config_name(str(path)) and (root := _class_folders(path, options)):
        images = FolderImages(root[0], size, preprocess or root[1], limit, loader)
    elif not path.is_dir() and is_config_name(str(path)):
        dataset, own, loads = _dataset(path, options or {})
        images = DatasetImages(dataset, size, preprocess or own, limit, loads)
    elif path.is_dir():
        images = FolderImages(path, size, preprocess or IMAGENET, limit, loader)
    else:
        raise UsageError(
            f'--calib {source} is neither a folder of images nor a config; int8 is '
            'calibrated on images like those it will see, never on random numbers.'
        )
    check_count(len(images), str(source), images.left_out)
    return images


def check_count(count: int, source: str, left_out: str = '') -> None:
    """Raise UsageError for too few images."""
    if count < MIN_IMAGES:
        raise UsageError(
            f'{source} has {count} images for calibration; give at least {MIN_IMAGES}, better '
            f'{ENOUGH_IMAGES} or more{left_out and f" ({left_out})"}.'
        )


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


def config_loader(cfg: Any) -> dict[str, Any] | None:
    """How a config loads the images that its model is tested on, for `read_image`."""
    seen = tested_on(cfg)
    loader = image_loader(innermost(seen['dataset']).get('pipeline') or ()) if seen else None
    if loader and loader['type'] != 'LoadImageFromFile':
        # One of a framework or of the user's own, which registers there.
        loader['_scope_'] = cfg.get('default_scope') or 'mmengine'
    return loader


def tested_on(cfg: Any) -> Any:
    """The loader of a config's test data, or of what it has instead; None without any."""
    loaders = (cfg.get(f'{split}_dataloader') for split in ('test', 'val', 'train'))
    return next(filter(None, loaders), None)


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def _class_folders(
    path: Path, options: Mapping[str, Any] | None
) -> tuple[Path, Preprocess | None] | None:
    """The folder of training images of a classifier's config, and what is done to them.

    Raises:
        UsageError: There is none.
    """
    from ..classification.tested import is_classifier, tested_normalization
    from ..engine.config_file import load_config

    cfg = load_config(str(path), dict(options or {}), None, 'none')
    if not is_classifier(cfg):
        return None
    loaders = (cfg.get(f'{split}_dataloader') for split in ('train', 'val'))
    loader: Any = next(filter(None, loaders), {})
    root = Path(str((loader.get('dataset') or {}).get('root')))
    if not root.is_dir():
        raise UsageError(f'{path} has no folder of images at {root}; give one to --calib.')
    return root, Preprocess.of(tested_normalization(cfg))


def _dataset(
    path: Path, options: Mapping[str, Any]
) -> tuple[Any, Preprocess, dict[str, Any] | None]:
    """The data set of a config to calibrate on, what is done to its images, what loads them."""
    from mmengine.registry import DATASETS, DefaultScope

    from ..engine.config_file import load_config
    from ..engine.frameworks import import_framework
    from ..engine.preflight import check_sources, require

    cfg = load_config(str(path), dict(options), None, 'none')
    scope = cfg.get('default_scope') or 'mmengine'
    import_framework(cfg.get('default_scope'))
    loaders = {split: cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')}
    # What the metric is measured on is better not calibrated on as well.
    split = next((name for name, loader in loaders.items() if loader), None)
    seen = tested_on(cfg)
    if split is None or seen is None:
        raise UsageError(f'{path} has no data set to calibrate on; give a folder of images.')
    require(check_sources(cfg, (split,)).findings)
    settings = innermost(loaders[split].dataset)
    pipeline = innermost(seen.dataset).pipeline
    settings.update(pipeline=pipeline, test_mode=True)
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build(settings)
    dataset.scope = scope
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    return dataset, Preprocess.of(preprocessor) or RAW, image_loader(pipeline)


def innermost(settings: Any) -> Any:
    """The first data set inside wrappers such as RepeatDataset and ConcatDataset."""
    while 'dataset' in settings or 'datasets' in settings:
        settings = settings.get('dataset') or settings['datasets'][0]
    return settings

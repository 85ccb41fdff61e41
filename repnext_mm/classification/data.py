"""Labelled images as timm reads and transforms them, and repeated augmentation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset


@DATASETS.register_module(force=True)  # replaces its stand-in of `lazy`
class TimmDataset(Dataset):
    """Images of one split: a folder with a folder per class, a tar file of such, or timm's others.

    Args:
        root: The folder, or without it `root`.tar where that is a file.
        name: What `timm.data.create_dataset` calls it, such as 'hfds/...'; '' for folders and tars.
        split: For those of timm's data sets that have splits.
        transform: Arguments of `timm.data.create_transform`.
        metainfo: `classes`, the names of the folders in the order of their labels; None for all
            there are, in natural order.
        ann_file: A list of the images to take, in lines of the path below `root`, a tab, and the
            name of the class; None takes every image, whose class is its folder.
        **kwargs: Further arguments of `timm.data.create_dataset`.

    Attributes:
        metainfo: `classes`, as they are used.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: `ann_file` has a line that cannot be read.
    """

    def __init__(
        self,
        root: str | None = None,
        name: str = '',
        split: str = 'train',
        transform: Mapping[str, Any] | None = None,
        metainfo: Mapping[str, Any] | None = None,
        ann_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        classes = (metainfo or {}).get('classes')
        if classes is not None:
            kwargs['class_map'] = {label: i for i, label in enumerate(classes)}
        if not name and root is not None:
            root = str(find_images(root))
        self.root = root
        if ann_file is not None:
            kwargs['reader'] = _ListReader(Path(root or '.'), Path(ann_file), classes)
            self.data = ImageDataset(root, **{k: v for k, v in kwargs.items() if k != 'class_map'})
        else:
            self.data = create_dataset(name, root=root, split=split, **kwargs)
        self.data.transform = create_transform(**(transform or {}))
        # timm would return the next image in the place of one that cannot be read.
        self.data._max_retries = 1
        # Its readers of folders and of tars call it differently.
        reader = self.data.reader
        index = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
        self.metainfo: dict[str, Any] = {'classes': tuple(index)} if index else {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`inputs (3, H, W)`, normalized, and `labels`, the index of the class.

        Raises:
            OSError: The image cannot be read; with its name.
        """
        try:
            image, label = self.data[i]
        except (RuntimeError, OSError) as error:
            raise OSError(f'{self.filename(i)} is no image that can be read; remove it.') from error
        return {'inputs': image, 'labels': label}

    def count_classes(self) -> dict[str, int]:
        """How many images each class has; empty where the reader does not list them."""
        reader: Any = self.data.reader
        classes = self.metainfo.get('classes')
        if classes is None:
            return {}
        labels = getattr(reader, 'targets', None)
        if labels is None:
            labels = [label for _, label in reader.samples]
        counts = Counter(int(label) for label in labels)
        return {name: counts[label] for label, name in enumerate(classes)}

    def filename(self, i: int) -> str:
        """Where image `i` is."""
        return self.data.filename(i, absolute=True)


class _ListReader(Reader):
    """timm's reader of images, for those of a list."""

    def __init__(self, root: Path, ann_file: Path, classes: Sequence[str] | None) -> None:
        rows = [line.split('\t') for line in ann_file.read_text('utf-8').splitlines() if line]
        if bad := next((row for row in rows if len(row) != 2), None):
            raise ValueError(f'{ann_file}: {bad} must be a path, a tab, and the name of a class.')
        names = list(classes or sorted({name for _, name in rows}))
        if unknown := next((name for _, name in rows if name not in names), None):
            raise ValueError(f'{ann_file} has the class {unknown!r}, which is none of {names}.')
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        self.root = root
        self.samples = [(path, self.class_to_idx[name]) for path, name in rows]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return (self.root / path).open('rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return Path(path).name if basename else str(self.root / path) if absolute else path


def find_images(root: str | Path) -> Path:
    """The folder `root`, or the tar file beside it.

    Raises:
        FileNotFoundError: There is neither.
    """
    path = Path(root)
    if path.exists():
        return path
    archive = path.with_name(f'{path.name}.tar')
    if archive.is_file():
        return archive
    raise FileNotFoundError(
        f'{path} does not exist, nor does {archive}; images are expected as {path}/CLASS/IMAGE.'
    )


@DATA_SAMPLERS.register_module(force=True)
class RepeatedAugmentation(RepeatAugSampler):
    """timm's sampler of repeated augmentation: an epoch has as many images as without.

    Each image comes `num_repeats` times, in the batches of different processes, and fewer images
    come in an epoch (arXiv 1901.09335; DeiT's published code).

    Args:
        num_repeats: How often each image comes.
        seed: Of the order; each epoch has another.
        round_up: As for MMEngine's samplers; without effect.
    """

    def __init__(
        self,
        dataset: Any,
        num_repeats: int = 3,
        seed: int | None = None,
        round_up: bool = True,
        **kwargs: Any,
    ) -> None:
        rank, world = get_dist_info()
        super().__init__(dataset, world, rank, num_repeats=num_repeats, **kwargs)
        self.first = seed or 0
        self.epoch: int = 0

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + self.first
        try:
            return super().__iter__()
        finally:
            self.epoch = epoch


@FUNCTIONS.register_module(force=True)
def seed_worker(worker_id: int, **_: Any) -> None:
    """Seed a worker from the generator of its epoch.

    MMEngine's own gives each worker the same numbers in every epoch, unless workers live on.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what timm draws from)

"""A folder per class, as classifiers are trained from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .records import DataError, Example, LabeledFolder, images_in, natural, split_of

NAME = 'class folders'


def find(root: Path) -> list[Path]:
    """The folders of classes, if images are in nothing else."""
    if images_in(root, recursive=False):
        return []
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        if split_of(folder.name) and inner:
            found += [path for path in inner if images_in(path)]
        elif images_in(folder):
            found.append(folder)
    names = {path.name for path in found}
    return found if len(names) > 1 else []


def read(root: Path, files: Sequence[Path]) -> LabeledFolder:
    """The examples of every split.

    Raises:
        DataError: The splits have different classes.
    """
    grouped: dict[str, dict[str, Path]] = {}
    for folder in files:
        split = split_of(folder.parent.name) if folder.parent != root else None
        grouped.setdefault(split or 'train', {})[folder.name] = folder
    names = sorted({name for folders in grouped.values() for name in folders}, key=natural)
    for split, folders in grouped.items():
        missing = [name for name in names if name not in folders]
        if missing and split != 'test':
            raise DataError(
                f'the split {split} of {root} has no folder for the class {missing[0]!r}; every '
                'split requires the same folders.'
            )
    splits: dict[str, list[Example]] = {
        split: [
            Example(image.relative_to(root).as_posix(), label=label)
            for label, name in enumerate(names)
            if name in folders
            for image in images_in(folders[name])
        ]
        for split, folders in grouped.items()
    }
    return LabeledFolder(root, NAME, 'classes', tuple(names), splits)

"""Recognizing the format of a folder, and reading it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from . import class_folders, coco, labelme, masks, pascal_voc, yolo
from .records import DataError, LabeledFolder, images_in, split_of

#: What `--format` may be called. A module has NAME, find(root) and read(root, files).
FORMATS: dict[str, ModuleType] = {
    'coco': coco,
    'yolo': yolo,
    'voc': pascal_voc,
    'labelme': labelme,
    'masks': masks,
    'folders': class_folders,
}


def read_folder(path: str | Path, format: str | None = None) -> LabeledFolder:
    """Read a folder of images with labels; nothing in it is changed.

    Args:
        path: The folder.
        format: One of `FORMATS`, where a folder has labels of several.

    Raises:
        DataError: It is not there, is in no known format or in two, or cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f'there is no folder {path}.')
    while (inner := _wrapped(root)) is not None:
        root = inner
    if format is not None:
        files = FORMATS[format].find(root)
        if not files:
            raise DataError(f'{root} has no labels of the format {format}.')
        return _read(FORMATS[format], root, files)
    found = {
        name: files
        for name, module in FORMATS.items()
        if module is not class_folders and (files := module.find(root))
    }
    if len(found) > 1:
        examples = [f'{FORMATS[name].NAME} ({files[0]})' for name, files in found.items()]
        raise DataError(
            f'{root} has labels of {len(found)} formats: {" and ".join(examples)}; choose with '
            f'--format {"|".join(found)}.'
        )
    if not found and (files := class_folders.find(root)):
        found = {'folders': files}
    if not found:
        count = len(images_in(root))
        what = f'{count} images and no labels' if count else 'no image'
        raise DataError(
            f'{root} has {what} in a format that is known: COCO, YOLO, Pascal VOC, LabelMe, label '
            'maps, or a folder per class (docs/own_data.md shows each).'
        )
    ((name, files),) = found.items()
    return _read(FORMATS[name], root, files)


def _wrapped(root: Path) -> Path | None:
    """The one folder in a folder, which archives unpack to, unless its name is that of a split."""
    inside = list(root.iterdir())
    if len(inside) == 1 and inside[0].is_dir() and not split_of(inside[0].name):
        return inside[0]
    return None


def _read(module: ModuleType, root: Path, files: list[Path]) -> LabeledFolder:
    folder: LabeledFolder = module.read(root, files)
    folder.splits = {split: found for split, found in folder.splits.items() if found}
    if not folder.splits:
        raise DataError(f'{root} has no image with labels.')
    if not folder.classes:
        raise DataError(f'{root} has {len([*folder.examples()])} images and not one object.')
    return folder

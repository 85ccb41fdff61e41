"""A look at the data before the model is built: a mistake costs seconds, and the file is named."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..program import command
from .errors import UserError

#: Files opened per data set; every file's presence is checked, reading all would take too long.
SAMPLED_FILES = 8
COCO_FIELDS = {
    'images': {'id', 'file_name', 'width', 'height'},
    'annotations': {'image_id', 'category_id', 'bbox'},
    'categories': {'id', 'name'},
}
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
SAMPLE_CONFIG = {
    'mmdet': 'mask_rcnn_repnext_m0_shapes',
    'mmseg': 'semantic_fpn_repnext_m0_shapes',
}


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check the data sets of `splits` ('train', 'val', 'test') as far as a quick look shows.

    Raises:
        UserError: Files are missing, unreadable or empty, or do not fit the classes of the config.
    """
    scope = cfg.get('default_scope')
    if scope not in SAMPLE_CONFIG:
        return
    registry = import_module(f'{scope}.registry').DATASETS
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        leaves = list(_leaf_datasets(loader.dataset))
        for leaf in leaves:
            cls = registry.get(leaf.type) if isinstance(leaf.type, str) else leaf.type
            check = next(
                (CHECKS[c.__name__] for c in inspect.getmro(cls) if c.__name__ in CHECKS), None
            )
            if check is not None:
                classes = check(leaf, cls, scope)
                if split == 'train':
                    _check_num_classes(cfg.model, classes)
        if len(leaves) == 1:
            _check_evaluator(cfg, split, leaves[0])


def _leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else None)
    if inner is None:
        yield dataset
    else:
        for item in inner:
            yield from _leaf_datasets(item)


# --- the two kinds of data set; each check returns the class names


def _check_coco(dataset: Any, cls: type, scope: str) -> Sequence[str]:
    name = dataset.get('ann_file') or ''
    ann_file, images_dir = _join(dataset, name), _folder(dataset, 'img')
    layout = f'{name} in COCO format, and its images in {images_dir.name}/'
    _require_there(dataset, [ann_file, images_dir], layout, scope)
    test_mode = dataset.get('test_mode', False)
    content = _read_coco(ann_file, test_mode)

    classes = _classes(dataset, cls)
    names = [category['name'] for category in content['categories']]
    absent = [name for name in classes if name not in names]
    if absent:
        raise UserError(
            f'{ann_file} has the {len(names)} categories {_some(names)}, but metainfo lists '
            f'{len(classes)} classes, of which {len(absent)} are not among them ({_some(absent)}); '
            'set metainfo=dict(classes=(...)) of the data set to names from the file, and '
            'num_classes of the heads to their number.'
        )

    wanted = {category['id'] for category in content['categories'] if category['name'] in classes}
    annotated = {a['image_id'] for a in content['annotations'] if a['category_id'] in wanted}
    images = content['images']
    usable = images
    if not test_mode and dataset.get('filter_cfg'):
        smallest = dataset.filter_cfg.get('min_size', 0)
        skip_empty = dataset.filter_cfg.get('filter_empty_gt', False)
        usable = [
            image
            for image in images
            if min(image['width'], image['height']) >= smallest
            and (image['id'] in annotated or not skip_empty)
        ]
    if not usable:
        raise UserError(
            f'no image of {ann_file} is left to use: it lists {len(images)} images, '
            f'{len(annotated)} of them with an object of the classes {_some(classes)}, and '
            f'filter_cfg is {dict(dataset.get("filter_cfg") or {})}; correct the file, the classes '
            'or the filter.'
        )
    files = [images_dir / image['file_name'] for image in usable]
    _check_files(files, listed_in=str(ann_file))
    _check_decodable(files)
    return classes


def _check_segmentation(dataset: Any, cls: type, scope: str) -> Sequence[str]:
    images_dir, masks_dir = _folder(dataset, 'img_path'), _folder(dataset, 'seg_map_path')
    image_suffix = _setting(dataset, cls, 'img_suffix', '.jpg')
    mask_suffix = _setting(dataset, cls, 'seg_map_suffix', '.png')
    prefixes = dataset.data_prefix
    layout = (
        f'images {prefixes.img_path}/*{image_suffix} and label maps of the same names '
        f'{prefixes.seg_map_path}/*{mask_suffix}'
    )
    _require_there(dataset, [images_dir, masks_dir], layout, scope)

    classes = _classes(dataset, cls)
    known = getattr(cls, 'METAINFO', {}).get('classes')
    if known is not None and not set(classes) <= set(known):
        extra = [name for name in classes if name not in known]
        raise UserError(
            f'{cls.__name__} has {len(known)} fixed classes, and metainfo asks for {len(extra)} '
            f'others ({_some(extra)}); for data of your own use type="BaseSegDataset".'
        )

    if dataset.get('ann_file'):
        ann_file = _join(dataset, dataset.ann_file)
        _require_there(dataset, [ann_file], layout, scope)
        stems = [line.strip() for line in ann_file.read_text('utf-8').splitlines() if line.strip()]
        images = [images_dir / f'{stem}{image_suffix}' for stem in stems]
        _check_files(images, listed_in=str(ann_file))
    else:
        images = sorted(images_dir.rglob(f'*{image_suffix}'))
    if not images:
        raise UserError(
            f'{images_dir} (that is {images_dir.absolute()}) holds no *{image_suffix}; expected '
            f'{layout}.'
        )
    masks = [
        masks_dir / f'{str(image.relative_to(images_dir))[: -len(image_suffix)]}{mask_suffix}'
        for image in images
    ]
    _check_files(masks, listed_in=f'the images in {images_dir}')
    _check_decodable(images)
    shift = int(bool(_setting(dataset, cls, 'reduce_zero_label', False)))
    ignored = _setting(dataset, cls, 'ignore_index', 255)
    _check_labels(masks, len(known or classes) - 1 + shift, ignored)
    return classes


CHECKS: dict[str, Callable[[Any, type, str], Sequence[str]]] = {
    'CocoDataset': _check_coco,
    'BaseSegDataset': _check_segmentation,
}


# --- what both share


def _setting(dataset: Any, cls: type, name: str, default: Any) -> Any:
    """An argument as the data set will see it: from the config, else the class's own default."""
    if name in dataset:
        return dataset[name]
    parameter = inspect.signature(cls).parameters.get(name)
    return (
        default if parameter is None or parameter.default is parameter.empty else parameter.default
    )


def _join(dataset: Any, path: str) -> Path:
    return Path(dataset.get('data_root') or '') / path


def _folder(dataset: Any, key: str) -> Path:
    return _join(dataset, (dataset.get('data_prefix') or {}).get(key) or '')


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ', '.join(names[:most]) + (', ...' if len(names) > most else '')


def _require_there(dataset: Any, paths: Sequence[Path], layout: str, scope: str) -> None:
    """Each of `paths` exists; if the root itself is absent, say that and not its first file."""
    root = Path(dataset.get('data_root') or '.')
    missing = next((path for path in (root, *paths) if not path.exists()), None)
    if missing is not None:
        raise UserError(
            f'no data at {missing} (looked in {missing.absolute()}); expected under {root}: '
            f'{layout}; put or link the data there, or point elsewhere with --cfg-options '
            'data_root=DIR, or try the generated sample set: '
            f'{command("train")} {SAMPLE_CONFIG[scope]}'
        )


def _read_coco(path: Path, test_mode: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f'{path} is not valid JSON ({error}); it may be cut short: get or export it again.'
        ) from error
    except OSError as error:
        raise UserError(f'the annotation file {path} cannot be read ({error}).') from error
    # The published image lists of test splits have no annotations.
    needed = [key for key in COCO_FIELDS if not (test_mode and key == 'annotations')]
    lacking = [key for key in needed if not isinstance(content, dict) or key not in content]
    if lacking:
        raise UserError(
            f'{path} is not a COCO annotation file: it lacks {", ".join(lacking)}; expected a JSON '
            f'object with {", ".join(COCO_FIELDS)}.'
        )
    content = {'annotations': [], **content}
    for key, fields in COCO_FIELDS.items():
        for number, item in enumerate(content[key]):
            if not isinstance(item, dict) or not fields <= item.keys():
                raise UserError(
                    f'{path} is not a COCO annotation file: {key}[{number}] needs the fields '
                    f'{", ".join(sorted(fields))}.'
                )
    return content


def _classes(dataset: Any, cls: type) -> Sequence[str]:
    given = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(given, str):
        if not os.path.isfile(given):
            raise UserError(
                f'metainfo classes={given!r} is text, not a list of names; for a single class '
                f'write metainfo=dict(classes=({given!r},)) with the comma.'
            )
        given = Path(given).read_text('utf-8').splitlines()
    classes = given if given is not None else getattr(cls, 'METAINFO', {}).get('classes')
    if not classes:
        raise UserError(
            f'{cls.__name__} does not know its classes; set metainfo=dict(classes=(...)) in '
            'train_dataloader.dataset and val_dataloader.dataset.'
        )
    return classes


def _check_files(files: Sequence[Path], listed_in: str) -> None:
    """Every file is there; one listing per folder, as single look-ups are slow over a network."""
    present = {
        folder: set(os.listdir(folder)) if folder.is_dir() else set()
        for folder in {file.parent for file in files}
    }
    missing = [file for file in files if file.name not in present[file.parent]]
    if missing:
        raise UserError(
            f'{len(missing)} of {len(files)} files are missing that belong to {listed_in}, the '
            f'first is {missing[0]}; restore them, or remove their entries.'
        )


def _spread(files: Sequence[Path]) -> list[Path]:
    step = max(1, len(files) // SAMPLED_FILES)
    return list(files[::step][:SAMPLED_FILES])


def _check_decodable(images: Sequence[Path]) -> None:
    import cv2

    for path in _spread(images):
        if path.stat().st_size == 0 or cv2.imread(str(path)) is None:
            raise UserError(
                f'the image {path} cannot be decoded ({path.stat().st_size} bytes); replace the '
                'file, or remove it from the data set.'
            )


def _check_labels(masks: Sequence[Path], highest: int, ignored: int) -> None:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    for path in _spread(masks):
        try:
            labels = np.asarray(Image.open(path))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(
                f'the label map {path} cannot be read ({error}); replace it.'
            ) from error
        if labels.ndim != 2:
            raise UserError(
                f'the label map {path} has {labels.shape[-1]} channels; expected one, which holds '
                'the number of the class of each pixel, not a colour.'
            )
        found = labels[labels != ignored]
        if found.size and found.max() > highest:
            raise UserError(
                f'the label map {path} holds the label {found.max()}, but the classes of the '
                f'config reach to {highest}; correct metainfo, reduce_zero_label or the file.'
            )


def _check_num_classes(model: Any, classes: Sequence[str]) -> None:
    wrong = [
        (path, head['num_classes'])
        for path, head in _heads(model, 'model')
        if head.get('num_classes', len(classes)) != len(classes)
    ]
    if wrong:
        options = ' '.join(f'{path}.num_classes={len(classes)}' for path, _ in wrong)
        raise UserError(
            f'{wrong[0][0]} has num_classes={wrong[0][1]}, but the training data has '
            f'{len(classes)} classes ({_some(classes)}); add --cfg-options {options}'
        )


def _heads(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if not isinstance(value, dict | list | tuple):
            continue
        here = f'{path}.{key}'
        if isinstance(value, dict) and (key in HEADS or path.rsplit('.', 1)[-1] in HEADS):
            yield here, value
        yield from _heads(value, here)


def _check_evaluator(cfg: Config, split: str, dataset: Any) -> None:
    """Predictions are compared with the annotations of the images they were made for."""
    evaluators = cfg.get(f'{split}_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        ann_file = evaluator.get('ann_file')
        if not ann_file or not dataset.get('ann_file'):
            continue
        read = _join(dataset, dataset.ann_file)
        if Path(ann_file).absolute() != read.absolute():
            raise UserError(
                f'{split}_evaluator compares with {ann_file}, but {split}_dataloader reads {read}; '
                f'add --cfg-options {split}_evaluator.ann_file={read}'
            )

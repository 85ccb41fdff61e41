"""The files that the data sets of a config name, before anything is built.

What is wrong in them would end the run late or not at all. What can be completed is written to a
copy in the work dir, which the run reads in place of the file.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ...files import require_regular, write_text
from ...program import command
from ..errors import UserError
from .class_folders import check_class_folders
from .coco import CocoFile, Kept, check_masks, check_order, count_kept, read_coco
from .findings import Finding, error, some, warning
from .texts import read_lines

SAMPLE_CONFIG = {
    'mmdet': 'mask_rcnn_repnext_m0_shapes',
    'mmseg': 'semantic_fpn_repnext_m0_shapes',
}
COPIES = 'completed_annotations'


@dataclass
class Sources:
    """What the annotation files hold; keys are absolute paths of files.

    Attributes:
        texts: Completed texts of files, for the run to read in their place.
        copies: Where `write` has put them.
        classes: Class names that the config leaves to the file.
        kept: Objects of a COCO file, by data set (see `key_of`), and what mmdetection keeps.
        listed: Images that a file lists, by data set.
    """

    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def write(self, work_dir: str | Path, first: bool = True) -> None:
        """Put the completed texts into files in `work_dir`; the `first` process writes them."""
        for name, text in self.texts.items():
            path = Path(name)
            mark = hashlib.sha256(name.encode()).hexdigest()[:8]
            copy = Path(work_dir, COPIES, f'{path.stem}.{mark}{path.suffix}').absolute()
            self.copies[name] = copy
            if first:
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_text(copy, text)

    def key_of(self, dataset: Any) -> str:
        """What identifies the data of a built data set, as `key_of` does for a config."""
        prefixes = getattr(dataset, 'data_prefix', None) or {}
        name = getattr(dataset, 'ann_file', '') or prefixes.get('img_path') or ''
        path = os.path.abspath(str(name))
        path = next((p for p, copy in self.copies.items() if str(copy) == path), path)
        return f'{path} {bool(getattr(dataset, "test_mode", False))}'

    def apply(self, node: Any) -> Any:
        """`node` of a config with the copies and the classes in the place of what it names."""
        if isinstance(node, dict):
            new = type(node)({key: self.apply(value) for key, value in node.items()})
            if isinstance(name := node.get('ann_file'), str) and name:
                path = os.path.abspath(join(node, name))
                if path in self.copies:
                    new['ann_file'] = str(self.copies[path])
                is_dataset = 'data_prefix' in node or 'pipeline' in node
                if is_dataset and path in self.classes and not _own_classes(node):
                    new['metainfo'] = dict(classes=self.classes[path])
            return new
        if isinstance(node, list | tuple):
            return type(node)(self.apply(value) for value in node)
        return node


def check_sources(cfg: Config, splits: Sequence[str]) -> Sources:
    """Look into the annotation files of `splits` ('train', 'val', 'test').

    Raises:
        UserError: A file is missing, cannot be read, or misses what nobody can complete.
    """
    sources = Sources()
    sources.findings += check_class_folders(cfg, splits)
    scope = cfg.get('default_scope')
    if scope not in SAMPLE_CONFIG:
        return sources
    registry = import_module(f'{scope}.registry').DATASETS
    done: set[str] = set()
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        leaves = list(leaf_configs(loader.dataset))
        for leaf in leaves:
            cls = registry.get(leaf.type) if isinstance(leaf.type, str) else leaf.type
            if cls is None:
                continue  # building it says so
            check = next((c for name, c in CHECKS.items() if _reads_as(cls, name)), None)
            # The same file with other classes or another filter is another data set.
            chosen = (leaf.get('metainfo') or {}).get('classes'), leaf.get('filter_cfg')
            key = f'{key_of(leaf)} {_with_masks(cfg, split, leaf)} {chosen}'
            if check is not None and key not in done:
                check(_Leaf(cfg, split, leaf, cls, scope), sources)
                done.add(key)
        if len(leaves) == 1:
            _check_evaluator(cfg, split, leaves[0])
    return sources


def key_of(leaf: Any) -> str:
    """What identifies the data of a data set in a config."""
    name = leaf.get('ann_file') or folder(leaf, 'img_path')
    return f'{os.path.abspath(join(leaf, str(name)))} {bool(leaf.get("test_mode"))}'


def leaf_configs(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else None)
    if inner is None:
        yield dataset
    else:
        for item in inner:
            yield from leaf_configs(item)


@dataclass(frozen=True)
class _Leaf:
    """One data set of a config, with where it stands."""

    cfg: Config
    split: str
    config: Any
    cls: type
    scope: str


def _reads_as(cls: type, name: str) -> bool:
    """Whether `cls` reads its annotations as the class `name` of mm does."""
    base = next((c for c in inspect.getmro(cls) if c.__name__ == name), None)
    return base is not None and cls.load_data_list is base.load_data_list  # type: ignore[attr-defined]


# --- one check for each way of reading


def _check_coco(leaf: _Leaf, sources: Sources) -> None:
    config = leaf.config
    name = config.get('ann_file') or ''
    ann_file, images_dir = join(config, name), folder(config, 'img')
    layout = f'{name} in COCO format, and its images in {images_dir.name}/'
    _require_there(config, [ann_file, images_dir], layout, leaf.scope)
    test_mode = config.get('test_mode', False)
    file = read_coco(ann_file, images_dir, without_annotations=test_mode)

    classes = _classes(leaf, file.names)
    setting = 'metainfo' if _own_classes(config) else leaf.cls.__name__
    if classes == tuple(file.names) and not _own_classes(config):
        sources.classes[os.path.abspath(ann_file)] = classes
    check_order(file, classes, f'{setting} of the {leaf.split} data')
    if all(finding.level != 'error' for finding in file.findings):
        kept = count_kept(file, classes)
        key = key_of(config)
        sources.kept[key], sources.listed[key] = kept, len(file.content['images'])
        if _with_masks(leaf.cfg, leaf.split, config):
            check_masks(file, classes)
        _check_images_left(leaf, file, classes)
    if file.completed:
        sources.findings.append(
            warning(f'{ann_file} was completed for this run: {"; ".join(file.completed)}.')
        )
        sources.texts[os.path.abspath(ann_file)] = file.text()
    sources.findings += file.findings


def _check_images_left(leaf: _Leaf, file: CocoFile, classes: Sequence[str]) -> None:
    """As `CocoDataset.filter_data` does."""
    config, images = leaf.config, file.content['images']
    filters = config.get('filter_cfg') or {}
    wanted = {c['id'] for c in file.content['categories'] if c['name'] in classes}
    annotated = {a['image_id'] for a in file.content['annotations'] if a['category_id'] in wanted}
    test_mode = config.get('test_mode', False)
    smallest = 0 if test_mode else filters.get('min_size', 0)
    skip_empty = not test_mode and filters.get('filter_empty_gt', False)
    usable = [
        image
        for image in images
        if min(image['width'], image['height']) >= smallest
        and (image['id'] in annotated or not skip_empty)
    ]
    if len(usable) > len(images) / 2:
        return
    small = sum(min(image['width'], image['height']) < smallest for image in images)
    sentence = (
        f'{len(usable)} of {len(images)} images of {file.path} are left to use: '
        f'{len(annotated)} have an object of the classes {some(classes)}, {small} are smaller than '
        f'min_size, and filter_cfg is {dict(filters)}; correct the file, the classes or the filter.'
    )
    if usable:
        file.findings.append(warning(sentence))
    else:
        file.findings.append(error(f'no image of {file.path} is left to use: {sentence}'))


def _check_xml(leaf: _Leaf, sources: Sources) -> None:
    config = leaf.config
    root = folder(config, 'sub_data_root')
    ann_file = join(config, config.get('ann_file') or '')
    images = root / _setting(config, leaf.cls, 'img_subdir', 'JPEGImages')
    annotations = root / _setting(config, leaf.cls, 'ann_subdir', 'Annotations')
    layout = f'{config.get("ann_file")}, {images.name}/*.jpg and {annotations.name}/*.xml'
    _require_there(config, [ann_file, images, annotations], layout, leaf.scope)
    stems = _check_list(ann_file, sources)
    _check_xml_names(leaf, [annotations / f'{stem}.xml' for stem in stems], sources)
    sources.listed[key_of(config)] = len(stems)


def _check_xml_names(leaf: _Leaf, files: Sequence[Path], sources: Sources) -> None:
    """Objects of a name that is no class are dropped without a word."""
    from collections import Counter
    from xml.etree import ElementTree

    classes = _classes(leaf, None)
    names: Counter[str] = Counter()
    where: dict[str, Path] = {}
    for path in spread(files, 2000):
        try:
            root = ElementTree.parse(require_regular(path)).getroot()
        except (OSError, ValueError, ElementTree.ParseError) as reason:
            raise UserError(f'the annotation file {path} cannot be read ({reason}).') from reason
        for item in root.findall('object'):
            name = item.findtext('name') or ''
            names[name] += 1
            where.setdefault(name, path)
    unknown = [name for name in names if name not in classes]
    if unknown:
        lost = sum(names[name] for name in unknown)
        sentence = (
            f'{where[unknown[0]]}: {lost} of {names.total()} objects have names that are no class '
            f'({some(map(repr, unknown))}) and are dropped; the classes are '
            f'{some(map(repr, classes), 8)}: correct metainfo or the files.'
        )
        found = error if lost == names.total() else warning
        sources.findings.append(found(sentence))


def _check_segmentation(leaf: _Leaf, sources: Sources) -> None:
    config, cls = leaf.config, leaf.cls
    images_dir, masks_dir = folder(config, 'img_path'), folder(config, 'seg_map_path')
    image_suffix = _setting(config, cls, 'img_suffix', '.jpg')
    mask_suffix = _setting(config, cls, 'seg_map_suffix', '.png')
    prefixes = config.get('data_prefix') or {}
    layout = (
        f'images {prefixes.get("img_path")}/*{image_suffix} and label maps of the same names '
        f'{prefixes.get("seg_map_path")}/*{mask_suffix}'
    )
    _require_there(config, [images_dir, masks_dir], layout, leaf.scope)

    classes = _classes(leaf, None)
    known = getattr(cls, 'METAINFO', {}).get('classes')
    if known is not None and not set(classes) <= set(known):
        extra = [name for name in classes if name not in known]
        raise UserError(
            f'{cls.__name__} has {len(known)} fixed classes, and metainfo asks for {len(extra)} '
            f'others ({some(extra)}); for data of your own use type="BaseSegDataset".'
        )
    if config.get('ann_file'):
        ann_file = join(config, config.ann_file)
        _require_there(config, [ann_file], layout, leaf.scope)
        if ann_file.is_file():
            sources.listed[key_of(config)] = len(_check_list(ann_file, sources))
        return
    found = sum(1 for _ in images_dir.rglob(f'*{image_suffix}'))
    if not found:
        raise UserError(
            f'{images_dir} (that is {images_dir.absolute()}) holds no *{image_suffix}; expected '
            f'{layout}.'
        )
    sources.listed[key_of(config)] = found
    sources.findings += _left_out(images_dir, masks_dir, image_suffix, mask_suffix, found)


def _left_out(
    images_dir: Path, masks_dir: Path, image_suffix: str, mask_suffix: str, found: int
) -> Iterator[Finding]:
    """Images of another suffix beside a label map of their name: mmseg does not see them."""
    from ...datasets.images import IMAGE_SUFFIXES

    masks = {str(p.relative_to(masks_dir)) for p in masks_dir.rglob(f'*{mask_suffix}')}
    same_folder = images_dir.resolve() == masks_dir.resolve()
    out = []
    for path in images_dir.rglob('*'):
        if path.name.endswith(image_suffix) or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if same_folder and path.name.endswith(mask_suffix):
            continue
        if str(path.relative_to(images_dir).with_suffix('')) + mask_suffix in masks:
            out.append(path)
    if out:
        suffixes = sorted({path.suffix for path in out})
        sentence = (
            f'{len(out)} of {len(out) + found} images in {images_dir} are left out, the first is '
            f'{out[0].name}: img_suffix is {image_suffix!r}, and they end in {some(suffixes)}; '
            'convert them to one format, or list data sets of each suffix in a ConcatDataset.'
        )
        yield error(sentence) if len(out) > found else warning(sentence)


CHECKS: dict[str, Callable[[_Leaf, Sources], None]] = {
    'CocoDataset': _check_coco,
    'XMLDataset': _check_xml,
    'BaseSegDataset': _check_segmentation,
}


# --- what they share


def _setting(config: Any, cls: type, name: str, default: Any) -> Any:
    """An argument as the data set will see it: from the config, else the class's own default."""
    if name in config:
        return config[name]
    for base in inspect.getmro(cls):
        if '__init__' not in vars(base):
            continue
        parameter = inspect.signature(base.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return default


def join(config: Any, path: str) -> Path:
    """A path of a data set, under its root."""
    return Path(config.get('data_root') or '') / path


def folder(config: Any, key: str) -> Path:
    """A folder of the `data_prefix` of a data set."""
    return join(config, (config.get('data_prefix') or {}).get(key) or '')


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, from all over."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _own_classes(config: Any) -> Any:
    return (config.get('metainfo') or {}).get('classes')


def _classes(leaf: _Leaf, in_file: Sequence[str] | None) -> tuple[str, ...]:
    """The classes as the data set will see them; `in_file` has those of a file that names them."""
    given = _own_classes(leaf.config)
    if isinstance(given, str):
        if not os.path.isfile(given):
            raise UserError(
                f'metainfo classes={given!r} is text, not a list of names; for a single class '
                f'write metainfo=dict(classes=({given!r},)) with the comma.'
            )
        lines, fault = read_lines(Path(given))
        if fault:
            raise UserError(f'the list of classes {given} is not plain: {fault}; correct the file.')
        given = lines
    if given is None:
        given = getattr(leaf.cls, 'METAINFO', {}).get('classes')
        if in_file and leaf.cls.__name__ == 'CocoDataset':
            ordered = [name for name in in_file if name in set(given or ())]
            if ordered != list(given or ()):
                given = in_file
    if not given:
        raise UserError(
            f'{leaf.cls.__name__} does not know its classes; set metainfo=dict(classes=(...)) in '
            'train_dataloader.dataset and val_dataloader.dataset.'
        )
    for name in given:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f'metainfo classes contains {name!r}, expected names.')
    return tuple(given)


def _require_there(config: Any, paths: Sequence[Path], layout: str, scope: str) -> None:
    """Each of `paths` exists; if the root itself is absent, say that and not its first file."""
    root = Path(config.get('data_root') or '.')
    missing = next((path for path in (root, *paths) if not path.exists()), None)
    if missing is not None:
        raise UserError(
            f'no data at {missing} (looked in {missing.absolute()}); expected under {root}: '
            f'{layout}; put or link the data there, or point elsewhere with --cfg-options '
            'data_root=DIR, or try the generated sample set: '
            f'{command("train")} {SAMPLE_CONFIG[scope]}'
        )


def _check_list(path: Path, sources: Sources) -> list[str]:
    lines, fault = read_lines(path)
    if not lines:
        raise UserError(f'the list {path} names no image; expected one name in each line.')
    if fault:
        sources.texts[os.path.abspath(path)] = ''.join(f'{line}\n' for line in lines)
        sources.findings.append(warning(f'{path} was completed for this run: {fault}.'))
    return lines


def _with_masks(cfg: Config, split: str, config: Any) -> bool:
    """Whether masks of the objects are used: by the pipeline, or to measure."""
    pipelines = [config.get('pipeline') or [], cfg[f'{split}_dataloader'].dataset.get('pipeline')]
    loads = any(
        isinstance(step, dict) and step.get('with_mask')
        for pipeline in pipelines
        for step in _steps(pipeline or [])
    )
    return loads or any('segm' in _metrics(e) for e in evaluators(cfg, split))


def _steps(node: Any) -> Iterator[Any]:
    for step in node:
        yield step
        if isinstance(step, dict):
            for value in step.values():
                if isinstance(value, list):
                    yield from _steps(value)
        elif isinstance(step, list):
            yield from _steps(step)


def _metrics(evaluator: Any) -> list[str]:
    metric = evaluator.get('metric', [])
    return [metric] if isinstance(metric, str) else list(metric)


def evaluators(cfg: Config, split: str) -> list[ConfigDict]:
    """The evaluators of a split as a list."""
    given = cfg.get(f'{split}_evaluator') or []
    given = given if isinstance(given, list | tuple) else [given]
    return [e for e in given if isinstance(e, dict)]


def _check_evaluator(cfg: Config, split: str, config: Any) -> None:
    """Predictions are compared with the annotations of the images they were made for."""
    for evaluator in evaluators(cfg, split):
        ann_file = evaluator.get('ann_file')
        if not ann_file or not config.get('ann_file'):
            continue
        read = join(config, config.ann_file)
        if os.path.abspath(ann_file) != os.path.abspath(read):
            raise UserError(
                f'{split}_evaluator compares with {ann_file}, but {split}_dataloader reads {read}; '
                f'add --cfg-options {split}_evaluator.ann_file={read}'
            )

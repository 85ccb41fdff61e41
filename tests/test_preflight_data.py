"""The pre-flight on data: each kind of fault is refused, named or completed, with its value."""

from __future__ import annotations

import codecs
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tool_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from PIL import Image
from tool_runs import CONFIGS, FOLDERS

from repnext_mm.engine.cli import import_framework
from repnext_mm.engine.config_file import load_config
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.preflight import Finding, check_sources, require
from repnext_mm.engine.preflight.built import Summary, check_dataset, classes_of

pytestmark = pytest.mark.compat
TRAIN_JSON = 'annotations/instances_train2017.json'
NAMES = ['disc', 'ring', 'square', 'triangle', 'star']


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes', train=24, val=2)


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


def config(task: str, root: Path, work_dir: Path | None = None, **more: Any) -> Config:
    options = {'sample_data_root': None, 'data_root': f'{root / FOLDERS[task]}/', **more}
    return load_config(str(CONFIGS[task]), options, str(work_dir or root / 'work'), 'none')


def look(cfg: Config, split: str = 'train') -> tuple[list[Finding], Any, list[Summary]]:
    """What is found, the data set as a run would build it, and its summaries."""
    import_framework(cfg.default_scope)
    sources = check_sources(cfg, (split,))
    findings = list(sources.findings)
    if any(finding.level == 'error' for finding in findings):
        return findings, None, []
    sources.write(cfg.work_dir)
    module = {'mmdet': 'mmdet.registry', 'mmseg': 'mmseg.registry'}[cfg.default_scope]
    registry = __import__(module, fromlist=['DATASETS']).DATASETS
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = registry.build(sources.apply(cfg[f'{split}_dataloader'].dataset))
        summaries = check_dataset(split, dataset, sources)
    return findings + [f for s in summaries for f in s.findings], dataset, summaries


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def said(findings: list[Finding], level: str, *values: object) -> str:
    """The one sentence of `level` that has every one of `values`."""
    found = [
        f.sentence
        for f in findings
        if f.level == level and all(str(value) in f.sentence for value in values)
    ]
    assert found, (values, findings)
    return found[0]


def change_json(root: Path, change: Callable[[dict[str, Any]], object], name: str = TRAIN_JSON):
    path = root / 'coco' / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def every(key: str, change: Callable[[dict[str, Any]], object]) -> Callable:
    return lambda content: [change(item) for item in content[key]]


# --- what is right stays silent


@pytest.mark.parametrize('task', ['det', 'seg'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_good_data_is_only_counted(task: str, split: str, shapes: Path, tmp_path: Path) -> None:
    findings, dataset, (summary,) = look(config(task, shapes, tmp_path), split)
    assert 'error' not in levels(findings)
    # Two scenes need not have every shape; nothing else may be said.
    assert all('never occur' in finding.sentence for finding in findings)
    assert summary.images == len(dataset) == {'train': 24, 'val': 2}[split]
    assert list(summary.classes) == list(classes_of(dataset))
    assert sum(summary.classes.values()) > 0
    assert not (tmp_path / 'completed_annotations').exists()


def test_objects_are_counted_by_class_and_rule(own: Path) -> None:
    path = own / 'coco' / TRAIN_JSON
    content = json.loads(path.read_text())
    expected = dict.fromkeys(NAMES, 0)
    for annotation in content['annotations']:
        if not annotation['iscrowd']:
            expected[NAMES[annotation['category_id'] - 1]] += 1
    first = next(a for a in content['annotations'] if not a['iscrowd'])
    first['bbox'][2] = 0.5
    expected[NAMES[first['category_id'] - 1]] -= 1
    path.write_text(json.dumps(content))
    findings, _, (summary,) = look(config('det', own))
    assert summary.classes == expected
    assert summary.rules == {'empty': 1}
    assert summary.objects_listed == len(content['annotations']) == summary.objects + 1
    said(findings, 'warning', 'drops 1 of', f'annotation {first["id"]} of image')


# --- classes


def test_order_of_categories(own: Path) -> None:
    change_json(own, lambda c: c['categories'].reverse())
    findings, _, _ = look(config('det', own))
    said(findings, 'error', own / 'coco' / TRAIN_JSON, "label 0 to 'star'", "'disc'")


def test_order_of_metainfo(shapes: Path, tmp_path: Path) -> None:
    cfg = config('det', shapes, tmp_path)
    cfg.train_dataloader.dataset.metainfo = dict(classes=tuple(reversed(NAMES)))
    findings, _, _ = look(cfg)
    said(findings, 'error', "label 0 to 'disc'", "'star'", f'{tuple(NAMES)!r}')


def test_order_in_one_part_of_a_concatenation(own: Path) -> None:
    good = json.loads((own / 'coco' / TRAIN_JSON).read_text())
    good['categories'].reverse()
    other = own / 'coco' / 'annotations' / 'other.json'
    other.write_text(json.dumps(good))
    cfg = config('det', own)
    part = cfg.train_dataloader.dataset
    second = copy.deepcopy(part)
    second.ann_file = 'annotations/other.json'
    repeated = dict(type='RepeatDataset', times=2, dataset=second)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[part, repeated])
    findings, _, _ = look(cfg)
    said(findings, 'error', other, "label 0 to 'star'")


def test_classes_come_from_the_file_where_none_are_given(shapes: Path, tmp_path: Path) -> None:
    cfg = config('det', shapes, tmp_path)
    cfg.train_dataloader.dataset.metainfo = None
    findings, dataset, _ = look(cfg)
    assert 'error' not in levels(findings)
    assert classes_of(dataset) == tuple(NAMES)


def test_name_with_an_invisible_character(own: Path) -> None:
    change_json(own, lambda c: c['categories'][1].update(name='ring\u200b '))
    findings, _, (summary,) = look(config('det', own))
    said(findings, 'warning', "'ring\\u200b '")
    assert summary.classes['ring'] > 0
    assert 'error' not in levels(findings)


def test_list_of_classes_with_an_empty_line(own: Path, tmp_path: Path) -> None:
    names = tmp_path / 'classes.txt'
    names.write_text('\n'.join(['', *NAMES]))
    cfg = config('det', own)
    cfg.train_dataloader.dataset.metainfo = dict(classes=str(names))
    with pytest.raises(UserError, match=str(names)):
        look(cfg)


# --- objects that vanish


def to_shares(content: dict[str, Any]) -> None:
    for a in content['annotations']:
        a['bbox'] = [v / 64 for v in a['bbox']]


def to_corners(content: dict[str, Any]) -> None:
    for a in content['annotations']:
        x, y, w, h = a['bbox']
        a['bbox'] = [x, y, x + w, y + h]
        a.pop('segmentation')


@pytest.mark.parametrize(
    'change, values',
    [
        (to_shares, ['narrower than a pixel', 'shares']),
        (to_corners, ['x1, y1, x2, y2']),
        (every('annotations', lambda a: a['bbox'].__setitem__(slice(2, 4), [0, 0])), ['0, 0]']),
        (
            every('annotations', lambda a: a.update(category_id=a['category_id'] + 1)),
            ['category_id=6', 'shifted by one'],
        ),
        (every('annotations', lambda a: a.update(category_id=77)), ['category_id=77']),
        (every('annotations', lambda a: a.update(image_id=9999)), ['image 9999']),
        (every('annotations', lambda a: a.update(area=0)), ['area=0']),
        (
            every('annotations', lambda a: a.update(bbox=[v * 0.4 for v in a['bbox']])),
            ['do not lie over their masks'],
        ),
        (
            every('annotations', lambda a: a.update(bbox=[a['bbox'][0] + 64, *a['bbox'][1:]])),
            ['outside of their image'],
        ),
    ],
    ids=['shares', 'corners', 'zero', 'shifted', 'unknown', 'orphans', 'area', 'scaled', 'outside'],
)
def test_objects_that_vanish(change: Callable, values: list[str], own: Path) -> None:
    path = change_json(own, change)
    cfg = config('det', own)
    if change is to_corners:
        without_masks(cfg)
    findings, _, _ = look(cfg)
    said(findings, 'error', path, *values)


def without_masks(cfg: Config) -> None:
    for split in ('train', 'val', 'test'):
        for step in cfg[f'{split}_dataloader'].dataset.pipeline:
            if step.type == 'LoadAnnotations':
                step.with_mask = False
        if split != 'train':
            cfg[f'{split}_evaluator'].metric = 'bbox'


def test_few_lost_objects_are_named(own: Path) -> None:
    path = change_json(own, lambda c: c['annotations'][3].update(image_id=9999))
    findings, dataset, _ = look(config('det', own))
    said(findings, 'warning', path, 'drops 1 of', 'image 9999')
    assert dataset is not None


def test_boxes_of_images_of_another_size(own: Path) -> None:
    def shrink(content: dict[str, Any]) -> None:
        content['annotations'] *= 3
        for number, a in enumerate(map(dict, content['annotations'])):
            a['id'] = number + 1
            a['segmentation'] = [[0, 0, 4, 0, 4, 4]]  # over the box, so only the reach tells
            a['bbox'] = [0, 0, 4, 4]
            content['annotations'][number] = a

    path = change_json(own, shrink)
    findings, _, _ = look(config('det', own))
    said(findings, 'warning', path, 'another size')


# --- what is completed


def boxes_by_file(dataset: Any) -> dict[str, list[Any]]:
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return {
        Path(info['img_path']).name: sorted(
            (i['bbox_label'], [round(v, 3) for v in i['bbox']], i['ignore_flag'], str(i['mask']))
            for i in info['instances']
        )
        for info in infos
    }


def as_text(item: dict[str, Any], *names: str) -> None:
    for name in names:
        item[name] = str(item[name])


COMPLETED: dict[str, Callable[[dict[str, Any]], object]] = {
    'id 0': every('annotations', lambda a: a.update(id=a['id'] - 1)),
    'ids twice': every('annotations', lambda a: a.update(id=1 + a['id'] % 2)),
    'no id': every('annotations', lambda a: a.pop('id')),
    'id as text': every('annotations', lambda a: as_text(a, 'id')),
    'image_id as text': every('annotations', lambda a: as_text(a, 'image_id')),
    'image ids as text': every('images', lambda i: as_text(i, 'id', 'width')),
    'category_id as 3.0': every(
        'annotations', lambda a: a.update(category_id=float(a['category_id']))
    ),
    'no area': every('annotations', lambda a: a.pop('area')),
    'area null': every('annotations', lambda a: a.update(area=None)),
    'no iscrowd': every('annotations', lambda a: a['iscrowd'] or a.pop('iscrowd')),
    'iscrowd as text': every('annotations', lambda a: as_text(a, 'iscrowd')),
    'bbox as text': every('annotations', lambda a: a.update(bbox=[str(v) for v in a['bbox']])),
    'no sizes': every('images', lambda i: (i.pop('width'), i.pop('height'))),
}  # fmt: skip


@pytest.mark.parametrize('kind', COMPLETED)
def test_completed_and_said(kind: str, own: Path, shapes: Path, tmp_path: Path) -> None:
    path = change_json(own, COMPLETED[kind])
    before = path.read_bytes()
    findings, dataset, _ = look(config('det', own))
    assert 'error' not in levels(findings)
    said(findings, 'warning', path, 'completed')
    _, good, _ = look(config('det', shapes, tmp_path / 'good'))
    assert boxes_by_file(dataset) == boxes_by_file(good)
    assert path.read_bytes() == before
    assert Path(dataset.ann_file).is_relative_to(own / 'work')


@pytest.mark.parametrize(
    'encode',
    [
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode('utf-16'),
        lambda text: text.encode('utf-16-be'),
    ],
    ids=['BOM', 'UTF-16', 'UTF-16 without mark'],
)
def test_json_in_another_encoding(encode: Callable, own: Path) -> None:
    path = own / 'coco' / TRAIN_JSON
    path.write_bytes(encode(path.read_text()))
    findings, dataset, _ = look(config('det', own))
    said(findings, 'warning', path)
    assert len(dataset) == 24


# --- what nobody can complete


@pytest.mark.parametrize(
    'change, value',
    [
        (lambda c: c['annotations'][2].update(bbox=None, segmentation=None), 'bbox=None'),
        (lambda c: c['annotations'][2].update(bbox=[1, 2, 3]), 'bbox=[1, 2, 3]'),
        (lambda c: c['annotations'][2].update(bbox=[1, 2, 3, float('nan')]), 'nan'),
        (lambda c: c['annotations'][2].update(category_id='disc'), "category_id='disc'"),
        (lambda c: c['annotations'][2].pop('image_id'), 'annotations[2] has no image_id'),
        (lambda c: c['images'][1].update(id=1), 'the first is 1'),
        (lambda c: c['images'][1].pop('id'), 'images[1] has no id'),
        (lambda c: c['images'][1].update(file_name=7), 'file_name=7'),
        (lambda c: c['images'][1].update(width=-64), 'width=-64'),
        (lambda c: c['images'][1].update(width=10**400), 'width=1000'),
        (lambda c: c['categories'][1].update(name='disc'), "'disc'"),
        (lambda c: c['categories'][1].update(name=None), 'name=None'),
        (lambda c: c['annotations'].insert(0, [1]), 'annotations[0] is [1]'),
        (lambda c: c.update(images={}), 'images'),
    ],
)
def test_refused_with_the_value(change: Callable, value: str, own: Path) -> None:
    path = change_json(own, change)
    with pytest.raises(UserError) as refused:
        require(look(config('det', own))[0])
    assert str(path) in str(refused.value)
    assert value in str(refused.value)


@pytest.mark.parametrize(
    'text', ['[' * 100_000, '{"images": ' + '9' * 5000 + '}', '{"images": [', '\x00\x01\x02']
)
def test_json_that_no_reader_accepts(text: str, own: Path) -> None:
    path = own / 'coco' / TRAIN_JSON
    path.write_text(text)
    with pytest.raises(UserError, match=path.name):
        look(config('det', own))


@pytest.mark.parametrize(
    'change, value',
    [
        (lambda a: a.pop('segmentation'), 'absent'),
        (lambda a: a.update(segmentation=[]), '[]'),
        (lambda a: a.update(segmentation=[[]]), '[[]]'),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), '[[1, 2, 3, 4]]'),
        (lambda a: a.update(segmentation=[1, 2, 3, 4, 5, 6]), '[1, 2, 3, 4, 5, 6]'),
        (lambda a: a.update(segmentation=dict(counts=[4096], size=[32, 32])), '[32, 32]'),
    ],
)
@pytest.mark.parametrize('which', ['one', 'all'])
def test_objects_without_a_mask(change: Callable, value: str, which: str, own: Path) -> None:
    def damage(content: dict[str, Any]) -> None:
        for a in content['annotations'] if which == 'all' else content['annotations'][5:6]:
            change(a)

    path = change_json(own, damage)
    findings, _, _ = look(config('det', own))
    said(findings, 'error', path, 'annotation', value, 'with_mask=False')
    cfg = config('det', own)
    without_masks(cfg)
    assert 'error' not in levels(look(cfg)[0])


# --- images


def leave_empty(content: dict[str, Any], image_id: int) -> None:
    """An image without objects, which the filter of the recipe would leave out."""
    kept = [a for a in content['annotations'] if a['image_id'] != image_id]
    a = dict(kept[0], id=9000, image_id=image_id, bbox=[1, 1, 20, 20], iscrowd=0)
    a['segmentation'] = [[1, 1, 21, 1, 21, 21, 1, 21]]
    content['annotations'] = [*kept, a]


def test_exchanged_width_and_height(own: Path) -> None:
    wide = own / 'coco' / 'train2017' / '000000000003.jpg'
    Image.new('RGB', (64, 48), (9, 99, 199)).save(wide)

    def change(content: dict[str, Any]) -> None:
        content['images'][2].update(width=48, height=64)
        leave_empty(content, 3)

    path = change_json(own, change)
    findings, _, _ = look(config('det', own))
    said(findings, 'error', wide, '64 x 48', '48 x 64', 'exchanged')
    assert path.exists()


@pytest.mark.parametrize('size', [(64, 48), (64, 64)])
def test_exif_orientation(size: tuple[int, int], own: Path) -> None:
    """Annotations of the raw pixels: with 64 x 64 nothing but the mark tells."""
    turned = own / 'coco' / 'train2017' / '000000000003.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', size, (9, 99, 199)).save(turned, exif=exif)

    def change(content: dict[str, Any]) -> None:
        content['images'][2].update(width=size[0], height=size[1])
        leave_empty(content, 3)

    change_json(own, change)
    findings, _, _ = look(config('det', own))
    said(findings, 'warning' if size[0] == size[1] else 'error', turned, 6)


def test_cut_image_as_mm_reads_it(own: Path) -> None:
    for path in sorted((own / 'coco' / 'train2017').iterdir()):
        path.write_bytes(path.read_bytes()[:-200])
    findings, _, _ = look(config('det', own))
    said(findings, 'error', 'train2017', 'cannot be decoded')


def test_twelve_bits_in_sixteen(own: Path) -> None:
    cfg = config('seg', own)
    cfg.train_dataloader.dataset.img_suffix = '.png'
    folder = own / 'ade' / 'images' / 'training'
    for path in sorted(folder.iterdir()):
        gray = np.asarray(Image.open(path).convert('L')).astype(np.uint16) * 16
        Image.fromarray(gray).save(path.with_suffix('.png'))
        path.unlink()
    findings, _, _ = look(cfg)
    said(findings, 'warning', folder, '16 bits')
    for path in sorted(folder.iterdir()):
        full = np.asarray(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(full).save(path)
    assert '16 bits' not in ' '.join(f.sentence for f in look(cfg)[0])


def test_image_of_gigabytes_in_kilobytes(own: Path) -> None:
    path = own / 'coco' / 'train2017' / '000000000001.jpg'
    path.unlink()
    Image.new('1', (60_000, 60_000)).save(path, format='png')

    def change(content: dict[str, Any]) -> None:
        content['images'][0].update(width=60_000, height=60_000)
        leave_empty(content, 1)

    change_json(own, change)
    findings, _, _ = look(config('det', own))
    said(findings, 'error', path)


@pytest.mark.parametrize(
    'task, part', [('det', 'coco/train2017'), ('seg', 'ade/annotations/training')]
)
def test_pipes_in_place_of_files_are_not_waited_for(task: str, part: str, own: Path) -> None:
    path = sorted((own / part).iterdir())[0]
    path.unlink()
    os.mkfifo(path)
    findings, _, _ = look(config(task, own))
    said(findings, 'error', path, 'regular file')


# --- label maps


def maps(root: Path) -> list[Path]:
    return sorted((root / 'ade' / 'annotations' / 'training').iterdir())


def change_maps(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in maps(root):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def own_classes(cfg: Config, classes: list[str], reduce: bool) -> Config:
    dataset = cfg.train_dataloader.dataset
    dataset.metainfo = dict(classes=classes)
    dataset.reduce_zero_label = reduce
    for step in dataset.pipeline:
        if step.type == 'LoadAnnotations':
            step.reduce_zero_label = reduce
    return cfg


@pytest.mark.parametrize('reduce', [False, True])
@pytest.mark.parametrize('values', [(0, 255), (0, 1)])
def test_masks_of_two_values(values: tuple[int, int], reduce: bool, own: Path) -> None:
    change_maps(own, lambda labels: np.where(labels > 2, *values[::-1]).astype(np.uint8))
    cfg = own_classes(config('seg', own), ['background', 'object'], reduce)
    findings, _, summaries = look(cfg)
    if values == (0, 1) and not reduce:
        assert 'error' not in levels(findings)
        assert all(summaries[0].classes.values())
    else:
        said(findings, 'error', 255, 'ADE_train_00000001.png')


@pytest.mark.parametrize(
    'change',
    [
        lambda labels: labels[::2, ::2],
        lambda labels: np.rot90(labels[:48]).copy(),
    ],
    ids=['half', 'turned'],
)
def test_label_map_of_another_size(change: Callable, own: Path) -> None:
    change_maps(own, change)
    findings, _, _ = look(config('seg', own))
    said(findings, 'error', 'ADE_train_00000001.png', '64 x 64')


def test_label_beyond_the_classes(own: Path) -> None:
    change_maps(own, lambda labels: np.where(labels == labels.max(), 9, labels).astype(np.uint8))
    findings, _, _ = look(config('seg', own))
    said(findings, 'error', 'the label 9', 'reach to 7')


def test_label_beyond_the_classes_without_reduction(own: Path) -> None:
    """The commonest slip: labels 1 to 7 with 7 classes, and nothing is reduced."""
    change_maps(own, lambda labels: np.where(labels == labels.max(), 7, labels).astype(np.uint8))
    cfg = config('seg', own)
    own_classes(cfg, list(cfg.train_dataloader.dataset.metainfo.classes), False)
    findings, _, _ = look(cfg)
    said(findings, 'error', 'the label 7', 'reach to 6')


def test_two_reductions_that_differ(own: Path) -> None:
    cfg = config('seg', own)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'LoadAnnotations':
            step.reduce_zero_label = True
    cfg.train_dataloader.dataset.reduce_zero_label = False
    findings, _, _ = look(cfg)
    said(findings, 'error', 'reduce_zero_label is False')


def test_class_that_never_occurs(own: Path) -> None:
    change_maps(own, lambda labels: np.where(labels == 3, 1, labels).astype(np.uint8))
    cfg = config('seg', own)
    findings, _, _ = look(cfg)
    said(findings, 'warning', 'never occur', cfg.train_dataloader.dataset.metainfo.classes[2])


def test_images_of_another_suffix(own: Path) -> None:
    folder = own / 'ade' / 'images' / 'training'
    images = sorted(folder.iterdir())
    for path in images[:5]:
        path.rename(path.with_suffix('.JPG'))
    findings, dataset, _ = look(config('seg', own))
    said(findings, 'warning', '5 of 24', '.JPG')
    assert len(dataset) == 19
    for path in images[5:20]:
        path.rename(path.with_suffix('.jpeg'))
    said(look(config('seg', own))[0], 'error', '20 of 24', '.jpeg')


@pytest.mark.parametrize(
    'text, fault',
    [
        ('\ufeff{}\n', 'byte-order mark'),
        ('{}\n\n\n', 'empty'),
        ('\u200b{}\r\n', 'invisible'),
    ],
)
def test_list_of_images(text: str, fault: str, own: Path) -> None:
    stems = [path.stem for path in maps(own)]
    names = own / 'ade' / 'train.txt'
    names.write_text(text.format('\n'.join(stems)), 'utf-8')
    cfg = config('seg', own)
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    findings, dataset, _ = look(cfg)
    said(findings, 'warning', names, fault)
    assert len(dataset) == 24


# --- other data sets of mm


def voc(root: Path, names: list[str]) -> dict[str, Any]:
    """The shapes as Pascal VOC; the config of the data set."""
    content = json.loads((root / 'coco' / TRAIN_JSON).read_text())
    folder = root / 'voc'
    for part in ('JPEGImages', 'Annotations'):
        (folder / part).mkdir(parents=True)
    for image in content['images']:
        stem = Path(image['file_name']).stem
        shutil.copy(root / 'coco' / 'train2017' / image['file_name'], folder / 'JPEGImages')
        objects = ''.join(
            f'<object><name>{names[a["category_id"] - 1]}</name><bndbox><xmin>{x + 1}</xmin>'
            f'<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>'
            for a in content['annotations']
            if a['image_id'] == image['id']
            for x, y, w, h in [a['bbox']]
        )
        (folder / 'Annotations' / f'{stem}.xml').write_text(
            f'<annotation><size><width>64</width><height>64</height></size>{objects}</annotation>'
        )
    stems = [Path(image['file_name']).stem for image in content['images']]
    (folder / 'train.txt').write_text('\n'.join(stems))
    return dict(
        type='XMLDataset',
        data_root=str(folder),
        ann_file='train.txt',
        data_prefix=dict(sub_data_root='.'),
        metainfo=dict(classes=NAMES),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)],
    )


@pytest.mark.parametrize(
    'names, level',
    [
        (NAMES, None),
        (['Disc', *NAMES[1:]], 'warning'),
        ([name.upper() for name in NAMES], 'error'),
    ],
)
def test_pascal_voc(names: list[str], level: str | None, own: Path) -> None:
    cfg = config('det', own)
    cfg.train_dataloader.dataset = voc(own, names)
    findings, _, summaries = look(cfg)
    if level is None:
        assert not levels(findings), findings
        assert all(summaries[0].classes.values())
    else:
        said(findings, level, repr(names[0]), 'dropped')


def test_data_set_of_the_users_own(own: Path, tmp_path: Path) -> None:
    """mm's own format of annotations: boxes outside of the image, a label beyond the classes."""
    names = sorted(p.name for p in (own / 'coco' / 'train2017').iterdir())
    good = dict(bbox=[3, 3, 30, 30], bbox_label=0, ignore_flag=0)

    def found(*instances: dict[str, Any]) -> list[Finding]:
        entries = [
            dict(img_path=name, height=64, width=64, img_id=i, instances=list(instances))
            for i, name in enumerate(names)
        ]
        content = dict(metainfo=dict(classes=NAMES), data_list=entries)
        (own / 'coco' / 'own.json').write_text(json.dumps(content))
        cfg = config('det', own)
        cfg.train_dataloader.dataset = dict(
            type='BaseDetDataset',
            data_root=str(own / 'coco'),
            ann_file='own.json',
            data_prefix=dict(img_path='train2017'),
            metainfo=dict(classes=NAMES),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)],
        )
        return look(cfg)[0]

    assert 'error' not in levels(found(good))
    said(found(good | dict(bbox=[80, 3, 99, 30])), 'error', '[80, 3, 99, 30]')
    said(found(good | dict(bbox_label=5)), 'error', 'the label 5')
    said(found(), 'error', 'no object')


# --- mutations of a good data set


def permute(content: dict[str, Any], rng: np.random.Generator) -> None:
    for key in ('images', 'annotations', 'categories'):
        rng.shuffle(content[key])


def drop_field(content: dict[str, Any], rng: np.random.Generator) -> None:
    key = rng.choice(['images', 'annotations', 'categories'])
    name = rng.choice(sorted(content[key][0]))
    for item in content[key]:
        if rng.random() < 0.5:
            item.pop(name)


def scale(content: dict[str, Any], rng: np.random.Generator) -> None:
    factor = rng.choice([1 / 64, 0.25, 0.5, 2, 4])
    for a in content['annotations']:
        a['bbox'] = [v * factor for v in a['bbox']]


def rotate(content: dict[str, Any], rng: np.random.Generator) -> None:
    for a in content['annotations']:
        x, y, w, h = a['bbox']
        a['bbox'] = [64 - y - h, x, h, w]


def retype(content: dict[str, Any], rng: np.random.Generator) -> None:
    key = rng.choice(['images', 'annotations', 'categories'])
    name = rng.choice(sorted(content[key][0]))
    change = rng.choice([str, lambda v: None, lambda v: [v], float, lambda v: {'value': v}])
    for item in content[key]:
        try:
            item[name] = change(item[name])
        except (TypeError, ValueError):
            return


def shift(content: dict[str, Any], rng: np.random.Generator) -> None:
    key, name = [
        ('annotations', 'category_id'),
        ('annotations', 'image_id'),
        ('annotations', 'id'),
    ][rng.integers(3)]
    by = int(rng.choice([-1, 1]))
    for item in content[key]:
        item[name] += by


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mutations=st.lists(
        st.sampled_from([permute, drop_field, scale, rotate, retype, shift]), min_size=1, max_size=2
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_mutated_data_is_refused_named_or_measures_the_same(
    mutations: list[Callable], seed: int, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The true boxes and masks are the predictions: AP is 1, or something is said."""
    root = tmp_path_factory.mktemp('mutated')
    (root / 'coco' / 'annotations').mkdir(parents=True)
    for name in ('train2017', 'val2017'):
        (root / 'coco' / name).symlink_to(shapes / 'coco' / name)
    content = json.loads((shapes / 'coco' / TRAIN_JSON).read_text())
    content['annotations'] = [a for a in content['annotations'] if not a['iscrowd']]
    good = copy.deepcopy(content)
    for mutation in mutations:
        try:
            mutation(content, np.random.default_rng(seed))
        except (KeyError, TypeError):
            return  # the first left nothing for the second
    (root / 'coco' / TRAIN_JSON).write_text(json.dumps(content))
    cfg = config('det', root)
    try:
        findings, dataset, _ = look(cfg)
    except UserError:
        return
    if 'error' in levels(findings) or any('completed' not in f.sentence for f in findings):
        return
    assert average_precision(dataset, good) == {'bbox_mAP': 1.0, 'segm_mAP': 1.0}


def average_precision(dataset: Any, good: dict[str, Any]) -> dict[str, float]:
    """What mm's metric gives for the objects of `good` as predictions on `dataset`."""
    import torch
    from mmdet.evaluation import CocoMetric
    from pycocotools import mask as rle

    metric = CocoMetric(ann_file=dataset.ann_file, metric=['bbox', 'segm'])
    metric.dataset_meta = dataset.metainfo
    ids = {i['file_name']: i['id'] for i in good['images']}
    names = {c['id']: c['name'] for c in good['categories']}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        objects = [
            a for a in good['annotations'] if a['image_id'] == ids[Path(info['img_path']).name]
        ]
        boxes = np.asarray([a['bbox'] for a in objects], np.float32).reshape(-1, 4)
        masks = [rle.decode(rle.frPyObjects(a['segmentation'], 64, 64)) for a in objects]
        pred = InstanceData(
            bboxes=torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)),
            scores=torch.ones(len(objects)),
            labels=torch.tensor(
                [dataset.metainfo['classes'].index(names[a['category_id']]) for a in objects],
                dtype=torch.long,
            ),
            masks=torch.from_numpy(np.asarray(masks, bool).reshape(-1, 64, 64)),
        )
        sample = dict(img_id=info['img_id'], ori_shape=(64, 64), pred_instances=pred)
        metric.process({}, [sample])
    results = metric.evaluate(len(dataset))
    return {key.removeprefix('coco/'): results[key] for key in ('coco/bbox_mAP', 'coco/segm_mAP')}

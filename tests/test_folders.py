"""Folders of labeled images: each format from real images, and what is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import labeled_folders as made
import numpy as np
import pytest
from PIL import Image

from repnext_mm.datasets.folders import (
    DataError,
    Example,
    LabeledFolder,
    Object,
    read_folder,
    split_examples,
)
from repnext_mm.datasets.folders.masks import must_convert, read_indices, write_index_masks
from repnext_mm.datasets.folders.records import coco_record
from repnext_mm.runtimes.predictor import run_lengths


@pytest.fixture(scope='module')
def real(data_root: Path) -> LabeledFolder:
    return made.real(data_root)


def by_name(folder: LabeledFolder) -> dict[str, Example]:
    return {Path(example.file).name: example for example in folder.examples()}


def same_objects(
    found: Example, wanted: Example, names: tuple[LabeledFolder, LabeledFolder], polygons: bool
) -> None:
    assert (found.height, found.width) == (wanted.height, wanted.width)
    assert len(found.objects) == len(wanted.objects)
    for one, other in zip(found.objects, wanted.objects, strict=True):
        assert names[0].classes[one.label] == names[1].classes[other.label]
        if polygons:
            assert isinstance(one.segmentation, list)
            assert isinstance(other.segmentation, list)
            for got, given in zip(one.segmentation, other.segmentation, strict=True):
                np.testing.assert_allclose(got, given, atol=1e-9, rtol=0)
        if not polygons or one.box == other.box:
            np.testing.assert_allclose(one.box, other.box, atol=1e-9, rtol=0)


@pytest.mark.parametrize('name', made.WRITERS)
def test_the_same_objects_are_read_back(name: str, real: LabeledFolder, tmp_path: Path) -> None:
    examples = made.some(real, 40)
    if name == 'yolo':
        examples = made.single(examples)
    assert len(examples) >= 8
    made.WRITERS[name](real, examples, tmp_path)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob('*'))
    folder = read_folder(tmp_path)
    boxes = name in ('yolo_boxes', 'pascal_voc')
    assert folder.kind == ('boxes' if boxes else 'polygons')
    assert folder.classes == real.classes
    found = by_name(folder)
    assert set(found) == {Path(e.file).name for e in examples}
    for example in examples:
        same_objects(found[Path(example.file).name], example, (folder, real), not boxes)
        assert (tmp_path / found[Path(example.file).name].file).is_file()
    splits = {'train', 'val'} if name == 'pascal_voc' else {'train'}
    assert set(folder.splits) == splits
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob('*')) == before


def test_what_is_written_for_mmdet_is_what_was_read(real: LabeledFolder, tmp_path: Path) -> None:
    record = coco_record(real.splits['train'], real.classes)
    (tmp_path / 'instances_train.json').write_text(json.dumps(record))
    for example in real.splits['train']:
        (tmp_path / example.file).parent.mkdir(exist_ok=True)
        shutil.copy(real.root / example.file, tmp_path / example.file)
    again = read_folder(tmp_path)
    assert again.splits == {'train': real.splits['train']}  # run lengths of crowds as well


def test_crowds_and_areas_are_those_of_coco(real: LabeledFolder, data_root: Path) -> None:
    path = data_root / 'coco' / 'annotations' / 'instances_train2017.json'
    given = json.loads(path.read_text())
    objects = [o for e in real.splits['train'] for o in e.objects]
    assert sum(o.crowd for o in objects) == sum(a['iscrowd'] for a in given['annotations']) > 0
    assert sorted(o.area or 0 for o in objects) == sorted(a['area'] for a in given['annotations'])


@pytest.mark.parametrize('how', ['index', 'palette', 'color', 'roboflow', 'cvat', 'camvid'])
def test_label_maps(how: str, data_root: Path, tmp_path: Path) -> None:
    wanted = made.label_maps(data_root, tmp_path / 'data', how)
    folder = read_folder(tmp_path / 'data')
    assert folder.kind == 'masks'
    assert must_convert(folder) == (how in ('color', 'cvat', 'camvid'))
    assert all(name.startswith('thing') for name in folder.classes)
    examples = list(folder.examples())
    assert {Path(e.file).name for e in examples} == set(wanted)
    for example in examples:
        np.testing.assert_array_equal(
            read_indices(folder, example), wanted[Path(example.file).name]
        )
    written = write_index_masks(folder, examples, tmp_path / 'copies')
    for file, copy in written.items():
        got = np.asarray(Image.open(tmp_path / 'copies' / copy))
        np.testing.assert_array_equal(got, wanted[Path(file).name])


def test_ade20k(data_root: Path) -> None:
    folder = read_folder(data_root / 'ade' / 'ADEChallengeData2016')
    assert (folder.kind, len(folder.classes), folder.zero_is_ignored) == ('masks', 150, True)
    assert {name: len(found) for name, found in folder.splits.items()} == {'train': 2, 'val': 1}
    example = folder.splits['val'][0]
    raw = np.asarray(Image.open(folder.root / str(example.mask))).astype(int)
    np.testing.assert_array_equal(read_indices(folder, example), np.where(raw == 0, 255, raw - 1))


def image(path: Path, size: tuple[int, int] = (20, 30), value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def test_foreground_of_255(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9] = 255
    image(tmp_path / 'images' / 'a.png')
    (tmp_path / 'masks').mkdir()
    Image.fromarray(mask).save(tmp_path / 'masks' / 'a.png')
    folder = read_folder(tmp_path)
    assert folder.classes == ('background', 'foreground')
    (example,) = folder.examples()
    np.testing.assert_array_equal(read_indices(folder, example), mask // 255)


def test_class_folders(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name in ('class 10', 'class 2'):
            image(tmp_path / split / name / 'x.jpg')
    folder = read_folder(tmp_path)
    assert (folder.kind, folder.classes) == ('classes', ('class 2', 'class 10'))
    assert [e.label for e in folder.splits['val']] == [0, 1]
    shutil.rmtree(tmp_path / 'val' / 'class 2')
    with pytest.raises(DataError, match=r"val of .* has no folder for the class 'class 2'"):
        read_folder(tmp_path)


def shapes(path: Path, *items: dict[str, Any]) -> None:
    record = dict(shapes=list(items), imagePath='a.png', imageData=None)
    path.write_text(json.dumps(record))


def test_the_shapes_of_labelme(tmp_path: Path) -> None:
    image(tmp_path / 'a.png')
    mask = np.zeros((6, 4), bool)
    mask[2:5, 1:] = True
    shapes(
        tmp_path / 'a.json',
        dict(label='cat', points=[[3, 9], [11, 4]], shape_type='rectangle'),
        dict(label='dog', points=[[10, 10], [14, 10]], shape_type='circle'),
        dict(label='cat', points=[[7, 2], [10, 7]], shape_type='mask', mask=made.as_picture(mask)),
        dict(label='cat', points=[[1, 1]], shape_type='point'),
    )
    folder = read_folder(tmp_path)
    (example,) = folder.examples()
    rectangle, circle, painted = example.objects
    assert rectangle.box == (3, 4, 8, 5)
    np.testing.assert_allclose(circle.box, (6, 6, 8, 8), atol=1e-9)
    assert painted.box == (8, 4, 3, 3)
    full = np.zeros((20, 30), bool)
    full[2:8, 7:11] = mask
    assert painted.segmentation == run_lengths(full)
    assert any('1 shapes of the kind point' in note for note in folder.notes)


def test_coordinates_of_the_challenge_count_from_1(tmp_path: Path) -> None:
    image(tmp_path / 'a.png')
    text = (
        '<annotation><filename>a.png</filename><source><database>{}</database></source><object>'
        '<name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax>'
        '<ymax>8</ymax></bndbox></object></annotation>'
    )
    for source, box in (('The VOC2007 Database', (0, 1, 9, 7)), ('Unknown', (1, 2, 8, 6))):
        (tmp_path / 'a.xml').write_text(text.format(source))
        (example,) = read_folder(tmp_path).examples()
        assert (example.objects[0].box, example.objects[0].crowd) == (box, True)


def write_yolo(root: Path, line: str, yaml: str = 'names: [cat, dog]\ntrain: train/images') -> None:
    image(root / 'train' / 'images' / 'a.jpg')
    (root / 'train' / 'labels').mkdir(parents=True, exist_ok=True)
    (root / 'train' / 'labels' / 'a.txt').write_text(line)
    (root / 'data.yaml').write_text(yaml)


@pytest.mark.parametrize(
    'line, said',
    [
        ('2 .5 .5 .1 .1', r'a.txt, line 1: the class 2 must be from 0 to 1'),
        ('0 .5 .5 .1', '3 numbers after the class must be 4'),
        ('0 .5 1.5 .1 .1', 'coordinates must be from 0 to 1'),
        ('0 .5 nan .1 .1', 'coordinates must be from 0 to 1'),
        ('0 .5 .5 .1 x', 'is not a line of numbers'),
    ],
)
def test_lines_of_yolo(line: str, said: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, line)
    with pytest.raises(DataError, match=said):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    'yaml',
    [
        'names: [cat, dog]\ntrain: ../train/images\nval: ../valid/images',  # Roboflow
        'names: {0: cat, 1: dog}\npath: /data/pets\ntrain: train/images',
        'names: [cat, dog]',
    ],
)
def test_paths_in_data_yaml(yaml: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, '1 .5 .5 .5 .5', yaml)
    folder = read_folder(tmp_path)
    assert folder.splits == {
        'train': [Example('train/images/a.jpg', 20, 30, [Object(1, (7.5, 5.0, 15.0, 10.0))])]
    }


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le'])
def test_texts_as_other_systems_write_them(encoding: str, tmp_path: Path) -> None:
    write_yolo(tmp_path, '1 .5 .5 .5 .5', 'names: [cat, Ähre]')
    for path in [*tmp_path.rglob('*.txt'), *tmp_path.rglob('*.yaml')]:
        path.write_bytes(path.read_text('utf-8').replace('\n', '\r\n').encode(encoding))
    folder = read_folder(tmp_path)
    assert folder.classes == ('cat', 'Ähre')
    assert [row.label for row in next(folder.examples()).objects] == [1]


def test_an_image_without_labels_is_one_without_objects(tmp_path: Path) -> None:
    write_yolo(tmp_path, '1 .5 .5 .5 .5')
    image(tmp_path / 'train' / 'images' / 'b.jpg')
    (tmp_path / 'train' / 'labels' / 'c.txt').write_text('0 .5 .5 .5 .5')
    folder = read_folder(tmp_path)
    assert [len(e.objects) for e in folder.examples()] == [1, 0]
    assert folder.notes == [
        '1 images have no label file: they are images without objects.',
        '1 label files have no image and are left out, the first is train/labels/c.txt.',
    ]


def refusals(root: Path) -> dict[str, str]:
    """Folders that cannot be used, and what is said."""
    (root / 'empty').mkdir()
    image(root / 'unlabeled' / 'a.jpg')
    write_yolo(root / 'both', '0 .5 .5 .5 .5')
    shapes(root / 'both' / 'train' / 'images' / 'a.json')
    write_yolo(root / 'unnamed', '0 .5 .5 .5 .5')
    (root / 'unnamed' / 'data.yaml').unlink()
    write_yolo(root / 'lone', '0 .5 .5 .5 .5')
    (root / 'lone' / 'train' / 'images' / 'a.jpg').unlink()
    image(root / 'no label' / 'train' / 'images' / 'a.jpg')
    (root / 'no label' / 'data.yaml').write_text('names: [cat]\ntrain: train/images')
    image(root / 'color' / 'images' / 'a.png')
    image(root / 'color' / 'masks' / 'a.png')
    image(root / 'size' / 'images' / 'a.png')
    (root / 'size' / 'masks').mkdir()
    Image.new('L', (3, 4)).save(root / 'size' / 'masks' / 'a.png')
    return {
        'empty': 'has no image in a format that is known',
        'unlabeled': 'has 1 images and no labels in a format that is known',
        'both': 'labels of 2 formats: YOLO .* and LabelMe .*--format yolo|labelme',
        'unnamed': 'labels of YOLO and no class names; add data.yaml',
        'lone': 'labels of YOLO, and no image was found',
        'no label': 'has 1 images and none has a label file',
        'color': r'in color \(\[9, 9, 9\] ...\) and nothing says .* class_dict.csv',
        'size': 'has 3 x 4 pixels and its image a.png has 30 x 20',
    }


def test_folders_that_are_refused(tmp_path: Path) -> None:
    for name, said in refusals(tmp_path).items():
        with pytest.raises(DataError, match=said):
            read_folder(tmp_path / name)
    with pytest.raises(DataError, match='there is no folder'):
        read_folder(tmp_path / 'absent')
    assert read_folder(tmp_path / 'both', 'yolo').format == 'YOLO'


def test_splits_of_other_classes_are_refused(real: LabeledFolder, tmp_path: Path) -> None:
    examples = made.some(real, 2)
    made.coco(real, examples[:1], tmp_path)
    content = made.coco_content(real, examples[1:])
    content['categories'].reverse()  # the same classes in another order are the same
    made.copy(real, examples[1], tmp_path / 'val')
    path = tmp_path / 'annotations' / 'instances_val.json'
    path.write_text(json.dumps(content))
    folder = read_folder(tmp_path)
    assert [o.label for o in folder.splits['val'][0].objects] == [
        o.label for o in examples[1].objects
    ]
    content['categories'] = [c for c in content['categories'] if c['name'] != 'toaster']
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"have different classes .*only one has 'toaster'"):
        read_folder(tmp_path)


def test_images_that_are_set_aside() -> None:
    examples = [Example(f'{group}_{i}.jpg') for group in 'abcdefgh' for i in range(5)]
    train, val = split_examples(examples, 0.25)
    assert len(val) == 10
    assert sorted(e.file for e in train + val) == sorted(e.file for e in examples)
    assert split_examples(examples[::-1], 0.25)[1] == val[::-1]
    train, val = split_examples(examples, 0.25, r'^(\w)_')
    assert {e.file[0] for e in train}.isdisjoint(e.file[0] for e in val)
    assert len(val) == 10
    assert split_examples(examples, 0) == (examples, examples)
    for group_by, said in (('^', 'one group'), ('(', 'no regular expression')):
        with pytest.raises(DataError, match=said):
            split_examples(examples, 0.2, group_by)


@pytest.mark.parametrize('name', ['coco', 'yolo', 'pascal_voc', 'labelme'])
def test_what_another_library_writes_is_read(
    name: str, real: LabeledFolder, tmp_path: Path
) -> None:
    """supervision writes the boxes; whole numbers, as its Pascal VOC rounds."""
    sv = pytest.importorskip('supervision', reason='supervision is not installed')
    examples = made.some(real, 12)
    annotations, wanted = {}, {}
    for example in examples:
        boxes = np.array([item.box for item in example.objects], np.float32)
        boxes = np.round(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        labels = np.array([item.label for item in example.objects])
        path = str(real.root / example.file)
        annotations[path] = sv.Detections(xyxy=boxes, class_id=labels)
        wanted[Path(path).name] = boxes, labels
    dataset = sv.DetectionDataset(list(real.classes), list(annotations), annotations)
    images, labels_dir = tmp_path / 'train' / 'images', tmp_path / 'train' / 'labels'
    if name == 'coco':
        file = tmp_path / 'train' / '_annotations.coco.json'
        dataset.as_coco(images_directory_path=str(tmp_path / 'train'), annotations_path=str(file))
    elif name == 'yolo':
        dataset.as_yolo(str(images), str(labels_dir), str(tmp_path / 'data.yaml'))
    elif name == 'labelme':
        dataset.as_labelme(str(tmp_path), str(tmp_path))
    else:
        dataset.as_pascal_voc(str(tmp_path / 'JPEGImages'), str(tmp_path / 'Annotations'))
    folder = read_folder(tmp_path)
    assert folder.kind == 'boxes'
    found = by_name(folder)
    assert set(found) == set(wanted)
    # YOLO's text has five digits of a part of the image.
    tolerance = 640 * 1e-5 if name == 'yolo' else 0
    for file_name, (boxes, labels) in wanted.items():
        items = found[file_name].objects
        assert [folder.classes[i.label] for i in items] == [real.classes[n] for n in labels]
        got = np.array([item.box for item in items])
        np.testing.assert_allclose(got[:, :2], boxes[:, :2], atol=2 * tolerance)
        np.testing.assert_allclose(got[:, :2] + got[:, 2:], boxes[:, 2:], atol=2 * tolerance)

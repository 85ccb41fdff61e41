"""The same real images with labels, written in each format by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from repnext_mm.datasets.folders import Example, LabeledFolder, read_folder

Writer = Callable[[LabeledFolder, list[Example], Path], None]


def some(folder: LabeledFolder, count: int) -> list[Example]:
    """Examples whose objects have polygons alone, as every format can say them."""
    plain = [
        e
        for e in folder.examples()
        if e.objects and all(isinstance(o.segmentation, list) and not o.crowd for o in e.objects)
    ]
    return plain[:count]


def single(examples: list[Example]) -> list[Example]:
    """Examples whose objects have one polygon each, as YOLO's lines."""
    return [e for e in examples if all(len(o.segmentation or ()) == 1 for o in e.objects)]


def copy(folder: LabeledFolder, example: Example, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(folder.root / example.file, target))


def coco(folder: LabeledFolder, examples: list[Example], root: Path, **changes: Any) -> None:
    """Plain COCO: annotations/instances_train.json and train/."""
    content = coco_content(folder, examples)
    for example in examples:
        copy(folder, example, root / 'train')
    (root / 'annotations').mkdir(parents=True)
    (root / 'annotations' / 'instances_train.json').write_text(json.dumps(content | changes))


def coco_content(folder: LabeledFolder, examples: list[Example], first: int = 1) -> dict[str, Any]:
    """Ids are far apart, as those of COCO itself."""
    images, annotations = [], []
    for i, example in enumerate(examples):
        name, size = Path(example.file).name, dict(height=example.height, width=example.width)
        images.append(dict(id=100 + 7 * i, file_name=name, **size))
        for item in example.objects:
            annotations.append(
                dict(
                    id=len(annotations) + 11,
                    image_id=100 + 7 * i,
                    category_id=first + item.label,
                    bbox=list(item.box),
                    segmentation=item.segmentation,
                    area=item.area,
                    iscrowd=0,
                )
            )
    categories = [dict(id=first + i, name=name) for i, name in enumerate(folder.classes)]
    return dict(images=images, annotations=annotations, categories=categories)


def roboflow(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    """train/_annotations.coco.json beside the images; category 0 is the project."""
    content = coco_content(folder, examples)
    for category in content['categories']:
        category['supercategory'] = 'project'
    content['categories'].insert(0, dict(id=0, name='project', supercategory='none'))
    for example in examples:
        copy(folder, example, root / 'train')
    (root / 'train' / '_annotations.coco.json').write_text(json.dumps(content))


def cvat(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    """annotations/instances_default.json and images/default/."""
    for example in examples:
        copy(folder, example, root / 'images' / 'default')
    (root / 'annotations').mkdir(parents=True)
    text = json.dumps(coco_content(folder, examples))
    (root / 'annotations' / 'instances_default.json').write_text(text)


def label_studio(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    """result.json, ids from 0, and names with the folders of the server that had the images."""
    content = coco_content(folder, examples, first=0)
    for image in content['images']:
        image['file_name'] = f'..\\data\\media\\upload\\1/{image["file_name"]}'
    for example in examples:
        copy(folder, example, root / 'images')
    (root / 'result.json').write_text(json.dumps(content))


def yolo(folder: LabeledFolder, examples: list[Example], root: Path, polygons: bool = True) -> None:
    """images/train, labels/train and data.yaml."""
    for example in examples:
        image = copy(folder, example, root / 'images' / 'train')
        sides = example.width, example.height
        lines = []
        for item in example.objects:
            if polygons:
                (flat,) = item.segmentation  # type: ignore[misc]
                values = [v / s for v, s in zip(flat, sides * len(flat), strict=False)]
            else:
                x, y, w, h = item.box
                values = [
                    (x + w / 2) / sides[0],
                    (y + h / 2) / sides[1],
                    w / sides[0],
                    h / sides[1],
                ]
            lines.append(' '.join([str(item.label), *map(repr, values)]))
        labels = root / 'labels' / 'train' / f'{image.stem}.txt'
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text('\n'.join(lines) + '\n')
    names = '\n'.join(f'  {i}: {name}' for i, name in enumerate(folder.classes))
    (root / 'data.yaml').write_text(f'train: images/train\nnames:\n{names}\n')


def yolo_boxes(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    yolo(folder, examples, root, polygons=False)


def pascal_voc(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    """JPEGImages, Annotations and ImageSets/Main, with coordinates that have parts of a pixel."""
    for example in examples:
        image = copy(folder, example, root / 'JPEGImages')
        tree = ElementTree.Element('annotation')
        ElementTree.SubElement(tree, 'filename').text = image.name
        for item in example.objects:
            node = ElementTree.SubElement(tree, 'object')
            ElementTree.SubElement(node, 'name').text = folder.classes[item.label]
            box = ElementTree.SubElement(node, 'bndbox')
            x, y, w, h = item.box
            for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), (x, y, x + w, y + h)):
                ElementTree.SubElement(box, key).text = repr(value)
        path = root / 'Annotations' / f'{image.stem}.xml'
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(tree).write(path)
    lists = root / 'ImageSets' / 'Main'
    lists.mkdir(parents=True)
    stems = [Path(example.file).stem for example in examples]
    (lists / 'train.txt').write_text('\n'.join(stems[:-1]) + '\n')
    (lists / 'val.txt').write_text(stems[-1] + '\n')
    (lists / 'person_train.txt').write_text(''.join(f'{stem}  1\n' for stem in stems))
    (root / 'classes.txt').write_text('\n'.join(folder.classes))


def labelme(folder: LabeledFolder, examples: list[Example], root: Path) -> None:
    """A JSON beside each image; an object of several polygons is a group, one is a mask."""
    for example in examples:
        image = copy(folder, example, root)
        shapes = []
        for number, item in enumerate(example.objects):
            for flat in item.segmentation or ():
                shapes.append(
                    dict(
                        label=folder.classes[item.label],
                        points=[list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)],
                        group_id=number,
                        shape_type='polygon',
                        flags={},
                    )
                )
        content = dict(
            version='5.5.0',
            flags={},
            shapes=shapes,
            imagePath=image.name,
            imageData=None,
            imageHeight=example.height,
            imageWidth=example.width,
        )
        image.with_suffix('.json').write_text(json.dumps(content))
    (root / 'classes.txt').write_text('\n'.join(folder.classes))


def as_picture(mask: np.ndarray) -> str:
    """How LabelMe stores the mask of a box."""
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert('1').save(stream, format='PNG')
    return base64.b64encode(stream.getvalue()).decode()


#: Formats that can say boxes and polygons.
WRITERS: dict[str, Writer] = {
    'coco': coco,
    'roboflow': roboflow,
    'cvat': cvat,
    'label_studio': label_studio,
    'labelme': labelme,
    'yolo': yolo,
    'yolo_boxes': yolo_boxes,
    'pascal_voc': pascal_voc,
}


# --- label maps


def label_maps(data: Path, root: Path, how: str) -> dict[str, np.ndarray]:
    """Real ADE20K label maps as `how` says; returns the class indices of each, 255 for none.

    'index', 'palette', 'color' (with class_dict.csv), 'roboflow' (beside, with _classes.csv),
    'cvat' (SegmentationClass with labelmap.txt), 'camvid' (train_labels).
    """
    ade = data / 'ade' / 'ADEChallengeData2016'
    found: dict[str, np.ndarray] = {}
    masks = {p.stem: np.asarray(Image.open(p)) for p in ade.glob('annotations/*/*.png')}
    values = sorted({int(v) for mask in masks.values() for v in np.unique(mask)} - {0})
    places = np.full(256, 255, np.uint8)
    places[values] = np.arange(len(values))
    names = [f'thing {value}' for value in values]
    rng = np.random.default_rng(0)
    colors = rng.permutation(255)[: 3 * len(values)] if len(values) * 3 <= 255 else None
    palette = (
        np.array(colors).reshape(-1, 3)
        if colors is not None
        else np.stack(
            [np.arange(len(values)), np.arange(len(values))[::-1], np.full(len(values), 9)], 1
        )
    ).astype(np.uint8)
    full = np.full((256, 3), 255, np.uint8)
    full[: len(values)] = palette
    for image in sorted(ade.glob('images/*/*.jpg')):
        indices = places[masks[image.stem]]
        found[image.name] = indices
        folders = {
            'roboflow': ('train', 'train', f'{image.stem}_mask.png'),
            'cvat': ('JPEGImages', 'SegmentationClass', f'{image.stem}.png'),
            'camvid': ('train', 'train_labels', f'{image.stem}_L.png'),
        }
        images, labels, name = folders.get(how, ('images', 'masks', f'{image.stem}.png'))
        (root / images).mkdir(parents=True, exist_ok=True)
        (root / labels).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / images)
        picture = Image.fromarray(indices)
        if how == 'palette':
            picture.putpalette(full.reshape(-1).tolist())
        if how in ('color', 'cvat', 'camvid'):
            picture = Image.fromarray(full[indices])
        picture.save(root / labels / name)
    if how in ('index', 'palette'):
        (root / 'classes.txt').write_text('\n'.join(names))
    elif how == 'roboflow':
        rows = [('Pixel Value', ' Class'), *((i, f' {name}') for i, name in enumerate(names))]
        with (root / 'train' / '_classes.csv').open('w', newline='') as file:
            csv.writer(file).writerows(rows)
    elif how == 'cvat':
        rows_text = [f'{n}:{r},{g},{b}::' for n, (r, g, b) in zip(names, palette, strict=True)]
        (root / 'labelmap.txt').write_text(
            '# label:color_rgb:parts:actions\n' + '\n'.join(rows_text)
        )
    else:
        with (root / 'class_dict.csv').open('w', newline='') as file:
            csv.writer(file).writerows(
                [('name', 'r', 'g', 'b'), *((n, *c) for n, c in zip(names, palette.tolist()))]
            )
    return found


def real(data: Path) -> LabeledFolder:
    """The real COCO sample."""
    return read_folder(data / 'coco')

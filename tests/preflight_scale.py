"""Time of the pre-flight on as many images as COCO train2017 has; run it as a program.

    python tests/preflight_scale.py

The annotations are made up, with seven objects in an image; every image is a link to one file.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

import tool_runs
from mmengine.registry import DefaultScope
from tool_runs import CONFIGS

from repnext_mm.datasets.shapes import THINGS
from repnext_mm.engine.config_file import load_config
from repnext_mm.engine.frameworks import import_framework
from repnext_mm.engine.preflight import check_sources, require
from repnext_mm.engine.preflight.built import check_dataset

IMAGES, OBJECTS = 118_287, 7


def make(root: Path) -> Path:
    """A data set in COCO's layout; returns its annotation file."""
    tiny = tool_runs.tiny_shapes(root / 'tiny', train=1, val=1)
    picture = next((tiny / 'coco' / 'train2017').iterdir())
    folder = root / 'coco' / 'train2017'
    folder.mkdir(parents=True)
    (root / 'coco' / 'annotations').mkdir()
    rng = random.Random(0)
    images, annotations = [], []
    for number in range(1, IMAGES + 1):
        name = f'{number:012d}.jpg'
        (folder / name).symlink_to(picture)
        images.append(dict(id=number, file_name=name, width=64, height=64))
        for _ in range(OBJECTS):
            x, y, w, h = (rng.uniform(0, 40), rng.uniform(0, 40), rng.uniform(5, 24),
                          rng.uniform(5, 24))  # fmt: skip
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=rng.randint(1, len(THINGS)),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h] + [x, y] * 12],
                )
            )
    categories = [dict(id=n, name=name) for n, name in enumerate(THINGS, 1)]
    path = root / 'coco' / 'annotations' / 'instances_train2017.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        print(f'{path.stat().st_size / 2**20:.0f} MiB of annotations')
        options = {'sample_data_root': None, 'data_root': f'{folder}/coco/'}
        cfg = load_config(str(CONFIGS['det']), options, folder, 'none')
        import_framework('mmdet')
        from mmdet.registry import DATASETS

        times = [time.monotonic()]
        sources = check_sources(cfg, ('train',))
        times.append(time.monotonic())
        with DefaultScope.overwrite_default_scope('mmdet'):
            dataset = DATASETS.build(cfg.train_dataloader.dataset)
            times.append(time.monotonic())
            summaries = check_dataset('train', dataset, sources)
        times.append(time.monotonic())
        require([*sources.findings, *(f for s in summaries for f in s.findings)])
        for what, start, end in zip(
            ('annotation file', 'mmdet loads it', 'built data set'), times[:-1], times[1:]
        ):
            print(f'{what}: {end - start:.1f} s')


if __name__ == '__main__':
    main()

#!/usr/bin/env python
"""Generate the sample data set in COCO and ADE20K layout; `--help` lists the options."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields

from rich.progress import track

from repnext_mm.datasets import shapes
from repnext_mm.engine.errors import run_tool

HELP = {
    'train': 'number of training images',
    'val': 'number of validation images',
    'size': 'width and height of each image in pixels',
    'seed': 'another seed gives other scenes',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Generate the sample data set, unless the folder has it already.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--root', default='data/shapes', help='folder to write')
    for name, default in asdict(shapes.Spec()).items():
        parser.add_argument(f'--{name}', type=int, default=default, help=HELP[name])
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    spec = shapes.Spec(**{field.name: getattr(args, field.name) for field in fields(shapes.Spec)})
    root = shapes.ensure(args.root, spec, track)
    print(
        f'{spec.train} training and {spec.val} validation images of {spec.size} x {spec.size} '
        f'pixels are in {root}/coco and {root}/ade; '
        'next: python tools/train.py configs/mask_rcnn_repnext_m0_shapes.py'
    )


if __name__ == '__main__':
    args = parse_args()
    sys.exit(run_tool(lambda: main(args)))

#!/usr/bin/env python
"""Measure every network and write the tables of docs/models.md and configs/metafile.yml."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import track

from repnext_mm import model_table
from repnext_mm.engine.errors import run_tool

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--check', action='store_true', help='write nothing, and fail where a file is stale'
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    files = model_table.generate(ROOT, lambda names: track(names, 'Measuring'))
    if args.check:
        model_table.check(files)
        print('docs/models.md and configs/metafile.yml are up to date.')
        return
    for path, text in files.items():
        path.write_text(text, 'utf-8')
    print(
        'Wrote docs/models.md and configs/metafile.yml; '
        'next: python -m pytest tests/test_model_table.py'
    )


if __name__ == '__main__':
    args = parse_args()
    sys.exit(run_tool(lambda: main(args)))

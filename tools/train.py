#!/usr/bin/env python
"""Train a detector, a segmentor or a classifier; `--help` lists the options."""

import sys

from repnext_mm_cli.early import run

if __name__ == '__main__':
    sys.exit(run('repnext_mm.own_data.command:train_main'))

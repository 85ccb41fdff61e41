#!/usr/bin/env python
"""Train a detector or a segmentor; `--help` lists the options."""

import sys

from repnext_mm.engine.cli import train_main

if __name__ == '__main__':
    sys.exit(train_main())

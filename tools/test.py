#!/usr/bin/env python
"""Evaluate a checkpoint; `--help` lists the options."""

import sys

from repnext_mm_cli.early import run

if __name__ == '__main__':
    sys.exit(run('repnext_mm.engine.cli:evaluate_main'))

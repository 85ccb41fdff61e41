#!/usr/bin/env python
"""Evaluate a checkpoint; `--help` lists the options."""

import sys

from repnext_mm.engine.cli import evaluate_main

if __name__ == '__main__':
    sys.exit(evaluate_main())

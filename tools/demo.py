#!/usr/bin/env python
"""Train and evaluate on the generated sample data set; `--help` lists the options."""

import sys

from repnext_mm_cli.early import run

if __name__ == '__main__':
    sys.exit(run('repnext_mm.demo:demo_main'))

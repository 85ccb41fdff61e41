#!/usr/bin/env python
"""Time training steps, inference or layers against the published form."""

import sys

from repnext_mm_cli.early import run

if __name__ == '__main__':
    sys.exit(run('repnext_mm.measure.cli:main'))

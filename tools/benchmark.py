#!/usr/bin/env python
"""Time training steps, inference or layers against the published form."""

import sys

from repnext_mm.measure.cli import main

if __name__ == '__main__':
    sys.exit(main())

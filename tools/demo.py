#!/usr/bin/env python
"""Train and evaluate on the generated sample data set; `--help` lists the options."""

import sys

from repnext_mm.demo import demo_main

if __name__ == '__main__':
    sys.exit(demo_main())

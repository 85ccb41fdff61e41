#!/usr/bin/env python
"""Fuse a model, export it, and prove the artifact equal. See docs/deploy.md."""

from __future__ import annotations

import sys

from repnext_mm_cli.early import run

if __name__ == '__main__':
    sys.exit(run('repnext_mm.deploy.cli:deploy_main'))

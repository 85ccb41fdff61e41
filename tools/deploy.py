#!/usr/bin/env python
"""Fuse a backbone, export it, and prove the artifact equal. See docs/deploy.md."""

from __future__ import annotations

import sys

from repnext_mm.deploy.cli import deploy_main

if __name__ == '__main__':
    sys.exit(deploy_main())

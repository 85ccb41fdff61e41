"""Starting a tool of a checkout, which imports torch for some seconds."""

from __future__ import annotations

import sys
from importlib import import_module


def run(target: str) -> int:
    """Import `module:function` and call it; returns the exit code, also for Ctrl-C meanwhile."""
    module, _, function = target.partition(':')
    try:
        main = getattr(import_module(module), function)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    return main()

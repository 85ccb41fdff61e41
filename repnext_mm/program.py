"""What the user typed to get here: `repnext-mm train`, or `tools/train.py` of a checkout."""

from __future__ import annotations

import sys
from pathlib import Path


def program(tool: str) -> str:
    """The name of a tool in usage texts, in the way that this process was called."""
    script = Path(sys.argv[0]).absolute()
    if script.suffix == '.py' and script.parent.name == 'tools':
        return f'tools/{tool}.py'
    return f'repnext-mm {tool}'


def command(tool: str) -> str:
    """The command line that calls a tool, without its arguments."""
    name = program(tool)
    return f'python {name}' if name.endswith('.py') else name

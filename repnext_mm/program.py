"""What the user typed to get here: `repnext-mm train`, or `tools/train.py` of a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def program(tool: str) -> str:
    """The name of a tool in usage texts, in the way that this process was called."""
    script = Path(sys.argv[0]).absolute()
    beside = script.with_name(f'{tool}.py')
    if script.suffix == '.py' and script.parent.name == 'tools' and beside.is_file():
        return f'tools/{tool}.py'
    return f'repnext-mm {tool}'


def command(tool: str) -> str:
    """The command line that calls a tool, without its arguments."""
    name = program(tool)
    return f'python {name}' if name.endswith('.py') else name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that say something: none for what is off or chosen later."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ([], {}):
            return action.help
        return super()._get_help_string(action)

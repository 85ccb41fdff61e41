"""The command `repnext-mm`: a table of subcommands, each imported only when it is called.

A package of its own, of the standard library alone: importing repnext_mm imports torch and
MMEngine, which a help text must not wait for and the doctor must not need.
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

NAME = 'repnext-mm'

#: Subcommand: what it calls, with the rest of the command line in sys.argv, and its help. What is
#: called begins with `ArgumentParser.parse_args`, and returns the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    'train': ('repnext_mm.own_data.command:train_main', 'train on a folder of images, or a config'),
    'test': ('repnext_mm.engine.cli:evaluate_main', 'evaluate a checkpoint'),
    'deploy': ('repnext_mm.deploy.cli:deploy_main', 'fuse, export and prove a model'),
    'predict': ('repnext_mm.prediction.command:predict_main', 'predict on images and videos'),
    'look': (
        'repnext_mm.look.command:look_main',
        'write a page about a model and its data',
    ),
    'publish': ('repnext_mm.publish:main', 'write the weights of a run for others'),
    'benchmark': ('repnext_mm.measure.cli:main', 'time training, inference or layers'),
    'models': ('repnext_mm.model_list:main', 'list networks and configs with published figures'),
    'doctor': ('repnext_mm_cli.doctor:main', 'check that the installed packages fit each other'),
    'demo': ('repnext_mm.demo:demo_main', 'train and evaluate on generated sample data'),
    'operators': ('repnext_mm.operators.cli:main', "mmcv's operators without a compiled mmcv"),
    'completion': ('repnext_mm_cli.completion:main', 'print the completion script of a shell'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith('-'):
        parser().parse_args(arguments)
        parser().print_help(sys.stderr)
        return 2
    command, *rest = arguments
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(COMMANDS)}.'
        print(f'error: {NAME} has no subcommand {command!r}; {hint}', file=sys.stderr)
        return 2
    # The subcommand as a program of its own, for its usage text and in the processes it starts.
    sys.argv = [f'{NAME} {command}', *rest]
    try:
        function = load(command)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get('REPNEXT_MM_TRACEBACK'):
            raise
        reason = ' '.join(str(error).split())
        print(
            f'error: {NAME} {command} cannot be imported: {reason.rstrip(".")} '
            f'({type(error).__name__}); `{NAME} doctor` says what to install.',
            file=sys.stderr,
        )
        return 1
    return function()


def load(command: str) -> Callable[[], int]:
    """Import what a subcommand calls."""
    module, function = COMMANDS[command][0].split(':')
    return getattr(import_module(module), function)


def parser() -> argparse.ArgumentParser:
    """The command line before a subcommand."""
    rows = [f'  {name:<12}{text}' for name, (_, text) in COMMANDS.items()]
    built = argparse.ArgumentParser(
        prog=NAME,
        usage=f'{NAME} [-h] [--version] COMMAND ...',
        description='RepNeXt, RecNeXt and InceptionNeXt: train, fuse, deploy.',
        epilog='\n'.join(['commands:', *rows, '', f'{NAME} COMMAND --help lists its options.']),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument('--version', action=_Version, nargs=0, help='print the version')
    return built


class _Version(argparse.Action):
    """Prints the version without importing the package."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        spec = find_spec('repnext_mm')
        assert spec and spec.origin
        print(NAME, runpy.run_path(str(Path(spec.origin).with_name('version.py')))['__version__'])
        raise SystemExit(0)

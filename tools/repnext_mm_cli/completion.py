"""What `repnext-mm completion` does: a script of subcommands, options, config and file names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from . import COMMANDS, NAME, load, parser

SHELLS = ('bash', 'zsh')
#: Where each shell looks for the script of a command.
HOMES = {
    'bash': f'~/.local/share/bash-completion/completions/{NAME}',
    'zsh': f'a folder of $fpath, as _{NAME}',
}

#: Arguments by name and what completes them.
FILES = ('checkpoint', 'resume', 'backbone', 'artifacts', 'parity_input')
FOLDERS = ('work_dir', 'show_dir', 'data_root', 'folder')
NAMES = {
    'config': '_repnext_mm_configs',
    'calib': '_repnext_mm_configs',
    'model': '_repnext_mm_models',
    'arch': '_repnext_mm_networks',
}
#: A shell function that completes names, and files.
FUNCTIONS = {
    'bash': '{function}() {{ compgen -W "{names}" -- "$1"; _shtab_compgen_files "$1"; }}',
    'zsh': "{function}() {{ _alternative 'names:name:({names})' 'files:file:_files' }}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm completion`; returns the exit code."""
    own = argparse.ArgumentParser(
        prog=f'{NAME} completion',
        description='Print the completion script of a shell, for a file; write it anew after an '
        'upgrade.',
        epilog='; '.join(f'{shell} reads {home}' for shell, home in HOMES.items()),
    )
    own.add_argument('shell', choices=SHELLS)
    args = own.parse_args(argv)
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of a shell, for the complete command."""
    import shtab

    from repnext_mm.configs import config_names
    from repnext_mm.model_list import networks

    root = parser()
    root.usage = None  # shtab writes its own
    commands = root.add_subparsers()
    for name, (_, text) in COMMANDS.items():
        built = command_parser(name)
        commands.add_parser(
            name, help=text, parents=[built] if built else [], add_help=built is None
        )
    for action in every_action(root):
        if action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in NAMES:
            action.complete = dict.fromkeys(SHELLS, NAMES[action.dest])  # type: ignore[attr-defined]
    configs, archs = config_names(), [record['name'] for record in networks()]
    functions = {
        '_repnext_mm_configs': configs,
        '_repnext_mm_networks': archs,
        '_repnext_mm_models': [*archs, *configs],
    }
    preamble = '\n'.join(
        FUNCTIONS[shell].format(function=function, names=' '.join(names))
        for function, names in functions.items()
    )
    return shtab.complete(root, shell, preamble=preamble)


class _Built(BaseException):
    """Carries a subcommand's parser out of the subcommand."""


def command_parser(command: str) -> argparse.ArgumentParser | None:
    """The parser that a subcommand builds, or None if the subcommand cannot be imported here."""

    def stop(built: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Built(built)

    try:
        function = load(command)
    except ImportError as error:
        print(f'warning: without the options of {NAME} {command}: {error}', file=sys.stderr)
        return None
    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop  # type: ignore[assignment,method-assign]
    try:
        function()
    except _Built as caught:
        return caught.args[0]
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise AssertionError(f'{command} does not begin with its command line')


def every_action(root: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of all below it."""
    for action in root._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from every_action(below)

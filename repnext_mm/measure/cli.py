"""What `repnext-mm benchmark` does: the command line of `repnext_mm.measure.networks`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..engine.errors import UserError, run_tool
from ..program import program
from ..text import parse_size
from . import networks
from .environment import summary
from .rounds import Schedule
from .tables import Record, show, show_operators, write_json


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program('benchmark'),
        description='Time training steps, inference or layers against the published form.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, function in networks.COMMANDS.items():
        title = str(function.__doc__)
        add_arguments(
            name,
            commands.add_parser(
                name,
                help=title,
                description=title,
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            ),
        )
    return parser.parse_args(argv)


def add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    size, batch = {'train-step': (512, 2), 'inference': (512, 1), 'layers': (64, 2)}[name]
    if name == 'layers':
        command.add_argument(
            'layers',
            nargs='*',
            default=list(networks.LAYERS),
            help=f'out of {", ".join(networks.LAYERS)}',
        )
        command.add_argument('--channels', type=int, default=64, help='channels of the input')
    else:
        command.add_argument('arch', help='such as repnext_m4, recnext_a4 or inception_next_tiny')
    if name == 'train-step':
        command.add_argument(
            '--norm-eval', action='store_true', help='train with frozen norm statistics'
        )
    command.add_argument('--size', default=str(size), help='side, or HEIGHTxWIDTH, of the input')
    command.add_argument('--batch', type=int, default=batch, help='images')
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    command.add_argument(
        '--dtype', choices=networks.DTYPES, default='float32', help='other than float32: autocast'
    )
    command.add_argument(
        '--variants',
        nargs='+',
        default=[],
        metavar='FORM[/channels_last][/compile]',
        help='what to compare with the reference (default: every form in both memory formats)',
    )
    command.add_argument('--compile', action='store_true', help='add every variant compiled')
    command.add_argument('--threads', type=int, help="threads on the CPU (default: torch's)")
    command.add_argument('--rounds', type=int, default=30, help='turns of each variant, at most')
    command.add_argument('--budget-s', type=float, default=150, help='bound for the time in all')
    command.add_argument('--profile', action='store_true', help='add time by operator')
    command.add_argument('--json', metavar='FILE', help='write the result; - prints nothing else')


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm benchmark`; returns the exit code."""
    args = parse_args(argv)
    return run_tool(lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f'--threads {args.threads} must be at least 1.')
        torch.set_num_threads(args.threads)
    if args.json not in (None, '-') and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f'--json {args.json}: its folder does not exist; make it first.')
    result = networks.run(
        args.command,
        args.layers if args.command == 'layers' else [args.arch],
        args.variants,
        networks.Settings(
            size=parse_size(args.size),
            batch=args.batch,
            device=args.device,
            dtype=args.dtype,
            norm_eval=getattr(args, 'norm_eval', False),
            channels=getattr(args, 'channels', 64),
            compile=args.compile,
            schedule=Schedule(rounds=args.rounds, lead_in=1, budget_s=args.budget_s),
            profile=args.profile,
        ),
        say=None if args.json == '-' else print,
    )
    if args.json == '-':
        print(json.dumps(result))
        return
    show_result(result, console())
    if args.json:
        write_json(result, Path(args.json))
        print(f'Wrote {args.json}.')


def console() -> Console:
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)  # a file or a pipe


def show_result(result: Record, console: Console) -> None:
    console.print(summary(result['environment']), highlight=False)
    for comparison in result['comparisons']:
        size = 'x'.join(map(str, comparison['shape']))
        show(comparison, f'{comparison["subject"]}, {size}, {result["settings"]["dtype"]}', console)
        for variant, operators in comparison.get('profiles', {}).items():
            show_operators(operators, f'{variant}: time by operator', console)
    if not result['load']['headline']:
        console.print(f'[bold]Not for headlines:[/] {result["load"]["reason"]}.', highlight=False)

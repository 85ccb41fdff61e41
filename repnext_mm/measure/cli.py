"""What `repnext-mm benchmark` does: the command line of `repnext_mm.measure.networks`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..engine.errors import UserError, run_tool
from ..program import program
from ..text import parse_size
from . import accuracy_picture, evaluation, networks, page, throughput
from .environment import summary
from .rounds import Schedule
from .tables import Record, remarks, show, show_operators, timing_table, write_json


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program('benchmark'),
        description='Time training steps, inference or layers against the published form.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, function in networks.COMMANDS.items():
        title = str(function.__doc__)
        add_arguments(name, _command(commands, name, title))
    add_throughput(commands)
    add_evaluation(commands)
    add_picture(commands)
    add_page(commands)
    add_compare(commands)
    return parser.parse_args(argv)


def _command(commands: Any, name: str, title: str) -> argparse.ArgumentParser:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    return commands.add_parser(name, help=title, description=title, formatter_class=defaults)


def add_throughput(commands: Any) -> None:
    title = 'Images per second of fused networks, ours beside any of timm.'
    command = _command(commands, 'throughput', title)
    add = command.add_argument
    add('names', nargs='+', metavar='NAME', help='such as repnext_m1 repvit_m1_1 resnet50')
    add('--size', default='224', help='side, or HEIGHTxWIDTH, of the images')
    add('--batch', type=int, help='images of a batch (None: the power of two that is best)')
    add('--features', action='store_true', help='time the feature maps, not the classifier')
    add('--device', choices=('cpu', 'cuda'), default='cpu')
    add('--amp', choices=('bfloat16', 'float16'), help='time under autocast too')
    add('--compile', action='store_true', help='time every network compiled too')
    add(
        '--layouts',
        nargs='+',
        choices=throughput.LAYOUTS,
        default=list(throughput.LAYOUTS),
        help='memory formats to try; the faster one of a network counts',
    )
    add('--threads', type=int, help="threads on the CPU (default: torch's)")
    add('--rounds', type=int, default=30, help='turns of each network, at most')
    add('--budget-s', type=float, default=300, help='bound for the time of the turns')
    add('--json', metavar='FILE', help='write the result; - prints nothing else')


def add_evaluation(commands: Any) -> None:
    title = "COCO's box and mask AP by FastCocoMetric against mmdet's CocoMetric."
    command = _command(commands, 'evaluation', title)
    defaults = evaluation.Settings()
    for name in ('images', 'results', 'objects'):
        of = '' if name == 'images' else ' of an image'
        command.add_argument(
            f'--{name}', type=int, default=getattr(defaults, name), help=f'number of {name}{of}'
        )
    command.add_argument('--rounds', type=int, default=6, help='turns of each, at most')
    command.add_argument('--budget-s', type=float, default=300, help='bound for the turns')
    command.add_argument('--json', metavar='FILE', help='write the result; - prints nothing else')


def add_picture(commands: Any) -> None:
    title = 'Draw published accuracy against measured time, from a result of throughput.'
    command = _command(commands, 'picture', title)
    command.add_argument('result', type=Path, help='what throughput --json wrote')
    command.add_argument('--out', type=Path, required=True, help='picture to write')
    command.add_argument(
        '--metric', choices=accuracy_picture.METRICS, default='top1', help='upwards'
    )


def add_page(commands: Any) -> None:
    title = 'Write one page of all results in a folder, with their pictures.'
    command = _command(commands, 'page', title)
    command.add_argument('folder', type=Path, help='with JSON results of this tool and of deploy')
    command.add_argument('--out', type=Path, help='the page (None: README.md in the folder)')


def add_compare(commands: Any) -> None:
    title = 'Compare two results by ratio; exit code 1 where the later one is slower.'
    command = _command(commands, 'compare', title)
    command.add_argument('before', type=Path, help='an earlier JSON result')
    command.add_argument('after', type=Path, help='a later one')
    command.add_argument(
        '--any-machine', action='store_true', help='even where they are of two machines'
    )


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
    given = sys.argv[1:] if argv is None else argv
    args.invocation = shlex.join([*program('benchmark').split(), *_arguments(given)])
    return run_tool(lambda: measure(args))


def _arguments(given: Sequence[str]) -> list[str]:
    """The arguments after the name of the tool, without where the result goes."""
    rest = [*given]
    rest = rest[1:] if rest[:1] == ['benchmark'] else rest
    if '--json' in rest:
        at = rest.index('--json')
        del rest[at : at + 2]
    return [each for each in rest if not each.startswith('--json=')]


def measure(args: argparse.Namespace) -> None:
    if args.command == 'picture':
        print(f'Wrote {accuracy_picture.draw(args.result, args.out, args.metric)}.')
        return
    if args.command == 'page':
        for path in page.write(args.folder, args.out or args.folder / 'README.md'):
            print(f'Wrote {path}.')
        return
    if args.command == 'compare':
        compare(args)
        return
    if getattr(args, 'threads', None) is not None:
        if args.threads < 1:
            raise UserError(f'--threads {args.threads} must be at least 1.')
        torch.set_num_threads(args.threads)
    if args.json not in (None, '-') and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f'--json {args.json}: its folder does not exist; make it first.')
    run, display = RUNS.get(args.command, (steps, show_result))
    result = {**run(args), 'invocation': args.invocation}
    if args.json == '-':
        print(json.dumps(result))
        return
    display(result, console())
    if args.json:
        write_json(result, Path(args.json))
        print(f'Wrote {args.json}.')


class SlowerError(UserError):
    """A later result is slower than an earlier one."""

    exit_code = 1


def compare(args: argparse.Namespace) -> None:
    """Print how two results differ.

    Raises:
        SlowerError: The later one is slower, beyond noise.
    """
    found = page.changes(page.read(args.before), page.read(args.after), args.any_machine)
    names = ('variant', 'ratio before', 'ratio after', 'after / before', '')
    columns = zip(*page.summarized(found))
    console().print(timing_table([(n, [*column]) for n, column in zip(names, columns)]))
    slower = [each for each in found if each.verdict == 'slower']
    if slower:
        all_slower = '; '.join(
            f'{each.section}: {each.variant} ({each.after / each.before:.2f}x)' for each in slower
        )
        raise SlowerError(f'{args.after} is slower than {args.before} in {all_slower}.')


def _schedule(args: argparse.Namespace) -> Schedule:
    return Schedule(rounds=args.rounds, lead_in=1, budget_s=args.budget_s)


def images_per_second(args: argparse.Namespace) -> Record:
    return throughput.run(
        args.names,
        throughput.Settings(
            size=parse_size(args.size),
            batch=args.batch,
            device=args.device,
            amp=args.amp,
            compile=args.compile,
            layouts=tuple(args.layouts),
            features=args.features,
            schedule=_schedule(args),
        ),
        say=None if args.json == '-' else print,
    )


def steps(args: argparse.Namespace) -> Record:
    return networks.run(
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
            schedule=_schedule(args),
            profile=args.profile,
        ),
        say=None if args.json == '-' else print,
    )


def evaluations(args: argparse.Namespace) -> Record:
    return evaluation.run(
        evaluation.Settings(args.images, args.results, args.objects, _schedule(args))
    )


def console() -> Console:
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)  # a file or a pipe


def show_throughput(result: Record, console: Console) -> None:
    console.print(summary(result['environment']), highlight=False)
    rows = result['comparison']['rows']
    columns = [
        ('variant', [row['variant'] for row in rows]),
        ('images / s', [f'{row["images_per_s"]:.4g}' for row in rows]),
        ('ms / image', [f'{row["ms_per_image"]:.4g}' for row in rows]),
        ('time of an image / reference', [_per_image(row) for row in rows]),
        ('batch', [str(row['batch']) for row in rows]),
        ('memory format', [row['layout'] for row in rows]),
        ('', ['; '.join(remarks(row)[1:]) for row in rows]),
    ]
    size = 'x'.join(map(str, result['settings']['size']))
    what = 'feature maps' if result['settings']['features'] else 'classifiers'
    console.print(timing_table(columns, f'fused {what}, {size}'))
    limit = result['comparison']['floor']['limit']
    console.print(
        f'Noise floor: a ratio between {1 / limit:.3f} and {limit:.3f} says nothing.',
        highlight=False,
    )
    _show_load(result, console)


def _per_image(row: Record) -> str:
    if row['verdict'] == 'reference':
        return '1'
    low, high = row['interval_per_image']
    return f'{row["ratio_per_image"]:.3f} [{low:.3f}, {high:.3f}]'


def show_evaluation(result: Record, console: Console) -> None:
    console.print(summary(result['environment']), highlight=False)
    settings = result['settings']
    title = f'{settings["images"]} images of {settings["results"]} results'
    show(result['comparison'], title, console)
    _show_load(result, console)


def show_result(result: Record, console: Console) -> None:
    console.print(summary(result['environment']), highlight=False)
    for comparison in result['comparisons']:
        size = 'x'.join(map(str, comparison['shape']))
        show(comparison, f'{comparison["subject"]}, {size}, {result["settings"]["dtype"]}', console)
        for variant, operators in comparison.get('profiles', {}).items():
            show_operators(operators, f'{variant}: time by operator', console)
    _show_load(result, console)


def _show_load(result: Record, console: Console) -> None:
    if not result['load']['headline']:
        console.print(f'[bold]Not for headlines:[/] {result["load"]["reason"]}.', highlight=False)


#: What measures and what shows a command that times no single network.
RUNS = {
    'throughput': (images_per_second, show_throughput),
    'evaluation': (evaluations, show_evaluation),
}

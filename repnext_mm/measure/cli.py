"""What `repnext-mm benchmark` does: the command line of `repnext_mm.measure.networks`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import UserError, run_tool
from ..program import HelpFormatter, program
from ..text import parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from .rounds import Schedule

Record = dict[str, Any]
Run = Callable[[argparse.Namespace], Record]
Show = Callable[[Record, Any], None]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program('benchmark'),
        description='Time training steps, inference or layers against the published form.',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    # What is neither named nor shown is not imported for its choices.
    named, is_help = COMMANDS.keys() & argv, {'-h', '--help'} & {*argv}
    for name, (title, add_arguments) in COMMANDS.items():
        command = commands.add_parser(
            name, help=title, description=title, formatter_class=HelpFormatter
        )
        if name in named or not (named or is_help):
            add_arguments(command)
    return parser.parse_args(argv)


def add_throughput(command: argparse.ArgumentParser) -> None:
    from .throughput import LAYOUTS

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
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help='memory formats to try; the faster one of a network counts',
    )
    add_threads(command)
    add_turns(command, 300)


def add_evaluation(command: argparse.ArgumentParser) -> None:
    from .evaluation import Settings

    defaults = Settings()
    for name in ('images', 'results', 'objects'):
        of = '' if name == 'images' else ' of an image'
        command.add_argument(
            f'--{name}', type=int, default=getattr(defaults, name), help=f'number of {name}{of}'
        )
    add_turns(command, 300, rounds=6)


def add_model_step(command: argparse.ArgumentParser) -> None:
    from ..engine.amp import AMP_DTYPES

    command.add_argument('config', help='config file, or a name that `repnext-mm models` lists')
    command.add_argument('--size', default='800x1333', help='side, or HEIGHTxWIDTH, of the images')
    command.add_argument('--batch', type=int, default=2, help='images of a step')
    command.add_argument(
        '--variants',
        nargs='+',
        default=[],
        metavar='FORM[/keep_memory][/channels_last]',
        help='what to compare, the reference first; each takes the memory of a training (None: '
        'branches and merged, on a CPU with and without keep_memory)',
    )
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    command.add_argument('--amp', choices=AMP_DTYPES, help='train in mixed precision')
    add_threads(command)
    command.add_argument('--profile', action='store_true', help='add time by operator')
    add_turns(command, 600)


def add_picture(command: argparse.ArgumentParser) -> None:
    from .accuracy_picture import METRICS

    command.add_argument('result', type=Path, help='what throughput --json wrote')
    command.add_argument('--out', type=Path, required=True, help='picture to write')
    command.add_argument('--metric', choices=METRICS, default='top1', help='upwards')


def add_page(command: argparse.ArgumentParser) -> None:
    command.add_argument('folder', type=Path, help='with JSON results of this tool and of deploy')
    command.add_argument('--out', type=Path, help='the page (None: README.md in the folder)')


def add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument('before', type=Path, help='an earlier JSON result')
    command.add_argument('after', type=Path, help='a later one')
    command.add_argument(
        '--any-machine', action='store_true', help='even where they are of two machines'
    )


def add_train_step(command: argparse.ArgumentParser) -> None:
    add_network(command)
    command.add_argument(
        '--norm-eval', action='store_true', help='train with frozen norm statistics'
    )
    add_form(command, size=512, batch=2)


def add_inference(command: argparse.ArgumentParser) -> None:
    add_network(command)
    add_form(command, size=512, batch=1)


def add_layers(command: argparse.ArgumentParser) -> None:
    from .networks import LAYERS

    command.add_argument(
        'layers', nargs='*', default=list(LAYERS), help=f'out of {", ".join(LAYERS)}'
    )
    command.add_argument('--channels', type=int, default=64, help='channels of the input')
    add_form(command, size=64, batch=2)


def add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument('arch', help='such as repnext_m4, recnext_a4 or inception_next_tiny')


def add_form(command: argparse.ArgumentParser, size: int, batch: int) -> None:
    """What is common to networks and layers."""
    from .networks import DTYPES

    command.add_argument('--size', default=str(size), help='side, or HEIGHTxWIDTH, of the input')
    command.add_argument('--batch', type=int, default=batch, help='images')
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    command.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='other than float32: autocast'
    )
    command.add_argument(
        '--variants',
        nargs='+',
        default=[],
        metavar='FORM[/channels_last][/compile]',
        help='what to compare with the reference (None: every form in both memory formats)',
    )
    command.add_argument('--compile', action='store_true', help='add every variant compiled')
    add_threads(command)
    command.add_argument('--profile', action='store_true', help='add time by operator')
    add_turns(command, 150)


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument('--threads', type=int, help="threads on the CPU (None: torch's)")


def add_turns(command: argparse.ArgumentParser, budget_s: float, rounds: int = 30) -> None:
    command.add_argument(
        '--rounds', type=int, default=rounds, help='turns of each variant, at most'
    )
    command.add_argument(
        '--budget-s', type=float, default=budget_s, help='bound for the time in all'
    )
    command.add_argument('--json', metavar='FILE', help='write the result; - prints nothing else')


#: What the help says of a sub-command, and what adds its arguments.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    'train-step': ('Training step of a backbone, in its forms.', add_train_step),
    'model-step': ('Training step of the complete model of a config.', add_model_step),
    'inference': ('Inference of a backbone, by plan of fusion.', add_inference),
    'layers': ('Forward and backward pass of single layers.', add_layers),
    'throughput': (
        'Images per second of fused networks, ours beside any of timm.',
        add_throughput,
    ),
    'evaluation': (
        "COCO's box and mask AP by FastCocoMetric against mmdet's CocoMetric.",
        add_evaluation,
    ),
    'picture': (
        'Draw published accuracy against measured time, from a result of throughput.',
        add_picture,
    ),
    'page': ('Write one page of all results in a folder, with their pictures.', add_page),
    'compare': (
        'Compare two results by ratio; exit code 1 where the later one is slower.',
        add_compare,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm benchmark`; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    args = parse_args(given)
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
    WITHOUT_TIMING.get(args.command, time_and_show)(args)


def time_and_show(args: argparse.Namespace) -> None:
    """Run the command, and print or write its result."""
    import json

    from .tables import write_json

    if getattr(args, 'threads', None) is not None:
        import torch

        if args.threads < 1:
            raise UserError(f'--threads {args.threads} must be at least 1.')
        torch.set_num_threads(args.threads)
    if args.json not in (None, '-') and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f'--json {args.json}: its folder does not exist; make it first.')
    run, display = RUNS[args.command]
    result = {**run(args), 'invocation': args.invocation}
    if args.json == '-':
        print(json.dumps(result))
        return
    display(result, console())
    if args.json:
        write_json(result, Path(args.json))
        print(f'Wrote {args.json}.')


def draw(args: argparse.Namespace) -> None:
    from . import accuracy_picture

    print(f'Wrote {accuracy_picture.draw(args.result, args.out, args.metric)}.')


def write_page(args: argparse.Namespace) -> None:
    from . import page

    for path in page.write(args.folder, args.out or args.folder / 'README.md'):
        print(f'Wrote {path}.')


class SlowerError(UserError):
    """A later result is slower than an earlier one."""

    exit_code = 1


def compare(args: argparse.Namespace) -> None:
    """Print how two results differ.

    Raises:
        SlowerError: The later one is slower, beyond noise.
    """
    from . import page
    from .tables import timing_table

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
    from .rounds import Schedule

    return Schedule(rounds=args.rounds, lead_in=1, budget_s=args.budget_s)


def _say(args: argparse.Namespace) -> Callable[[str], None] | None:
    return None if args.json == '-' else print


def images_per_second(args: argparse.Namespace) -> Record:
    from . import throughput

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
        say=_say(args),
    )


def steps(args: argparse.Namespace) -> Record:
    from . import networks

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
        say=_say(args),
    )


def model_steps(args: argparse.Namespace) -> Record:
    from . import training

    return training.run(
        args.config,
        args.variants,
        training.Settings(
            size=parse_size(args.size),
            batch=args.batch,
            device=args.device,
            amp=args.amp,
            threads=args.threads,
            schedule=training.schedule(args.rounds, args.budget_s),
            profile=args.profile,
        ),
        say=_say(args),
    )


def evaluations(args: argparse.Namespace) -> Record:
    from . import evaluation

    return evaluation.run(
        evaluation.Settings(args.images, args.results, args.objects, _schedule(args))
    )


def console() -> Console:
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)  # a file or a pipe


def show_throughput(result: Record, console: Console) -> None:
    from .environment import summary
    from .tables import remarks, timing_table

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
    from .environment import summary
    from .tables import show

    console.print(summary(result['environment']), highlight=False)
    settings = result['settings']
    title = f'{settings["images"]} images of {settings["results"]} results'
    show(result['comparison'], title, console)
    _show_load(result, console)


def show_result(result: Record, console: Console) -> None:
    from .environment import summary
    from .tables import show, show_operators

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


#: What times a sub-command, and what shows the result.
RUNS: dict[str, tuple[Run, Show]] = {
    'throughput': (images_per_second, show_throughput),
    'evaluation': (evaluations, show_evaluation),
    'model-step': (model_steps, show_result),
    **dict.fromkeys(('train-step', 'inference', 'layers'), (steps, show_result)),
}
#: What those do that time nothing.
WITHOUT_TIMING: dict[str, Callable[[argparse.Namespace], None]] = {
    'picture': draw,
    'page': write_page,
    'compare': compare,
}

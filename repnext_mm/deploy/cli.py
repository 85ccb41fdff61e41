"""What `repnext-mm deploy` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from ..configs import is_config_name
from ..engine.errors import run_tool, sigterm_raises
from ..measure import artifacts, tables
from ..measure.rounds import Schedule
from ..network import PLANS
from ..program import command, program
from ..text import parse_size
from . import bench
from .calibration import ENOUGH_IMAGES
from .check import check_folder
from .errors import ParityError, UsageError
from .explain import explain
from .exporters import IOS_TARGETS, OPSETS
from .folders import shown
from .formats import DYNAMIC, FORMATS, choose_formats
from .pipeline import Export, Options
from .quantize import GATE_DB
from .report import JSON_NAME, Report, markdown_table
from .source import load_source

#: Every dtype of any format.
DTYPES = tuple(dict.fromkeys(dtype for row in FORMATS.values() for dtype in row.dtypes))
WIDTH = 200


def deploy_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm deploy`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = {
        'export': _export,
        'bench': _bench,
        'explain': _explain,
        'check': _check,
        'formats': _formats,
    }
    parser, names = _parser(verbs)
    if arguments and arguments[0] not in (*names, '-h', '--help'):
        arguments.insert(0, 'export')
    args = parser.parse_args(arguments)
    # A job that is terminated cleans up as one that is interrupted does.
    with sigterm_raises():
        return run_tool(lambda: verbs[args.verb](args))


def _parser(verbs: dict[str, Callable]) -> tuple[argparse.ArgumentParser, list[str]]:
    defaults, name = argparse.ArgumentDefaultsHelpFormatter, program('deploy')
    parser = argparse.ArgumentParser(
        prog=name,
        description='Fuse a backbone, export it, and prove the artifact equal.',
        epilog=f'{name} MODEL ... is short for {name} export MODEL ...; '
        f'{name} export --help lists its options.',
    )
    subparsers = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

    export = subparsers.add_parser(
        'export', help='fuse and export (also without a verb)', formatter_class=defaults
    )
    add = export.add_argument
    add('model', help='arch name such as repnext_m0, a config, or a (fused) weight file')
    add('checkpoint', nargs='?', help='weights: a file, a URL or a published name; random without')
    add('--format', help=f'comma list of {", ".join(FORMATS)}; or all (None: onnx)')
    add('--scope', choices=('backbone', 'model'), default='backbone',
        help='model: a complete detector or segmentor, fused, as .pth with config')  # fmt: skip
    add('--size', type=_sizes, default='512', help='512 or HxW; a comma list exports one each')
    add('--batch', type=_positive, default=1, help='number of images')
    add('--out-indices', type=_indices, help="stages to return, such as 1,2,3 (None: the config's)")
    add('--plan', choices=('auto', *PLANS), default='full',
        help='how far to fuse; auto measures which exact plan is fastest')  # fmt: skip
    add(
        '--dtype',
        choices=DTYPES,
        help='to compute in (None: fp16 in coreml, else fp32)',
    )
    add(
        '--dynamic',
        choices=DYNAMIC,
        default='none',
        help='leave batch, or height and width, open',
    )
    add('--preprocess', choices=('none', 'embed'), default='none',
        help="build the config's data_preprocessor into the artifact")  # fmt: skip
    add('--calib', type=Path, metavar='DIR_OR_CONFIG', help='images that int8 is calibrated on')
    add('--calib-images', type=_positive, default=ENOUGH_IMAGES, help='at most so many of them')
    add('--gate-db', type=float, default=GATE_DB, help='SQNR that every stage keeps in int8')
    add('--max-drop', type=float, metavar='POINTS',
        help='points of AP or mIoU that int8 may lose, measured on the test data of the config '
        '(None: not measured)')  # fmt: skip
    add('--opset', type=int, choices=OPSETS,
        help=f'of ONNX (None: {OPSETS[0]}; from 20 on faster in ONNX Runtime)')  # fmt: skip
    add('--ios-target', type=int, choices=IOS_TARGETS, help=f'oldest iOS (None: {IOS_TARGETS[0]})')
    add('--device', choices=('cpu', 'cuda'), help='what aoti compiles for (None: cpu)')
    add('--parity', choices=('on', 'off'), default='on', help='run and compare every artifact')
    add('--parity-input', type=Path, metavar='IMG', help='compare on this image, not on noise')
    add('--allow-odd', action='store_true', help='accept sizes that the strides do not divide')
    add('--allow-partial', action='store_true', help='accept checkpoints that match in part')
    add('--work-dir', type=Path, help='output folder (None: work_dirs/deploy/MODEL)')
    add('--force', action='store_true', help='replace artifacts that are there')
    add('--strict', action='store_true', help='stop at a warning about a package')
    add('--seed', type=int, default=0, help='of random weights and of the images to compare on')
    add('--bench', action='store_true', help='time what was exported, as the verb bench does')
    _add_bench(export)
    _add_output(export)

    bench_ = subparsers.add_parser(
        'bench',
        help='time the artifacts of a folder in their runtimes, against plan upstream',
        formatter_class=defaults,
    )
    bench_.add_argument('folder', type=Path, help='an output folder, or the report.json in it')
    _add_bench(bench_)
    _add_trust(bench_)
    _add_output(bench_)

    explain_ = subparsers.add_parser(
        'explain', help="time by operator, from the runtime's profile", formatter_class=defaults
    )
    explain_.add_argument('artifacts', type=Path, nargs='+', help='files that an export wrote')
    explain_.add_argument('--threads', type=_positive, help="to compute on (None: the runtime's)")
    explain_.add_argument('--precision', choices=('f32', 'bf16', 'f16'), help='of OpenVINO')
    _add_trust(explain_)
    _add_output(explain_)

    check = subparsers.add_parser(
        'check', help='compare the artifacts of a folder again', formatter_class=defaults
    )
    check.add_argument('folder', type=Path, help='an output folder, or the report.json in it')
    _add_trust(check)
    _add_output(check)

    formats = subparsers.add_parser('formats', help='list the formats')
    formats.add_argument('--json', action='store_true', help='as JSON')
    return parser, list(verbs)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--trust',
        action='store_true',
        help='run files that are code (TorchScript, AOTInductor), which you made',
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--threads', type=_positive, help='to time on (None: every core)')
    parser.add_argument(
        '--no-compile', action='store_true', help='time PyTorch eager alone, not compiled'
    )
    parser.add_argument('--rounds', type=_positive, default=30, help='of timing, at most')
    parser.add_argument(
        '--budget-s', type=float, help='bound for the timing in seconds (None: all rounds)'
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print the report alone, as JSON')
    parser.add_argument('--quiet', action='store_true', help='print errors alone')


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        return [parse_size(part) for part in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a size; give 512, HxW as 800x1344, or several with commas'
        ) from None


def _indices(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of stages; give 0,1,2,3 or fewer')
    return tuple(int(part) for part in text.split(','))


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)


# --- the verbs


def _export(args: argparse.Namespace) -> None:
    if args.scope == 'model':
        _export_model(args)
        return
    text = args.format or 'onnx'
    formats = [(row, row.name in text.split(',')) for row in choose_formats(text)]
    others = {name: getattr(args, name) for name in ('opset', 'ios_target', 'device')}
    log = _log(args)
    with _talk(args):
        source = load_source(
            args.model,
            args.checkpoint,
            out_indices=args.out_indices,
            allow_partial=args.allow_partial,
            seed=args.seed,
        )
    options = Options(
        formats,
        sizes=args.size,
        batch=args.batch,
        plan=args.plan,
        dtype=args.dtype,
        dynamic=args.dynamic,
        preprocess=args.preprocess == 'embed',
        parity=args.parity == 'on',
        parity_input=args.parity_input,
        allow_odd=args.allow_odd,
        force=args.force,
        strict=args.strict,
        seed=args.seed,
        calib=args.calib,
        calib_images=args.calib_images,
        gate_db=args.gate_db,
        max_drop=args.max_drop,
        others=tuple((name, value) for name, value in others.items() if value is not None),
    )
    folder = args.work_dir or Path('work_dirs', 'deploy', source.name)
    export = Export(source, options, folder, log)
    report = export.run()
    if args.bench:
        _time(args, report, log, trust=True)  # what this process has just written
    _finish(args, report, log)
    export.raise_failures()
    if not args.json and not args.quiet:
        print(f'Wrote {shown(folder / JSON_NAME)}; next: {command("deploy")} check {shown(folder)}')


def _export_model(args: argparse.Namespace) -> None:
    from .whole_model import save_whole_model, time_whole_model  # which need mmdet or mmseg

    if args.format not in (None, 'pth'):
        raise UsageError(
            f'--scope model is for --format pth; in {args.format} there is the backbone alone, '
            f'which mm runs in place with {command("test")} --backbone (for heads in the graph '
            'there is mmdeploy).'
        )
    if args.plan == 'auto':
        raise UsageError('--plan auto is for --scope backbone; name a plan for the complete model.')
    if args.bench and len(args.size) > 1:
        raise UsageError('--scope model --bench times one size; give --size one, such as 512.')
    if not is_config_name(args.model) or args.checkpoint is None:
        raise UsageError('--scope model needs the config of a training and its checkpoint.')
    folder = args.work_dir or Path('work_dirs', 'deploy', Path(args.model).stem)
    with _talk(args):
        weights, config = save_whole_model(
            args.model, args.checkpoint, folder, args.plan, force=args.force
        )
    result: dict[str, Any] = {'weights': str(weights), 'config': str(config)}
    if args.bench:
        (size,), trained = args.size, (args.model, args.checkpoint)
        with _talk(args):
            result['bench'] = time_whole_model(
                trained, (weights, config), size, threads=args.threads, schedule=_schedule(args)
            )
        title = f'One prediction at {size[0]}x{size[1]}, PyTorch on the CPU'
        tables.show(result['bench'], title, _log(args))
    if args.json:
        print(json.dumps(result))
    elif not args.quiet:
        print(
            f'Wrote {shown(weights)} and {shown(config)}; '
            f'next: {command("test")} {shown(config)} {shown(weights)}'
        )


def _bench(args: argparse.Namespace) -> None:
    log = _log(args)
    report = Report.load(args.folder)
    _time(args, report, log, trust=args.trust)
    _finish(args, report, log)


def _time(args: argparse.Namespace, report: Report, log: Console, trust: bool) -> None:
    for measured in bench.bench_report(
        report,
        threads=args.threads,
        compiled=not args.no_compile,
        schedule=_schedule(args),
        trust=trust,
        log=log,
    ):
        artifacts.show(measured, log)


def _schedule(args: argparse.Namespace) -> Schedule:
    return replace(artifacts.SCHEDULE, rounds=args.rounds, budget_s=args.budget_s)


def _explain(args: argparse.Namespace) -> None:
    log = _log(args)
    records = []
    for path in args.artifacts:
        explanation = explain(
            path, threads=args.threads, precision=args.precision, trust=args.trust
        )
        explanation.show(log)
        records.append(explanation.as_record())
    if args.json:
        print(json.dumps(records, indent=1))


def _check(args: argparse.Namespace) -> None:
    log = _log(args)
    report = Report.load(args.folder)
    try:
        check_folder(report, log, trust=args.trust)
    except ParityError:
        _finish(args, report, log)
        raise
    _finish(args, report, log)


def _formats(args: argparse.Namespace) -> None:
    rows = [
        {
            'name': row.name,
            'title': row.title,
            'suffix': row.suffix,
            'dtypes': list(row.dtypes),
            'dynamic': [name for name, refused in row.dynamic.items() if not refused],
            'options': [f'--{name.replace("_", "-")}' for name in row.options],
            'runtime': row.runtime,
            'requires': list(row.packages.values()),
            'missing': row.missing(),
            'in_all': row.in_all,
        }
        for row in FORMATS.values()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print('\n'.join(format_table()))


def format_table() -> list[str]:
    """The table of formats, as lines of Markdown."""
    header = ('format', 'what', 'file', 'dtypes', 'dynamic', 'options', 'needs')
    return markdown_table(
        header,
        [
            (
                f'`{row.name}`',
                row.title,
                f'`{row.suffix}`',
                ', '.join(row.dtypes),
                ', '.join(name for name, refused in row.dynamic.items() if not refused),
                ', '.join(f'`--{name.replace("_", "-")}`' for name in row.options) or '-',
                ', '.join(f'`{name}`' for name in row.packages.values()) or '-',
            )
            for row in FORMATS.values()
        ],
    )


def _log(args: argparse.Namespace) -> Console:
    """Where progress goes: stdout for people, stderr beside JSON, nowhere if it is to be quiet."""
    console = Console(stderr=args.json, quiet=args.quiet)
    if not console.is_terminal:  # a file needs no folded lines
        console.width = WIDTH
    return console


def _talk(args: argparse.Namespace) -> redirect_stdout:
    """The same for mmengine's logger, which keeps the stdout that it finds when it is made."""
    if args.quiet:
        return redirect_stdout(StringIO())
    return redirect_stdout(sys.stderr if args.json else sys.stdout)


def _finish(args: argparse.Namespace, report: Report, log: Console) -> None:
    if args.json:
        print(report.as_json())
    else:
        report.show(log)

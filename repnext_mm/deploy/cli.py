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
from typing import TYPE_CHECKING

from rich.console import Console

from ..engine.errors import run_tool, sigterm_raises
from ..program import command, program
from .errors import ParityError
from .folders import shown
from .formats import DYNAMIC, FORMATS
from .options import Options, add_options, parsed, positive
from .report import JSON_NAME, Report, markdown_table

if TYPE_CHECKING:  # what the verbs need is imported by them: networks, runtimes, mmengine's runner
    from .source import Source

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
        'runtime': _runtime,
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
        description='Fuse a model, export it, and prove the artifact equal.',
        epilog=f'{name} MODEL ... is short for {name} export MODEL ...; '
        f'{name} export --help lists its options.',
    )
    subparsers = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

    export = subparsers.add_parser(
        'export', help='fuse and export (also without a verb)', formatter_class=defaults
    )
    export.add_argument(
        'model', help='arch name such as repnext_m0, a config, or a (fused) weight file'
    )
    export.add_argument(
        'checkpoint', nargs='?', help='weights: a file, a URL or a published name; random without'
    )
    add_options(export)
    export.add_argument(
        '--bench', action='store_true', help='time what was exported, as the verb bench does'
    )
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
    explain_.add_argument('--threads', type=positive, help="to compute on (None: the runtime's)")
    explain_.add_argument('--precision', choices=('f32', 'bf16', 'f16'), help='of OpenVINO')
    _add_trust(explain_)
    _add_output(explain_)

    check = subparsers.add_parser(
        'check', help='compare the artifacts of a folder again', formatter_class=defaults
    )
    check.add_argument('folder', type=Path, help='an output folder, or the report.json in it')
    _add_trust(check)
    _add_output(check)

    runtime = subparsers.add_parser(
        'runtime', help='fetch what the page of --format web runs the model with'
    )
    runtime.add_argument('folder', type=Path, nargs='+', help='folders that --format web wrote')

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
    parser.add_argument('--threads', type=positive, help='to time on (None: every core)')
    parser.add_argument(
        '--no-compile', action='store_true', help='time PyTorch eager alone, not compiled'
    )
    parser.add_argument('--rounds', type=positive, default=30, help='of timing, at most')
    parser.add_argument(
        '--budget-s', type=float, help='bound for the timing in seconds (None: all rounds)'
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print the report alone, as JSON')
    parser.add_argument('--quiet', action='store_true', help='print errors alone')


# --- the verbs


def _export(args: argparse.Namespace) -> None:
    from .pipeline import Export
    from .source import load_source

    options, log = parsed(args), _log(args)
    with _talk(args):
        source = load_source(
            args.model,
            args.checkpoint,
            out_indices=options.out_indices,
            allow_partial=options.allow_partial,
            seed=options.seed,
            scope=options.scope,
        )
    folder = options.work_dir or Path('work_dirs', 'deploy', source.name)
    log.print(_what_ships(source), highlight=False, markup=False, soft_wrap=True)
    names = options.format.split(',')
    if source.scope == 'model' and 'pth' in names:
        _save_weights(args, source, options, folder)
        names = [name for name in names if name != 'pth']
        if not names:
            return
        options = replace(options, format=','.join(names))
    export = Export(source, options, folder, log)
    report = export.run()
    if args.bench:
        _time(args, report, log, trust=True)  # what this process has just written
    _finish(args, report, log)
    export.raise_failures()
    if not args.json and not args.quiet:
        trust = ' --trust' if any(FORMATS[a.format].is_code for a in report.artifacts) else ''
        check = f'{command("deploy")} check {shown(folder)}{trust}'
        print(f'Wrote {shown(folder / JSON_NAME)}; next: {check}')


def _what_ships(source: Source) -> str:
    """The first line: what is exported, and with whose weights."""
    what = (
        f'the backbone {source.family} {source.arch} alone'
        if source.scope == 'backbone'
        else f'the complete {source.family} with backbone {source.arch}'
        if hasattr(source.model, 'backbone')
        else f'{source.family} {source.arch}'
    )
    weights = source.checkpoint or 'random weights'
    under = f' ({source.container})' if source.container not in ('', 'state_dict') else ''
    return f'Exporting {what}, weights: {weights}{under}.'


def _save_weights(args: argparse.Namespace, source: Source, options: Options, folder: Path) -> None:
    """A complete model as a checkpoint and a config of mm, its backbone fused."""
    from .whole_model import save_fused  # which needs mmdet or mmseg

    with _talk(args):
        weights, config = save_fused(source, folder, options.plan, force=options.force)
    if args.json and options.format == 'pth':
        print(json.dumps({'weights': str(weights), 'config': str(config)}))
    elif not args.quiet and not args.json:
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
    from ..measure import artifacts
    from .bench import bench_report

    schedule = replace(artifacts.SCHEDULE, rounds=args.rounds, budget_s=args.budget_s)
    for measured in bench_report(
        report,
        threads=args.threads,
        compiled=not args.no_compile,
        schedule=schedule,
        trust=trust,
        log=log,
    ):
        artifacts.show(measured, log)


def _explain(args: argparse.Namespace) -> None:
    from .explain import explain

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
    from .check import check_folder

    log = _log(args)
    report = Report.load(args.folder)
    try:
        check_folder(report, log, trust=args.trust)
    except ParityError:
        _finish(args, report, log)
        raise
    _finish(args, report, log)


def _runtime(args: argparse.Namespace) -> None:
    from .web_runtime import NAME, VERSION, fetch_runtime

    for folder in args.folder:
        path = fetch_runtime(folder)
        print(
            f'{NAME} {VERSION} is in {shown(path)}; serve the folder, such as by: '
            f'python -m http.server -d {shown(folder)}'
        )


def _formats(args: argparse.Namespace) -> None:
    rows = [
        {
            'name': row.name,
            'title': row.title,
            'suffix': row.suffix,
            'dtypes': list(row.dtypes),
            'dynamic': [name for name in DYNAMIC if not row.refuse_dynamic(name)],
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
                ', '.join(name for name in DYNAMIC if not row.refuse_dynamic(name)),
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

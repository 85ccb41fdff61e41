"""What tools/deploy.py does."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..engine.errors import run_tool
from ..reparam import PLANS, reparameterize
from ..version import __version__
from .errors import ExportError, UsageError
from .exporters import Job, quiet
from .formats import FORMATS, Format, choose_formats
from .source import Source, load_source

RANDOM_WEIGHTS = 'random weights: fine for latency, meaningless for accuracy'
VERBS = ('export', 'formats')


def deploy_main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/deploy.py; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*VERBS, '-h', '--help'):
        arguments.insert(0, 'export')
    args = _parser().parse_args(arguments)
    # A job that is told to end clears up as one that is interrupted does.
    signal.signal(signal.SIGTERM, _interrupt)
    return run_tool(lambda: args.run(args))


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='deploy.py', description='Fuse a backbone and export it, proven equal.'
    )
    verbs = parser.add_subparsers(required=True, metavar='VERB')
    export = verbs.add_parser(
        'export',
        help='fuse and export (what is done where no verb is given)',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    export.set_defaults(run=_export)
    export.add_argument('model', help='arch name such as repnext_m0, a config, or a fused .pth')
    export.add_argument('checkpoint', nargs='?', help='weights: a file, URL or published name')
    export.add_argument(
        '--format', default='onnx', help=f'comma list of {", ".join(FORMATS)}; or all'
    )
    export.add_argument('--size', type=_size, default='512', help='height and width: 512 or HxW')
    export.add_argument('--batch', type=int, default=1, help='number of images')
    export.add_argument('--plan', choices=PLANS, default='exact', help='how far to fuse')
    export.add_argument('--dtype', default='fp32', help='what the artifact computes in')
    export.add_argument('--dynamic', choices=('none', 'batch', 'hw'), default='none')
    export.add_argument('--opset', type=int, default=18, help='ONNX operator set')
    export.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='for aoti')
    export.add_argument('--work-dir', type=Path, help='output folder')
    export.add_argument('--force', action='store_true', help='replace what is there')
    export.add_argument('--seed', type=int, default=0, help='of random weights and inputs')
    formats = verbs.add_parser('formats', help='list the formats')
    formats.set_defaults(run=_formats)
    return parser


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a size: give 512, or HxW such as 800x1344'
        )
    height, width = (int(sides[0]), int(sides[-1]))
    return height, width


def _formats(args: argparse.Namespace) -> None:
    for row in FORMATS.values():
        print(f'{row.name:12} {row.suffix:14} {row.title}')


def _export(args: argparse.Namespace) -> None:
    formats = choose_formats(args.format)
    for row in formats:
        row.check_installed()
    source = load_source(args.model, args.checkpoint, seed=args.seed)
    if source.weights == 'random':
        print(
            'warning: random weights: fine for latency, meaningless for accuracy', file=sys.stderr
        )
    fused = reparameterize(source.model, args.plan)
    job = make_job(source, fused, args)
    folder = args.work_dir or Path('work_dirs', 'deploy', source.name)
    folder.mkdir(parents=True, exist_ok=True)
    stem = artifact_stem(source, job)
    targets = {row.name: folder / f'{stem}{row.suffix}' for row in formats}
    if not args.force and (there := [path for path in targets.values() if path.exists()]):
        raise UsageError(f'{there[0]} exists already; add --force to replace it.')
    with tempfile.TemporaryDirectory(prefix=f'.partial-{os.getpid()}-', dir=folder) as partial:
        for row in formats:
            target = targets[row.name]
            seconds = write_artifact(row, job, Path(partial), target)
            print(f'{row.name}: {target} ({seconds:.1f} s)')


def make_job(source: Source, fused: Any, args: argparse.Namespace) -> Job:
    model = source.model
    metadata = {
        'version': __version__,
        'family': type(model).__name__,
        'arch': source.arch,
        'plan': fused.plan,
        'out_indices': list(model.out_indices),
        'out_channels': list(model.out_channels),
        'out_strides': list(model.out_strides),
        'size': list(args.size),
        'batch': args.batch,
        'dynamic': args.dynamic,
        'dtype': args.dtype,
        'weights': source.weights,
        'checkpoint_sha256': source.checkpoint_sha256,
        'layout': 'NCHW',
        'device': args.device,
    }
    return Job(
        fused,
        args.size,
        tuple(f'stage{i}' for i in model.out_indices),
        metadata,
        batch=args.batch,
        dynamic=args.dynamic,
        dtype=args.dtype,
        opset=args.opset,
        device=args.device,
    )


def artifact_stem(source: Source, job: Job) -> str:
    """`NAME_512x512_b1_PLAN_DTYPE`, and what is open in it."""
    height, width = job.size
    dynamic = '' if job.dynamic == 'none' else f'_{job.dynamic}'
    plan = job.metadata['plan']
    return f'{source.name}_{height}x{width}_b{job.batch}_{plan}_{job.dtype}{dynamic}'


def write_artifact(row: Format, job: Job, partial: Path, target: Path) -> float:
    """Export to `partial` and, when whole, move to `target`; returns the seconds it took."""
    start = time.perf_counter()
    written = partial / target.name
    try:
        with quiet():
            row.export(job, written)
    except Exception as error:
        text = ' '.join(str(error).split())[:300]
        raise ExportError(f'{row.name} could not be exported: {text}') from error
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(written, target)
    return time.perf_counter() - start

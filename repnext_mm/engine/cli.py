"""What `repnext-mm train` and `repnext-mm test` do, for every task alike."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..checkpoints import CheckpointError, RunCheckpoint, read_run
from ..checkpoints.runs import passed_on
from ..network import PLANS
from ..program import HelpFormatter, command, program
from ..text import printable
from .amp import AMP_DTYPES, enable_amp, keep_float32_where_needed, uses_amp
from .config_file import fit_workers, load_config
from .device import choose_device
from .errors import UserError, is_first, run_tool, sigterm_raises
from .exported_backbone import introduce, padding_line, put_in_place
from .exported_model import introduce_file, run_file
from .finite import SayWhatWasNotMeasured, StopAtNonFiniteLoss
from .frameworks import import_framework
from .fused import FuseForTest
from .literals import literal
from .preflight import Sources, check_config, check_sources, preflight, require
from .quiet import announce
from .rescue import explain_full_disk, keep_results
from .resume import HALF, LATEST, RequireFit, SkipSeenData, checkpoint_to_resume, drop_pretrained
from .run_folder import claim_folder, join_processes, make_folder, release_folders
from .runner import accumulated, build_runner, dumped_config
from .schedule import rescale, schedule_warnings
from .stored import config_classes

#: When this process started, for the name of its report.
STARTED = time.strftime('%Y%m%d_%H%M%S')


@dataclass(frozen=True)
class Trained:
    """What a training has written: the newest checkpoint, and the best one if that is kept."""

    cfg: Config
    work_dir: Path
    last: Path | None
    best: Path | None


def train_main(argv: Sequence[str] | None = None) -> int:
    """Train what a config says; returns the exit code. See `repnext_mm.own_data` for folders."""
    return run_command(train, train_parser(), argv)


def train_parser() -> argparse.ArgumentParser:
    """The command line of a training."""
    parser = _parser('train', 'Train a detector, a segmentor or a classifier.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=LATEST,
        metavar='CKPT',
        help='continue from CKPT, or from the newest of the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const=True,
        choices=AMP_DTYPES,
        metavar='DTYPE',
        help=f'mixed precision: {" or ".join(AMP_DTYPES)} (None: as the config)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='fit the learning rate to the real batch size',
    )
    length = parser.add_mutually_exclusive_group()
    for option, metavar, unit in (('--epochs', 'N', 'epochs'), ('--iters', 'N', 'iterations')):
        length.add_argument(
            option,
            type=_positive,
            metavar=metavar,
            help=f'train for N {unit}; the schedule moves along',
        )
    return parser


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm test`; returns the exit code."""
    parser = _parser('test', 'Evaluate a checkpoint on the test data of a config.')
    parser.add_argument('checkpoint', help='checkpoint file of a training run')
    parser.add_argument('--show-dir', metavar='DIR', help='also draw the predictions into DIR')
    parser.add_argument(
        '--fuse',
        nargs='?',
        const='full',
        choices=PLANS,
        help='fuse the network before it is evaluated, with plan full unless another is given',
    )
    parser.add_argument(
        '--backbone',
        nargs='+',
        metavar='ARTIFACT',
        help='run this exported backbone (.onnx, OpenVINO .xml) in place of the network; of '
        'several with a fixed size, each image uses the smallest that it fits in',
    )
    parser.add_argument(
        '--model',
        metavar='ARTIFACT',
        help='evaluate this exported file of a complete model (.onnx, OpenVINO .xml, .pt2)',
    )
    parser.add_argument(
        '--precision',
        choices=('f32', 'bf16', 'f16'),
        help='what an OpenVINO file computes in (None: f32)',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='run a file that is code (TorchScript, AOTInductor), which you made',
    )
    return run_command(_test, parser, argv)


def run_command(
    main: Callable[[argparse.Namespace], Any],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Parse a command line and run it, with the errors and signals of the tools."""
    args = parser.parse_args(argv)
    local_rank = os.environ.get('SLURM_LOCALID', args.local_rank)
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    logging.raiseExceptions = False  # a full disk is said once, not for each line of the log
    try:
        with sigterm_raises():
            return run_tool(lambda: main(args))
    finally:
        release_folders()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Options(DictAction):
    """mmengine's KEY=VALUE action, also for dicts; a malformed pair is a usage error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for text in values:
            try:
                key, value = text.split('=', maxsplit=1)
                options[key] = self._parse(value)
            except (ValueError, AssertionError, RecursionError):
                parser.error(
                    f'{option_string} requires KEY=VALUE pairs, not {text!r}; a value is a number, '
                    'a text, None, a list [1,2], or a dict: "a.b=dict(type=\'X\', c=1)"'
                )
        setattr(namespace, self.dest, options)

    def _parse(self, value: str) -> Any:
        bare = value.strip()
        if bare.startswith(('{', 'dict(')) or (
            bare.startswith(('[', '(')) and any(word in bare for word in ('{', 'dict('))
        ):
            return literal(bare)
        return self._parse_iterable(value)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, not {text}')
    return value


def _parser(tool: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(tool),
        description=description,
        formatter_class=HelpFormatter,
    )
    parser.add_argument('config', help='config file, or a name that `repnext-mm models` lists')
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        '--check-only', action='store_true', help='check data and model, report, and stop'
    )
    check.add_argument('--no-check', action='store_true', help='start without these checks')
    parser.add_argument(
        '--work-dir', metavar='DIR', help='for checkpoints and logs (None: work_dirs/NAME)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        default={},
        metavar='KEY=VALUE',
        help='override settings: a.b=1 c="[1,2]" d=None; data_root=DIR moves all data',
    )
    parser.add_argument(
        '--device',
        choices=('auto', 'cuda'),
        default='auto',
        help='cuda stops where there is no GPU',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        metavar='NAME',
        help='of several processes: pytorch, slurm or mpi',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, metavar='N', help='set by launchers'
    )
    return parser


# --- the two tools


def train(args: argparse.Namespace) -> Trained:
    """Train as the arguments of `train_parser` say.

    Raises:
        UserError: Something that the user can fix.
    """
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if line := rescale(cfg, args.epochs, args.iters):
        _say(line)
    if args.amp:
        enable_amp(cfg, None if args.amp is True else args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                f'--auto-scale-lr needs the batch size of the recipe, which {args.config} does not '
                'give; add --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True
    resume: str | None = args.resume
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or LATEST
    sources = _prepare(cfg, args, ('train', 'val'))
    with explain_full_disk(cfg.work_dir):
        join_processes(cfg)
        if args.check_only:
            make_folder(cfg.work_dir)
        elif line := claim_folder(cfg, None if resume == LATEST else resume, stay=resume == LATEST):
            _say(line)
        sources.write(cfg.work_dir, first=int(os.environ['LOCAL_RANK']) == 0)
        return _train_in_folder(cfg, args, resume, sources)


def _train_in_folder(
    cfg: Config, args: argparse.Namespace, resume: str | None, sources: Sources
) -> Trained:
    checkpoint: RunCheckpoint | None = None
    if resume:
        checkpoint, line = checkpoint_to_resume(cfg, resume)
        cfg.resume = checkpoint is not None
        _say(line)
    elif cfg.get('load_from'):
        checkpoint = read_run(cfg.load_from)
    cfg.load_from = checkpoint and checkpoint.path

    runner = build_runner(cfg, sources, evaluation=args.check_only)
    if cfg.get('resume'):
        runner.register_hook(RequireFit('train', resume=True))
        runner.register_hook(SkipSeenData())
        drop_pretrained(runner.model)
    elif checkpoint is not None:
        runner.register_hook(RequireFit('train', least=HALF))
    runner.register_hook(StopAtNonFiniteLoss())
    runner.register_hook(SayWhatWasNotMeasured())
    if uses_amp(cfg):
        keep_float32_where_needed(runner.model)

    # Nothing is loaded yet and nothing has started.
    _preflight(runner, args, ('train', 'val'), sources)
    _hint_batch_size(cfg, runner.world_size)
    for warning in schedule_warnings(cfg, _epoch_length(runner)):
        _say(f'warning: {warning}')
    if args.check_only:
        return Trained(cfg, Path(cfg.work_dir), None, None)

    try:
        with passed_on(checkpoint):
            runner.train()
    except CheckpointError as error:
        raise UserError(
            f'{str(error).rstrip(".")}; or train without pretrained weights: '
            '--cfg-options model.backbone.init_cfg=None'
        ) from error

    hook = next((h for h in runner.hooks if isinstance(h, CheckpointHook)), None)
    saved, best = getattr(hook, 'last_ckpt', None), getattr(hook, 'best_ckpt_path', None)
    dumped = _shown(dumped_config(runner))
    test = f'next: {command("test")} {dumped}'
    if saved:
        _say(
            f'Wrote {_shown(saved)} and the log in {_shown(runner.log_dir)}; {test} {_shown(saved)}'
        )
    elif cfg.get('resume'):
        kept = _shown(cfg.load_from)
        _say(f'Nothing is left to train: {kept} is at the end of the run; {test} {kept}')
    else:
        _say(
            f'Wrote the log in {_shown(runner.log_dir)}, and no checkpoint; '
            f'again: {command("train")} {dumped}'
        )
    last, best = (Path(path) if path else None for path in (saved, best))
    return Trained(cfg, Path(cfg.work_dir), last, best)


def _test(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    checkpoint = read_run(args.checkpoint)
    cfg.load_from = checkpoint.path
    cfg.resume = False  # the config beside a resumed run's checkpoint says True
    if args.show_dir:
        if 'visualization' not in (cfg.get('default_hooks') or {}) or 'visualizer' not in cfg:
            raise UserError(
                f'--show-dir needs a visualizer and default_hooks.visualization, which '
                f'{args.config} does not have; copy them from configs/_base_/'
                f'{cfg.get("default_scope")}_runtime.py.'
            )
        cfg.default_hooks.visualization.update(draw=True, interval=1)
        cfg.visualizer.save_dir = args.show_dir
    if args.fuse and (args.backbone or args.model):
        raise UserError('--fuse is for the network of the config; an exported file is fused.')
    if args.backbone and args.model:
        raise UserError('--model replaces all of the model, --backbone a part; give one of them.')
    if args.backbone:
        put_in_place(cfg, args.backbone, args.precision, args.trust)
    elif args.precision and not args.model:
        raise UserError(
            '--precision is a setting of an exported file; name it by --model or --backbone.'
        )
    sources = _prepare(cfg, args, ('test',))
    if args.model:  # once the config is known to be sound
        run_file(cfg, args.model, args.precision, args.trust)
    with explain_full_disk(cfg.work_dir):
        make_folder(cfg.work_dir)
        sources.write(cfg.work_dir, first=int(os.environ['LOCAL_RANK']) == 0)
        _test_in_folder(cfg, args, checkpoint, sources)


def _test_in_folder(
    cfg: Config, args: argparse.Namespace, checkpoint: RunCheckpoint, sources: Sources
) -> None:
    runner = build_runner(cfg, sources, evaluation=True)
    model = getattr(runner.model, 'module', runner.model)
    if args.backbone or args.model:
        for line in (
            introduce(model, checkpoint)
            if args.backbone
            else introduce_file(model, checkpoint, config_classes(cfg))
        ):
            _say(line)
    if not args.model:
        runner.register_hook(RequireFit('test'))
    if args.fuse:
        runner.register_hook(FuseForTest(args.fuse))
    runner.register_hook(SayWhatWasNotMeasured(stop=True))

    # Nothing is loaded yet and nothing has started.
    _preflight(runner, args, ('test',), sources)
    if args.check_only:
        return
    with keep_results(runner), passed_on(checkpoint):
        runner.test()
    if note := padding_line(runner.model):
        _say(note)

    arguments = [_shown(dumped_config(runner)), _shown(checkpoint.path)]  # an address is fetched
    results = _shown(Path(runner.log_dir, f'{runner.timestamp}.json'))
    if 'visualization' not in (cfg.get('default_hooks') or {}):  # of a classifier
        following = f'; next: {command("deploy")} {" ".join(arguments)}' if not args.model else '.'
        _say(f'Wrote {results}{following}')
        return
    if args.show_dir:
        wrote, following = f'{results} and pictures under {_shown(args.show_dir)}.', 'Again'
    else:
        wrote, following = f'{results};', 'next'
        arguments += ['--show-dir', 'pictures']
    if args.backbone:
        arguments += ['--backbone', *map(shlex.quote, args.backbone)]
    arguments += ['--fuse', args.fuse] if args.fuse else []
    arguments += ['--model', shlex.quote(args.model)] if args.model else []
    arguments += ['--precision', args.precision] if args.precision else []
    arguments += ['--trust'] if args.trust else []
    _say(f'Wrote {wrote} {following}: {command("test")} {" ".join(arguments)}')


def _say(line: str) -> None:
    """Print from the first process only."""
    if is_first():
        print(printable(line), flush=True)


def _shown(path: str | Path) -> str:
    """A path as short as it can be written, quoted where a shell needs it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith(os.pardir) else relative)


def _prepare(cfg: Config, args: argparse.Namespace, splits: Sequence[str]) -> Sources:
    """Import the framework, put sample data in place, check the data, choose the device."""
    import_framework(cfg.get('default_scope'))
    if sample := cfg.get('sample_data_root'):
        _ensure_sample_data(sample)
    first = int(os.environ['LOCAL_RANK']) == 0
    if first and not args.no_check:
        announce('Checking the data ...')
        require(check_config(cfg), _report(cfg, args))
    sources = Sources() if args.no_check else check_sources(cfg, splits)
    if first:
        require(sources.findings, _report(cfg, args))
    for line in (fit_workers(cfg), choose_device(cfg, args.device, args.launcher)):
        if line:
            _say(line)
    return sources


def _preflight(
    runner: Runner, args: argparse.Namespace, splits: Sequence[str], sources: Sources
) -> None:
    """Look at what was built, in the first process; the others wait for it at their first step."""
    if not args.no_check and int(os.environ['LOCAL_RANK']) == 0:
        preflight(runner, splits, sources, report=_report(runner.cfg, args))


def _report(cfg: Config, args: argparse.Namespace) -> Path | None:
    return Path(cfg.work_dir, f'preflight_{STARTED}.json') if args.check_only else None


def _ensure_sample_data(root: str) -> None:
    from rich.progress import track

    from ..datasets import shapes

    if int(os.environ['LOCAL_RANK']) == 0:
        shapes.ensure(root, track=track)
    while shapes.read_marker(root) is None:
        time.sleep(0.1)  # until the process of rank 0 has written it


def _hint_batch_size(cfg: Config, world_size: int) -> None:
    scale = cfg.get('auto_scale_lr') or {}
    batch = cfg.train_dataloader.get('batch_size')
    base = scale.get('base_batch_size')
    if not batch or not base:
        return
    factors = [batch, world_size]
    if (steps := accumulated(cfg)) > 1:
        factors.append(steps)
    whole = math.prod(factors)
    product = f'{" x ".join(map(str, factors))} = {whole} images'
    if scale.get('enable'):
        _say(f'The batch is {product} and the recipe has {base}: learning rate x {whole / base:g}.')
    elif whole != base:
        _say(
            f'The batch is {product} and the learning rate is that for {base}; '
            '--auto-scale-lr fits it.'
        )


def _epoch_length(runner: Runner) -> int | None:
    """Iterations of an epoch in each process, if the data set has an end."""
    try:
        return len(runner.train_dataloader)
    except TypeError:
        return None

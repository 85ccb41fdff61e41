"""What `repnext-mm train` and `repnext-mm test` do, for detection and segmentation alike."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoints import CheckpointError, RunCheckpoint, read_run
from ..checkpoints.runs import passed_on
from ..operators import explain as explain_operators
from ..program import command, program
from .amp import AMP_DTYPES, enable_amp, keep_float32_where_needed, uses_amp
from .config_file import load_config
from .data_checks import check_data
from .device import choose_device
from .errors import UserError, run_tool
from .exported_backbone import introduce, padding_line, put_in_place
from .quiet import announce, quiet_log
from .rescue import keep_results
from .resume import HALF, LATEST, RequireFit, SkipSeenData, checkpoint_to_resume, drop_pretrained


def train_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm train`; returns the exit code."""
    parser = _parser('train', 'Train a detector or a segmentor.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=LATEST,
        metavar='CKPT',
        help='continue from CKPT, or without CKPT from the newest complete one of the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const=True,
        choices=AMP_DTYPES,
        help=f'mixed precision, unless given in the optim_wrapper.dtype of the config or else in '
        f'{AMP_DTYPES[0]}',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size / the batch size of the recipe',
    )
    return _run(_train, parser, argv)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm test`; returns the exit code."""
    parser = _parser('test', 'Evaluate a checkpoint on the test data of a config.')
    parser.add_argument('checkpoint', help='checkpoint file of a training run')
    parser.add_argument('--show-dir', metavar='DIR', help='also draw the predictions into DIR')
    parser.add_argument(
        '--backbone',
        nargs='+',
        metavar='ARTIFACT',
        help='run this exported backbone (.onnx, OpenVINO .xml) in place of the network; of '
        'several with a fixed size, each image uses the smallest that it fits in',
    )
    parser.add_argument(
        '--precision',
        choices=('f32', 'bf16', 'f16'),
        help='what an OpenVINO backbone computes in (None: f32)',
    )
    return _run(_test, parser, argv)


def _run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    args = parser.parse_args(argv)
    local_rank = os.environ.get('SLURM_LOCALID', args.local_rank)
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    try:
        return run_tool(lambda: main(args))
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Options(DictAction):
    """mmengine's KEY=VALUE action; a malformed one is a usage error, not a traceback."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError):
            parser.error(f'{option_string} requires KEY=VALUE pairs, not {" ".join(values)!r}')


def _parser(tool: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(tool),
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('config', help='config file, or a name such as mask_rcnn_repnext_m0_coco')
    parser.add_argument(
        '--work-dir', help='folder for checkpoints and logs (None: work_dirs/<name of the config>)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config: a.b=1 c="[1,2]" d=None; data_root=DIR moves every '
        'data set and evaluator under the data_root of the config',
    )
    parser.add_argument(
        '--device',
        choices=('auto', 'cuda'),
        default='auto',
        help='auto uses the CPU where there is no GPU; cuda stops there. '
        'CUDA_VISIBLE_DEVICES=-1 hides the GPUs',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='job launcher',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by launchers'
    )
    return parser


# --- the two tools


def _train(args: argparse.Namespace) -> None:
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    if args.amp:
        enable_amp(cfg, None if args.amp is True else args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                f'--auto-scale-lr needs the batch size of the recipe, which {args.config} does not '
                'give; add --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True
    _prepare(cfg, args, ('train', 'val'))
    resume = args.resume or (cfg.get('resume') and (cfg.get('load_from') or LATEST))
    checkpoint: RunCheckpoint | None = None
    if resume:
        checkpoint, line = checkpoint_to_resume(cfg, resume)
        cfg.resume = checkpoint is not None
        _say(line)
    elif cfg.get('load_from'):
        checkpoint = read_run(cfg.load_from)
    cfg.load_from = checkpoint and checkpoint.path

    runner = _build_runner(cfg)
    if cfg.get('resume'):
        runner.register_hook(RequireFit())
        runner.register_hook(SkipSeenData())
        drop_pretrained(runner.model)
    elif checkpoint is not None:
        runner.register_hook(RequireFit(least=HALF))
    if uses_amp(cfg):
        keep_float32_where_needed(runner.model)
    _hint_batch_size(cfg, runner.world_size)
    try:
        with passed_on(checkpoint):
            runner.train()
    except CheckpointError as error:
        raise UserError(
            f'{str(error).rstrip(".")}; or train without pretrained weights: '
            '--cfg-options model.backbone.init_cfg=None'
        ) from error

    saved = next((h.last_ckpt for h in runner.hooks if isinstance(h, CheckpointHook)), None)
    dumped = Path(runner.work_dir, Path(cfg.filename).name)
    if saved:
        _say(
            f'Wrote {_shown(saved)} and the log in {_shown(runner.log_dir)}; '
            f'next: {command("test")} {_shown(dumped)} {_shown(saved)}'
        )
    else:
        _say(f'Wrote the log in {_shown(runner.log_dir)}, and no checkpoint.')


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
    if args.backbone:
        put_in_place(cfg, args.backbone, args.precision)
    elif args.precision:
        raise UserError('--precision is a setting of an exported backbone; name it by --backbone.')
    _prepare(cfg, args, ('test',))

    runner = _build_runner(cfg)
    if args.backbone:
        for line in introduce(getattr(runner.model, 'module', runner.model), checkpoint):
            _say(line)
    runner.register_hook(RequireFit())
    with keep_results(runner), passed_on(checkpoint):
        runner.test()
    if note := padding_line(runner.model):
        _say(note)

    arguments = [args.config, args.checkpoint, '--show-dir', 'pictures']
    if args.backbone:
        arguments += ['--backbone', *args.backbone]
    results = Path(runner.log_dir, f'{runner.timestamp}.json')
    _say(
        f'Wrote {_shown(results)} and pictures under {_shown(args.show_dir)}.'
        if args.show_dir
        else f'Wrote {_shown(results)}; next: {command("test")} {shlex.join(arguments)}'
    )


def _say(line: str) -> None:
    """Print from the first process only, which launchers name before the process group exists."""
    if int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0:
        print(line, flush=True)


def _shown(path: str | Path) -> str:
    """A path as short as it can be written, quoted where a shell needs it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith(os.pardir) else relative)


def _prepare(cfg: Config, args: argparse.Namespace, splits: Sequence[str]) -> None:
    """Import the framework, put sample data in place, check the data, choose the device."""
    import_framework(cfg.get('default_scope'))
    if sample := cfg.get('sample_data_root'):
        _ensure_sample_data(sample)
    if int(os.environ['LOCAL_RANK']) == 0:
        announce('Checking the data ...')
        check_data(cfg, splits)
        _make_work_dir(Path(cfg.work_dir))
    if line := choose_device(cfg, args.device, args.launcher):
        _say(line)


def _make_work_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f'--work-dir {path} cannot be written ({error.strerror}); give another folder.'
        ) from error


def import_framework(scope: str | None) -> None:
    """Fill the registries of the framework that the config is written for."""
    if scope in (None, 'mmengine'):
        return
    try:
        module = import_module(f'{scope}.utils')
        module.register_all_modules(init_default_scope=False)
    except (ImportError, AssertionError) as error:
        reason = explain_operators(error) or ' '.join(str(error).split())
        raise UserError(
            f'{scope} cannot be used: {reason.rstrip(".")}; '
            '`repnext-mm doctor` says what to install.'
        ) from error


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
    if batch and base and batch * world_size != base and not scale.get('enable'):
        _say(
            f'The batch is {batch} x {world_size} = {batch * world_size} images and the learning '
            f'rate is that for {base}; --auto-scale-lr fits it.'
        )


class QuietRunner(Runner):
    """mmengine's runner; what nobody can act on is in its log file and not on the screen."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As mmengine's, before the environment and the config are logged."""
        logger = super().build_logger(*args, **kwargs)
        quiet_log(logger)
        return logger


def _build_runner(cfg: Config) -> Runner:
    return RUNNERS.build(cfg) if 'runner_type' in cfg else QuietRunner.from_cfg(cfg)

"""What tools/train.py and tools/test.py do, for detection and segmentation alike."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoints import CheckpointError, ensure_safe
from .atomic_checkpoint import checkpoints_newest_first, resumable_problem
from .data_checks import check_data
from .device import choose_device
from .errors import UserError, run_tool

AMP_DTYPES = ('bfloat16', 'float16')
MATCHED_SHARE = 0.99  # below this a checkpoint belongs to another model
LATEST = 'latest'


def train_main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/train.py; returns the exit code."""
    parser = _parser('Train a detector or a segmentor.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=LATEST,
        metavar='CKPT',
        help='continue from CKPT, or without CKPT from the newest whole checkpoint of the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const=AMP_DTYPES[0],
        choices=AMP_DTYPES,
        help=f'mixed precision on a GPU, in {AMP_DTYPES[0]} unless given',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size / the batch size of the recipe',
    )
    return _run(_train, parser, argv)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/test.py; returns the exit code."""
    parser = _parser('Evaluate a checkpoint on the test data of a config.')
    parser.add_argument('checkpoint', help='checkpoint file of a training run')
    parser.add_argument('--show-dir', metavar='DIR', help='also draw the predictions into DIR')
    return _run(_test, parser, argv)


def _run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
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
            parser.error(f'{option_string} takes KEY=VALUE pairs, not {" ".join(values)!r}')


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('config', help='config file, such as configs/mask_rcnn_repnext_m0_coco.py')
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
        'data set and evaluator that lies under the data_root of the config',
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
    cfg = _load_config(args)
    if args.amp:
        _enable_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                f'--auto-scale-lr needs the batch size of the recipe, which {args.config} does not '
                'give; add --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True
    _prepare(cfg, args, ('train', 'val'))
    if args.resume:
        cfg.load_from = _checkpoint_to_resume(cfg, args.resume)
        cfg.resume = cfg.load_from is not None

    runner = _build_runner(cfg)
    if cfg.resume:
        runner.register_hook(RequireFit())
        _weights_come_from_checkpoint(runner)
    if args.amp == 'bfloat16':
        _keep_roi_align_out_of_bfloat16(runner.model)
    _hint_batch_size(cfg, runner.world_size)
    try:
        runner.train()
    except CheckpointError as error:
        raise UserError(
            f'{str(error).rstrip(".")}; or train without pretrained weights: '
            '--cfg-options model.backbone.init_cfg=None'
        ) from error

    saved = next((h.last_ckpt for h in runner.hooks if isinstance(h, CheckpointHook)), None)
    dumped = Path(runner.work_dir, Path(args.config).name)
    if saved:
        _say(
            f'Wrote {_shown(saved)} and the log in {_shown(runner.log_dir)}; '
            f'next: python tools/test.py {_shown(dumped)} {_shown(saved)}'
        )
    else:
        _say(f'Wrote the log in {_shown(runner.log_dir)}, and no checkpoint.')


def _test(args: argparse.Namespace) -> None:
    cfg = _load_config(args)
    cfg.load_from = ensure_safe(args.checkpoint)
    if args.show_dir:
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = args.show_dir
    _prepare(cfg, args, ('test',))

    runner = _build_runner(cfg)
    runner.register_hook(RequireFit())
    runner.test()

    command = ['python', 'tools/test.py', args.config, args.checkpoint, '--show-dir', 'pictures']
    results = Path(runner.log_dir, f'{runner.timestamp}.json')
    _say(
        f'Wrote {_shown(results)} and pictures under {_shown(args.show_dir)}.'
        if args.show_dir
        else f'Wrote {_shown(results)}; next: {shlex.join(command)}'
    )


def _say(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


def _shown(path: str | Path) -> str:
    """A path as short as it can be written, quoted where a shell needs it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith(os.pardir) else relative)


# --- config


def _load_config(args: argparse.Namespace) -> Config:
    path = _find_config(args.config)
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise UserError(f'{path} imports what is not installed: {error}') from error
    except (SyntaxError, KeyError, OSError, TypeError) as error:
        raise UserError(f'{path} is not a valid config: {error}') from error
    root = cfg.get('data_root')
    cfg.merge_from_dict(args.cfg_options)
    if root and cfg.data_root != root:
        for key in ('train', 'val', 'test'):
            for part in ('dataloader', 'evaluator'):
                name = f'{key}_{part}'
                if cfg.get(name) is not None:
                    cfg[name] = _moved(cfg[name], root, str(cfg.data_root))
    if cfg.get('model') is None:
        raise UserError(f'{path} has no model; give a whole config such as those in configs/*.py.')
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', path.stem))
    return cfg


def _find_config(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f'{name} is a folder; name one config file in it.')
    known = {p.stem: p for p in sorted(Path('configs').glob('*.py'))}
    known |= {p.stem: p for p in sorted(path.parent.glob('*.py'))}
    close = difflib.get_close_matches(path.stem, known, 1, cutoff=0.4)
    hint = f'did you mean {known[close[0]]}?' if close else 'see configs/ for those there are.'
    raise UserError(f'there is no config {name} (looked in {path.absolute()}); {hint}')


def _moved(node: Any, old: str, new: str) -> Any:
    """`node` with every path under `old` moved under `new`."""
    if isinstance(node, dict):
        return type(node)({key: _moved(value, old, new) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, old, new) for value in node)
    stem = old.rstrip('/')
    if isinstance(node, str) and (node.rstrip('/') == stem or node.startswith(f'{stem}/')):
        return new.rstrip('/') + node[len(stem) :]
    return node


def _enable_amp(cfg: Config, dtype: str) -> None:
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper, not with {kind}.')
    cfg.optim_wrapper.update(
        type='AmpOptimWrapper',
        dtype=dtype,
        # bfloat16 has the exponents of float32: gradients cannot underflow, so nothing to scale.
        loss_scale='dynamic' if dtype == 'float16' else dict(enabled=False),
    )


# --- before the runner


def _prepare(cfg: Config, args: argparse.Namespace, splits: Sequence[str]) -> None:
    """Import the framework, put sample data in place, check the data, choose the device."""
    _import_framework(cfg.get('default_scope'))
    if sample := cfg.get('sample_data_root'):
        _ensure_sample_data(sample)
    if int(os.environ['LOCAL_RANK']) == 0:
        check_data(cfg, splits)
    if line := choose_device(cfg, args.device, args.launcher):
        _say(line)


def _import_framework(scope: str | None) -> None:
    """Fill the registries of the framework that the config is written for."""
    if scope in (None, 'mmengine'):
        return
    try:
        module = import_module(f'{scope}.utils')
        module.register_all_modules(init_default_scope=False)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f'{scope} cannot be used: {" ".join(str(error).split())}; '
            '`python -m repnext_mm.doctor` says what to install.'
        ) from error


def _ensure_sample_data(root: str) -> None:
    from ..datasets import shapes

    if int(os.environ['LOCAL_RANK']) == 0:
        shapes.ensure(root)
    while shapes.read_marker(root) is None:
        time.sleep(0.1)  # until the process of rank 0 has written it


def _checkpoint_to_resume(cfg: Config, resume: str) -> str | None:
    """The checkpoint to continue from; None where a run has none yet and has to start."""
    if resume != LATEST:
        if problem := resumable_problem(resume):
            raise UserError(
                f'training cannot continue from {resume}: {problem}; give --resume without a file '
                'to take the newest whole checkpoint.'
            )
        return resume
    skipped = []
    chosen = None
    for path in checkpoints_newest_first(cfg.work_dir, cfg.default_hooks.checkpoint):
        problem = resumable_problem(path)
        if problem is None:
            chosen = str(path)
            break
        skipped.append(problem)
    note = f' (skipped: {"; ".join(skipped)})' if skipped else ''
    _say(
        f'Resuming from {_shown(chosen)}{note}.'
        if chosen
        else f'No whole checkpoint in {_shown(cfg.work_dir)}{note}: starting from the beginning.'
    )
    return chosen


def _hint_batch_size(cfg: Config, world_size: int) -> None:
    scale = cfg.get('auto_scale_lr') or {}
    batch = cfg.train_dataloader.get('batch_size')
    base = scale.get('base_batch_size')
    if batch and base and batch * world_size != base and not scale.get('enable'):
        _say(
            f'The batch is {batch} x {world_size} = {batch * world_size} images and the learning '
            f'rate is that for {base}; --auto-scale-lr fits it.'
        )


# --- the runner


def _build_runner(cfg: Config) -> Runner:
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


class RequireFit(Hook):
    """Refuse a checkpoint of another model, of which mmengine would load what happens to fit."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = getattr(runner.model, 'module', runner.model)
        own = {key: value.shape for key, value in model.state_dict().items()}
        given = {
            key.removeprefix('module.'): getattr(value, 'shape', None)
            for key, value in checkpoint.get('state_dict', checkpoint).items()
        }
        matched = sum(given.get(key) == shape for key, shape in own.items())
        if matched < MATCHED_SHARE * len(own):
            unfit = next(key for key, shape in own.items() if given.get(key) != shape)
            raise UserError(
                f'{runner._load_from} does not fit the config: {matched} of the {len(own)} entries '
                f'of the model match, {unfit} is the first that does not; use the config that the '
                'checkpoint was trained with, it lies beside it in the work dir.'
            )


def _weights_come_from_checkpoint(runner: Runner) -> None:
    """Spare the start of a resumed run the pretrained weights, and with them the network."""
    for module in runner.model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None


def _keep_roi_align_out_of_bfloat16(model: torch.nn.Module) -> None:
    """mmcv's RoIAlign has no bfloat16 kernel: compute it in float32 and hand back bfloat16."""
    for module in model.modules():
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: tuple(a.float() for a in args))
            module.register_forward_hook(lambda _, args, output: output.to(torch.bfloat16))

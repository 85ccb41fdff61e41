"""What `repnext-mm train` and `repnext-mm test` do, for detection and segmentation alike."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoints import CheckpointError, RunCheckpoint, read_run
from ..checkpoints.runs import passed_on
from ..operators import explain as explain_operators
from ..program import command, program
from ..text import printable
from .amp import AMP_DTYPES, enable_amp, keep_float32_where_needed, uses_amp
from .config_file import load_config
from .device import choose_device
from .errors import UserError, run_tool, sigterm_raises
from .exported_backbone import introduce, padding, put_in_place
from .finite import StopAtNonFinite
from .preflight import Sources, check_config, check_sources, preflight, require
from .preflight.built import classes_of
from .quiet import announce, quiet_log
from .rescue import keep_results, no_ground_truth
from .resume import HALF, LATEST, RequireFit, SkipSeenData, checkpoint_to_resume, drop_pretrained
from .run_folder import claimed
from .schedule import accumulated, batch_hint, schedule_notes, set_length

#: A value of --cfg-options that only a literal can be.
HAS_DICT = re.compile(r'\{|\bdict\(')
#: When this process started, for the name of its report.
STARTED = time.strftime('%Y%m%d_%H%M%S')


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
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        '--epochs',
        type=int,
        metavar='N',
        help='train for N epochs; milestones, warm-up and intervals follow',
    )
    length.add_argument(
        '--iters',
        type=int,
        metavar='N',
        help='train for N iterations, where the config counts in iterations; milestones, warm-up '
        'and intervals follow',
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
    parser.add_argument(
        '--trust',
        action='store_true',
        help='run a backbone that is code (TorchScript, AOTInductor), which you made',
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
        with sigterm_raises():
            return run_tool(lambda: main(args))
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Options(DictAction):
    """mmengine's KEY=VALUE action; a malformed one is a usage error, not a traceback."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            key, equals, text = pair.partition('=')
            try:
                if not equals or not key:
                    raise ValueError
                # mmengine's reader knows no dicts, and takes one apart at its commas.
                options[key] = (
                    _literal(text) if HAS_DICT.search(text) else self._parse_iterable(text)
                )
            except (ValueError, AssertionError, SyntaxError, RecursionError):
                parser.error(
                    f'{option_string} requires KEY=VALUE pairs, not {pair!r}; a dict is written '
                    "as \"{'type': 'FPN', 'num_outs': 4}\""
                )
        setattr(namespace, self.dest, options)


class _Dicts(ast.NodeTransformer):
    """dict(a=1) as {'a': 1}, which is a literal."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict' or node.args:
            raise ValueError('only dict(key=value) is a value')
        keys: list[ast.expr | None] = [ast.Constant(k.arg) for k in node.keywords]
        return ast.Dict(keys=keys, values=[k.value for k in node.keywords])


def _literal(text: str) -> Any:
    """A Python literal, with dict(...), or one of JSON."""
    try:
        return ast.literal_eval(_Dicts().visit(ast.parse(text.strip(), mode='eval')))
    except (ValueError, SyntaxError):
        return json.loads(text)


def _parser(tool: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(tool),
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('config', help='config file, or a name such as mask_rcnn_repnext_m0_coco')
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        '--check-only', action='store_true', help='only check the data and the model, and report'
    )
    check.add_argument(
        '--no-check', action='store_true', help='start without checking the data and the model'
    )
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
    set_length(cfg, args.epochs, args.iters)
    if args.amp:
        enable_amp(cfg, None if args.amp is True else args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                f'--auto-scale-lr needs the batch size of the recipe, which {args.config} does not '
                'give; add --cfg-options auto_scale_lr.base_batch_size=N'
            )
        cfg.auto_scale_lr.enable = True
    resume = args.resume or (cfg.get('resume') and (cfg.get('load_from') or LATEST))
    with nullcontext() if args.check_only else claimed(cfg, bool(resume)) as line:
        if line:
            _say(line)
        _train_in_folder(cfg, args, resume)


def _train_in_folder(cfg: Config, args: argparse.Namespace, resume: str | None) -> None:
    sources = _prepare(cfg, args, ('train', 'val'))
    checkpoint: RunCheckpoint | None = None
    if resume:
        checkpoint, line = checkpoint_to_resume(cfg, resume)
        cfg.resume = checkpoint is not None
        _say(line)
    elif cfg.get('load_from'):
        checkpoint = read_run(cfg.load_from)
    cfg.load_from = checkpoint and checkpoint.path

    runner = _build_runner(cfg, sources, config_beside_log=args.check_only)
    _preflight(runner, args, ('train', 'val'), sources)
    if hint := batch_hint(cfg, runner.world_size):
        _say(hint)
    for note in schedule_notes(runner):
        _say(f'warning: {note}')
    if args.check_only:
        return
    if cfg.get('resume'):
        runner.register_hook(RequireFit(classes=_classes(runner.train_loop)))
        runner.register_hook(SkipSeenData())
        drop_pretrained(runner.model)
    elif checkpoint is not None:
        runner.register_hook(RequireFit(least=HALF, classes=_classes(runner.train_loop)))
    if uses_amp(cfg):
        keep_float32_where_needed(runner.model)
    runner.register_hook(StopAtNonFinite(), priority='HIGH')
    try:
        with passed_on(checkpoint):
            runner.train()
    except CheckpointError as error:
        raise UserError(
            f'{str(error).rstrip(".")}; or train without pretrained weights: '
            '--cfg-options model.backbone.init_cfg=None'
        ) from error

    saved = next((h.last_ckpt for h in runner.hooks if isinstance(h, CheckpointHook)), None)
    dumped = _shown(Path(runner.work_dir, config_name(runner)))
    if saved:
        _say(
            f'Wrote {_shown(saved)} and the log in {_shown(runner.log_dir)}; '
            f'next: {command("test")} {dumped} {_shown(saved)}'
        )
    else:
        _say(
            f'Wrote the log in {_shown(runner.log_dir)}, and no checkpoint; '
            f'again: {command("train")} {dumped}'
        )


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
        put_in_place(cfg, args.backbone, args.precision, args.trust)
    elif args.precision:
        raise UserError('--precision is a setting of an exported backbone; name it by --backbone.')
    sources = _prepare(cfg, args, ('test',))

    runner = _build_runner(cfg, sources, config_beside_log=True)
    _preflight(runner, args, ('test',), sources)
    if args.check_only:
        return
    if args.backbone:
        for line in introduce(getattr(runner.model, 'module', runner.model), checkpoint):
            _say(line)
    runner.register_hook(RequireFit(classes=_classes(runner.test_loop)))
    with keep_results(runner), passed_on(checkpoint):
        metrics = runner.test()
    if sentence := no_ground_truth(metrics):
        raise UserError(sentence)
    if not metrics:
        _say('warning: nothing was found in any image, so there are no metrics; AP is 0.')
    if args.backbone and (note := padding(getattr(runner.model, 'module', runner.model))):
        _say(note)

    results = Path(runner.log_dir, f'{runner.timestamp}.json')
    # The config is dumped with all overrides, that of the exported backbone too.
    again = [_shown(Path(runner.log_dir, config_name(runner))), _shown(args.checkpoint)]
    again = [command('test'), *again]
    _say(
        f'Wrote {_shown(results)} and pictures under {_shown(args.show_dir)}; '
        f'again: {" ".join(again)}'
        if args.show_dir
        else f'Wrote {_shown(results)}; next: {" ".join([*again, "--show-dir", "pictures"])}'
    )


def _classes(loop: Any) -> tuple[str, ...] | None:
    """The class names of the data set of a built loop."""
    return classes_of(loop.dataloader.dataset)


def _say(line: str) -> None:
    """Print from the first process only, which launchers name before the process group exists."""
    if int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0:
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
    if int(os.environ['LOCAL_RANK']) == 0 and not args.no_check:
        announce('Checking the data ...')
        require(check_config(cfg), _report(cfg, args))
    sources = Sources() if args.no_check else check_sources(cfg, splits)
    if int(os.environ['LOCAL_RANK']) == 0:
        require(sources.findings, _report(cfg, args))
        _make_work_dir(Path(cfg.work_dir))
    sources.write(cfg.work_dir, first=int(os.environ['LOCAL_RANK']) == 0)
    if line := choose_device(cfg, args.device, args.launcher):
        _say(line)
    return sources


def _preflight(
    runner: Runner, args: argparse.Namespace, splits: Sequence[str], sources: Sources
) -> None:
    """Look at what was built, in the first process; the others wait for it at their first step."""
    if args.no_check or int(os.environ['LOCAL_RANK']) != 0:
        return
    preflight(runner, splits, sources, report=_report(runner.cfg, args))


def _report(cfg: Config, args: argparse.Namespace) -> Path | None:
    return Path(cfg.work_dir, f'preflight_{STARTED}.json') if args.check_only else None


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


class QuietRunner(Runner):
    """mmengine's runner; what nobody can act on is in its log file and not on the screen."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As mmengine's, before the environment and the config are logged."""
        logger = super().build_logger(*args, **kwargs)
        quiet_log(logger)
        return logger

    sources = Sources()
    #: Whether the config is dumped into the log folder, and not beside the checkpoints of a run.
    config_beside_log = False

    def dump_config(self) -> None:
        """As mmengine's; a test or a check leaves the config of the training run as it is."""
        if not self.config_beside_log:
            super().dump_config()
        elif is_main_process():
            self.cfg.dump(str(Path(self.log_dir, config_name(self))))

    def build_dataloader(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As mmengine's, with completed annotation files in place of those of the config."""
        return super().build_dataloader(self.sources.apply(dataloader), *args, **kwargs)

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """As mmengine's, with the batches counted whose gradients are accumulated."""
        if auto_scale_lr and auto_scale_lr.get('enable') and (count := accumulated(self.cfg)) > 1:
            base = auto_scale_lr['base_batch_size'] / count
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base}
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def build_evaluator(self, evaluator: Any) -> Any:
        """As mmengine's, with completed annotation files in place of those of the config."""
        return super().build_evaluator(self.sources.apply(evaluator))


class OneTimeRunner(QuietRunner):
    """A runner that leaves no config in the work dir."""

    config_beside_log = True


def config_name(runner: Runner) -> str:
    """The name under which a runner dumps its config."""
    return Path(runner.cfg.filename or f'{runner.timestamp}.py').name


def _build_runner(cfg: Config, sources: Sources, config_beside_log: bool = False) -> Runner:
    if 'runner_type' in cfg:
        return RUNNERS.build(sources.apply(cfg))
    runner = (OneTimeRunner if config_beside_log else QuietRunner).from_cfg(cfg)
    runner.sources = sources
    return runner

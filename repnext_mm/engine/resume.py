"""Continuing a run: which checkpoint, whether it fits, and without repeating work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn

from ..checkpoints import CheckpointError, File, RunCheckpoint, read_checkpoint
from ..checkpoints.reading import check_crc
from ..text import printable
from .errors import UserError
from .finite import first_non_finite

LATEST = 'latest'
#: A run that starts from the weights of another one with less than this share starts from nothing.
HALF = 0.5
#: What a checkpoint holds that training can continue from.
#: What a scheduler's state says about the schedule.
SCHEDULE = (
    'milestones',
    'gamma',
    'begin',
    'end',
    'total_iters',
    'T_max',
    'eta_min',
    'power',
    'start_factor',
    'end_factor',
)
RESUMABLE = ('meta', 'state_dict', 'message_hub', 'optimizer')


def checkpoint_to_resume(cfg: Config, resume: str) -> tuple[RunCheckpoint | None, str]:
    """The checkpoint to continue from, and a line for the user about it.

    Args:
        cfg: Its `work_dir` is searched, for what its checkpoint hook writes there.
        resume: A file, or LATEST for the newest complete checkpoint. There may be none yet; the
            run then starts at the beginning.

    Raises:
        UserError: Training cannot continue from the given file.
    """
    if resume != LATEST:
        checkpoint = read_resumable(resume)
        if isinstance(checkpoint, str):
            raise UserError(
                f'training cannot continue from {resume}: {checkpoint}; give --resume without a '
                'file to use the newest complete checkpoint.'
            )
        return checkpoint, f'Resuming from {resume}.'
    hook_cfg = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    skipped: list[str] = []
    for path in checkpoints_newest_first(cfg.work_dir, hook_cfg):
        checkpoint = read_resumable(path)
        if isinstance(checkpoint, RunCheckpoint):
            note = f' (skipped: {"; ".join(skipped)})' if skipped else ''
            return checkpoint, f'Resuming from {path}{note}.'
        skipped.append(checkpoint)
    note = f' (skipped: {"; ".join(skipped)})' if skipped else ''
    return None, f'No complete checkpoint in {cfg.work_dir}{note}: starting at the beginning.'


def read_resumable(path: str | Path) -> RunCheckpoint | str:
    """The checkpoint at `path`, or why training cannot continue from it.

    All of the file is checked: a truncated or damaged one must not pass for a checkpoint.
    """
    name = Path(path).name
    try:
        file = File.read(path, name)
        check_crc(file)
        content = read_checkpoint(file)
    except (CheckpointError, OSError) as error:
        return str(error).rstrip('.')
    missing = [key for key in RESUMABLE if key not in content]
    if missing:
        return f'{name} lacks {", ".join(missing)}'
    return RunCheckpoint(str(path), content, file.sha256)


def checkpoints_newest_first(work_dir: str | Path, hook_cfg: dict) -> Iterator[Path]:
    """The regular checkpoints of a run, found by the numbers in their names.

    `last_checkpoint`, which mmengine follows, is not read: a kill can leave it empty, half-written
    or one behind.
    """
    folder = Path(work_dir)
    if hook_cfg.get('out_dir'):
        folder = Path(hook_cfg['out_dir']) / folder.name  # as CheckpointHook does
    by_epoch = hook_cfg.get('by_epoch', True)
    template = hook_cfg.get('filename_tmpl') or ('epoch_{}.pth' if by_epoch else 'iter_{}.pth')
    name = re.compile(re.escape(template).replace(re.escape('{}'), r'(\d+)'))
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := name.fullmatch(path.name))
    }
    for number in sorted(found, reverse=True):
        yield found[number]


class RequireFit(Hook):
    """Refuse a checkpoint of another model, of which mmengine would load what happens to fit.

    Args:
        least: Share of the model's entries that must be in the checkpoint; with less than all,
            a line says how many are.
        classes: Of the data set; with all entries required, the checkpoint has the same.
    """

    def __init__(self, least: float = 1.0, classes: Sequence[str] | None = None) -> None:
        self.least = least
        self.classes = classes

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before anything is loaded.

        Raises:
            UserError: Too few entries fit, or one is NaN or infinite.
        """
        model = getattr(runner.model, 'module', runner.model)
        path = str(runner.cfg.load_from)
        line = require_fit(model, checkpoint, path, self.least)
        if self.classes is not None:
            difference = other_classes(checkpoint, self.classes, path)
            if difference and self.least == 1:
                raise UserError(difference)
            line = f'{line} {difference}' if difference else line
        if self.least < 1 and is_main_process():
            print(printable(line), flush=True)
        if runner.cfg.get('resume'):
            self._compare_training(runner, checkpoint, path)

    def _compare_training(self, runner: Runner, checkpoint: dict[str, Any], path: str) -> None:
        require_optimizer(runner.optim_wrapper, checkpoint, path)
        if is_main_process():
            for line in what_stays(runner, checkpoint):
                print(printable(line), flush=True)


def require_fit(model: nn.Module, checkpoint: dict[str, Any], path: str, least: float = 1.0) -> str:
    """Compare the names and shapes of a checkpoint of a run with those of `model`.

    Counters of batches, which no inference uses, are left out. Returns a line that says how many
    entries fit.

    Raises:
        UserError: Less than `least` of the model's entries are in the checkpoint, or one of its
            entries is NaN or infinite.
    """
    own = {
        key: value.shape
        for key, value in model.state_dict().items()
        if not key.endswith('.num_batches_tracked')
    }
    state = checkpoint.get('state_dict', checkpoint)
    given = {key.removeprefix('module.'): value for key, value in state.items()}
    unfit = [key for key, shape in own.items() if getattr(given.get(key), 'shape', None) != shape]
    matched = len(own) - len(unfit)
    if unfit and matched < least * len(own):
        raise UserError(
            f'{path} does not fit the config: {matched} of the {len(own)} entries of the model '
            f'match, {unfit[0]} is the first that does not{_place(own, given)}; use the config '
            'that the checkpoint was trained with, which is beside it in the work dir.'
        )
    for key, value in given.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise UserError(
                f'{path} has NaN or infinity in {key}; use a checkpoint from before the training '
                'diverged.'
            )
    return f'Loading {matched} of the {len(own)} entries of the model from {path}.'


def other_classes(checkpoint: Mapping[str, Any], classes: Sequence[str], path: str) -> str | None:
    """A sentence if the classes in the `meta` of a checkpoint are not `classes`, in their order."""
    meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    stored = meta.get('classes') or meta.get('CLASSES')
    if not isinstance(stored, list | tuple) or tuple(stored) == tuple(classes):
        return None
    place = next(
        (i for i, (a, b) in enumerate(zip(stored, classes, strict=False)) if a != b),
        min(len(stored), len(classes)),
    )
    return (
        f'{path} was trained on {len(stored)} classes ({_some(stored)}), and the data has '
        f'{len(classes)} ({_some(classes)}): label {place} is '
        f'{stored[place]!r} there and {classes[place]!r} here; '
        if place < min(len(stored), len(classes))
        else f'{path} was trained on {len(stored)} classes ({_some(stored)}), and the data has '
        f'{len(classes)} ({_some(classes)}); '
    ) + 'set metainfo=dict(classes=(...)) of the data set to those of the checkpoint.'


def _some(names: Sequence[str], most: int = 5) -> str:
    return ', '.join(map(str, names[:most])) + (', ...' if len(names) > most else '')


def require_optimizer(wrapper: Any, checkpoint: Mapping[str, Any], path: str) -> None:
    """Compare the optimizer of a checkpoint with that of the run, before its state is loaded.

    Raises:
        UserError: It is of another kind, for other parameters, or has NaN or infinity.
    """
    stored, optimizer = checkpoint.get('optimizer') or {}, getattr(wrapper, 'optimizer', None)
    groups = stored.get('param_groups')
    if optimizer is None or not isinstance(groups, list):
        return  # several optimizers, or none
    fix = (
        'use the config that the checkpoint was trained with, which is beside it in the work dir, '
        'or start from its weights only: --cfg-options load_from=... without --resume.'
    )
    own = optimizer.param_groups
    kind = type(optimizer).__name__
    keys = [set(g) - {'params', 'initial_lr'} for g in (groups[0], own[0])]
    extra, lacking = keys[0] - keys[1], keys[1] - keys[0]
    if {'betas', 'momentum', 'alpha', 'rho', 'nesterov'} & (extra | lacking):
        raise UserError(
            f'{path} has the state of another optimizer, with {", ".join(sorted(extra))}, and the '
            f'config asks for {kind}, with {", ".join(sorted(lacking))}; {fix}'
        )
    sizes = [[len(g['params']) for g in side] for side in (groups, own)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f'{path} has an optimizer for {sum(sizes[0])} parameters in {len(sizes[0])} groups, '
            f'and the config sets one up for {sum(sizes[1])} in {len(sizes[1])}; {fix}'
        )
    parameters = dict(
        zip(
            (i for g in groups for i in g['params']),
            (p for g in own for p in g['params']),
            strict=True,
        )
    )
    for number, state in (stored.get('state') or {}).items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if number in parameters and value.shape != parameters[number].shape:
                raise UserError(
                    f'{path} has {name} of shape {tuple(value.shape)} for a parameter of shape '
                    f'{tuple(parameters[number].shape)}; {fix}'
                )
    if (name := first_non_finite(stored.get('state') or {})) is not None:
        raise UserError(
            f'{path} has NaN or infinity in the state of its optimizer ({name}); use a checkpoint '
            'from before the training diverged.'
        )


def what_stays(runner: Runner, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Lines on settings of the config that a resumed run does not follow.

    mmengine restores the learning rates and the schedulers of the checkpoint as they are, and takes
    the length of the run from the config.
    """
    groups = (checkpoint.get('optimizer') or {}).get('param_groups')
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    if optimizer is not None and isinstance(groups, list) and groups:
        then = groups[0].get('initial_lr', groups[0].get('lr'))
        now = optimizer.param_groups[0].get('initial_lr', optimizer.param_groups[0].get('lr'))
        if then != now:
            yield (
                f'The learning rate of the checkpoint stays: {then}, and not {now} of the config; '
                'to change it, start from the weights (load_from) without --resume.'
            )
    stored, own = checkpoint.get('param_schedulers'), runner.param_schedulers
    if isinstance(stored, list) and isinstance(own, list):
        differing = [
            f'{name} {old[name]} and not {new[name]}'
            for old, new in zip(stored, (s.state_dict() for s in own), strict=False)
            for name in SCHEDULE
            if name in old and name in new and _plain(old[name]) != _plain(new[name])
        ]
        if len(stored) != len(own):
            differing.append(f'{len(stored)} schedulers and not {len(own)}')
        if differing:
            yield (
                f'The schedule of the checkpoint stays: {"; ".join(differing)} of the config; the '
                'length of the run is that of the config.'
            )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _place(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Where in the checkpoint the model's entries are, or the backbone's, if that is the fault."""
    for part, names in (
        ('model', own),
        ('backbone', [key.removeprefix('backbone.') for key in own if key.startswith('backbone.')]),
    ):
        for prefix in dict.fromkeys(key.removesuffix(name) for name in names for key in given
                                    if key.endswith(name)):  # fmt: skip
            if part == 'model' and not prefix:
                continue  # where it belongs
            if sum(prefix + name in given for name in names) > len(names) / 2:
                where = f'under {prefix!r}' if prefix else 'alone'
                return f' (the {part} is in it {where})'
    return ''


class SkipSeenData(Hook):
    """Take an iteration-based run to its place in the data without reading what comes before.

    mmengine 0.10.7 loads and discards one batch for each iteration that is done: hours, late in a
    long run. Later versions skip by themselves.
    """

    def before_train(self, runner: Runner) -> None:
        """Advance the sampler, and let mmengine discard placeholders."""
        loop = runner.train_loop
        if not isinstance(loop, IterBasedTrainLoop) or hasattr(
            loop.dataloader_iterator, 'skip_iter'
        ):
            return
        sampler, batch_size = loop.dataloader.sampler, loop.dataloader.batch_size
        if not isinstance(sampler, InfiniteSampler) or batch_size is None:
            return
        seen = runner.iter * batch_size
        sampler.indices = itertools.islice(sampler._indices_of_rank(), seen, None)
        fresh = type(loop.dataloader_iterator)(loop.dataloader)
        loop.dataloader_iterator = itertools.chain(itertools.repeat(None, runner.iter), fresh)


def drop_pretrained(model: nn.Module) -> None:
    """Spare a resumed run its pretrained weights, and with them the network: it has its own."""
    for module in model.modules():
        if not isinstance(module, BaseModule):
            continue
        if isinstance(module.init_cfg, dict) and module.init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None

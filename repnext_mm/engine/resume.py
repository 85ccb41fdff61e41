"""Continuing a run: which checkpoint, whether it fits, and without repeating work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn

from ..checkpoints import CheckpointError, File, RunCheckpoint, read_checkpoint
from ..checkpoints.matching import find_fit
from ..checkpoints.reading import check_crc
from ..network import Network
from .errors import UserError
from .preflight.findings import some
from .run_folder import checkpoints_newest_first
from .stored import (
    classes_difference,
    require_classes,
    require_finite,
    require_optimizer,
    resume_note,
)

LATEST = 'latest'
#: A run that starts from the weights of another one with less than this share starts from nothing.
HALF = 0.5
#: What a checkpoint holds that training can continue from.
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


class RequireFit(Hook):
    """Refuse a checkpoint of another model, of which mmengine would load what happens to fit.

    Args:
        split: Whose data set names the classes: 'train' or 'test'.
        least: Share of the model's entries that must be in the checkpoint; with less than all,
            a line says how many are, and other classes are only said.
        resume: The optimizer's state must fit as well, and a line says what stays of it.
    """

    def __init__(self, split: str, least: float = 1.0, resume: bool = False) -> None:
        self.split = split
        self.least = least
        self.resume = resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names, shapes and classes before anything is loaded.

        Raises:
            UserError: Too few entries fit, one is NaN or infinite, or the run was another one.
        """
        model = getattr(runner.model, 'module', runner.model)
        path = str(runner.cfg.load_from)
        meta = checkpoint.get('meta')
        if isinstance(meta, dict):
            meta.pop('config', None)  # mmengine would run this text; what it stores itself is 'cfg'
        lines: list[str | None] = [require_fit(model, checkpoint, path, self.least)]
        dataset = getattr(runner, f'{self.split}_dataloader').dataset
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if self.least < 1:
            difference = classes_difference(checkpoint, classes, path)
            lines.append(difference and f'warning: {difference}.')
        else:
            require_classes(checkpoint, classes, path)
            lines.clear()
        if self.resume:
            require_optimizer(checkpoint, runner.optim_wrapper, runner.cfg, path)
            lines.append(resume_note(checkpoint, runner.cfg))
        if is_main_process():
            for line in filter(None, lines):
                print(line, flush=True)


def require_fit(model: nn.Module, checkpoint: dict[str, Any], path: str, least: float = 1.0) -> str:
    """Compare the names and shapes of a checkpoint of a run with those of `model`.

    Counters of batches, which no inference uses, are left out. Returns a line that says how many
    entries fit.

    Raises:
        UserError: Less than `least` of the model's entries are in the checkpoint, or one of its
            entries, or of its optimizer's, is NaN or infinite.
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
        shape = getattr(given.get(unfit[0]), 'shape', None)
        found = 'is missing' if shape is None else f'has shape {tuple(shape)} in it'
        raise UserError(
            f'{path} does not fit the config: {matched} of the {len(own)} entries of the model '
            f'match, {unfit[0]} {tuple(own[unfit[0]])} is the first that does not and {found}'
            f'{_remedy(model, own, state, path)}'
        )
    require_finite(checkpoint, path)
    left = (
        f'; left out, as they differ: {some(sorted({key.rpartition(".")[0] for key in unfit}), 6)}'
        if unfit
        else ''
    )
    return f'Loading {matched} of the {len(own)} entries of the model from {path}{left}.'


def _remedy(model: nn.Module, own: Mapping[str, Any], state: Mapping[str, Any], path: str) -> str:
    """Where in the checkpoint the model's entries are, or its backbone's, and how to use them."""
    given = {key.removeprefix('module.'): value for key, value in _flat(state)}
    backbone = [key.removeprefix('backbone.') for key in own if key.startswith('backbone.')]
    for part, names in (('model', [*own]), ('backbone', backbone)):
        for prefix in dict.fromkeys(key.removesuffix(name) for name in names for key in given
                                    if key.endswith(name)):  # fmt: skip
            if sum(prefix + name in given for name in names) <= len(names) / 2:
                continue
            if part == 'model' and prefix:
                return f'; the model is in it under {prefix!r}: save it again without this prefix.'
            if part == 'backbone' and prefix != 'backbone.':
                where = f'under {prefix!r}' if prefix else 'alone'
                return (
                    f'; the backbone is in it {where}: load it there, --cfg-options '
                    f"\"model.backbone.init_cfg=dict(type='Pretrained', checkpoint='{path}')\""
                )
    shapes = {
        key.removeprefix('backbone.'): value.shape
        for key, value in given.items()
        if key.startswith('backbone.') and isinstance(value, Tensor)
    }
    network = next((module for module in model.modules() if isinstance(module, Network)), None)
    fit = find_fit(shapes, like=network) if network else None
    if fit is not None and fit.plan is not None:
        return (
            f'; its backbone is fused with plan {fit.plan!r}, for predictions alone: give the '
            'checkpoint that it was made from, or use the config beside it.'
        )
    return (
        '; use the config that the checkpoint was trained with, which is beside it in the work dir.'
    )


def _flat(state: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


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

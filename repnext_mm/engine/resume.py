"""Continuing a run: which checkpoint, whether it fits, and without repeating work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..checkpoints import CheckpointError, File, RunCheckpoint, read_checkpoint
from ..checkpoints.matching import THRESHOLD
from ..checkpoints.reading import check_crc
from .errors import UserError

LATEST = 'latest'
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
    """Refuse a checkpoint of another model, of which mmengine would load what happens to fit."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes before anything is loaded.

        Raises:
            UserError: Less than 99 % of the model's entries are in the checkpoint.
        """
        model = getattr(runner.model, 'module', runner.model)
        require_fit(model, checkpoint, str(runner.cfg.load_from))


def require_fit(
    model: nn.Module, checkpoint: dict[str, Any], path: str, share: float = THRESHOLD
) -> None:
    """Compare the names and shapes of a checkpoint of a run with those of `model`.

    Raises:
        UserError: Less than `share` of the model's entries are in the checkpoint.
    """
    own = {key: value.shape for key, value in model.state_dict().items()}
    given = {
        key.removeprefix('module.'): getattr(value, 'shape', None)
        for key, value in checkpoint.get('state_dict', checkpoint).items()
    }
    matched = sum(given.get(key) == shape for key, shape in own.items())
    if matched < share * len(own):
        unfit = next(key for key, shape in own.items() if given.get(key) != shape)
        raise UserError(
            f'{path} does not fit the config: {matched} of the {len(own)} '
            f'entries of the model match, {unfit} is the first that does not; use the config '
            'that the checkpoint was trained with, which is beside it in the work dir.'
        )


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

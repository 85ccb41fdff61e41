"""A trained detector or segmentor with its backbone fused, as a checkpoint and a config of mm."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from ..classification.tested import is_classifier
from ..network import Plan, check_plan
from ..reparam import reparameterize
from ..runtimes import METADATA_KEY
from ..version import __version__
from .errors import ModelError, UsageError
from .folders import disk_errors, make_folder, partial_folder, place
from .source import Source, backbone_configs, load_source


def save_whole_model(
    config: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    plan: Plan = 'full',
    *,
    force: bool = False,
) -> tuple[Path, Path]:
    """Load the model of a training, fuse and save it; see `save_fused`."""
    check_plan(plan)
    source = load_source(str(config), str(checkpoint), scope='model')
    return save_fused(source, out_dir, plan, force=force)


def save_fused(
    source: Source, out_dir: str | Path, plan: str = 'full', *, force: bool = False
) -> tuple[Path, Path]:
    """Fuse the backbone inside a trained model and save all of it, with the config that loads it.

    The derived config is complete in one file, and differs from the given one in the backbone's
    `deploy` and in naming no weights to start from. With it, mm's own tools read the checkpoint
    as any other.

    Args:
        source: A complete model, see `load_source`.
        out_dir: Where `<config>_<plan>.pth` and `<config>_<plan>.py` are written, completely or
            not at all.
        plan: 'upstream', 'full', or 'single' with what is inexact in it.
        force: Replace files that are there.

    Returns:
        Paths of the checkpoint and of the config.

    Raises:
        ModelError: The model is fused already, or has none of this package's backbones.
        UsageError: The files are there already, or the folder cannot be written.
    """
    chosen = check_plan(plan)
    out_dir = Path(out_dir)
    stem = f'{source.name}_{plan}'
    targets = out_dir / f'{stem}.pth', out_dir / f'{stem}.py'
    if not force and (there := [path for path in targets if path.exists()]):
        raise UsageError(f'{there[0]} exists already; add --force to replace it.')
    fused = _fuse(source, chosen)
    derived = derived_config(source.cfg, chosen)
    assert source.checkpoint is not None, 'a complete model has one'
    metadata = {
        'version': __version__,
        'scope': 'model',
        'plan': plan,
        'dtype': 'fp32',
        'weights': 'checkpoint',
        'checkpoint_sha256': source.checkpoint_sha256,
    }
    meta = {'cfg': derived.pretty_text, METADATA_KEY: json.dumps(metadata)}
    if source.classes:
        meta['dataset_meta'] = {'classes': source.classes}
    make_folder(out_dir)
    with disk_errors(out_dir), partial_folder(out_dir) as partial:
        torch.save({'meta': meta, 'state_dict': fused.state_dict()}, partial / targets[0].name)
        derived.dump(partial / targets[1].name)
        for target in targets:
            place(partial / target.name, target)
    return targets


def derived_config(cfg: Config, plan: Plan) -> Config:
    """The config of the fused model: each backbone in its fused form, and no weights to start from.

    Raises:
        ModelError: It builds none of this package's backbones.
    """
    derived = copy.deepcopy(cfg)
    if is_classifier(cfg):  # its network takes the argument that backbones take
        derived.model.update(teacher=None, pretrained=False)
    backbones = [derived.model] if is_classifier(cfg) else list(backbone_configs(derived.model))
    if not backbones:
        raise ModelError(
            f'the model {derived.model.get("type")} has no backbone of this package to fuse.'
        )
    for backbone in backbones:
        backbone.deploy = True if plan == 'full' else plan
        backbone.init_cfg = None
    if 'pretrained' in derived.model:
        derived.model.pretrained = None
    derived.load_from = None
    derived.resume = False
    for key in ('work_dir', 'launcher'):  # of this run
        derived.pop(key, None)
    return derived


def _fuse(source: Source, plan: Plan) -> nn.Module:
    if source.plan is not None:
        raise ModelError(
            f'{source.checkpoint} is already fused with plan {source.plan!r}; use it as it is, or '
            'give the checkpoint and the config of the training.'
        )
    try:
        # Whoever asks for a plan by its name has chosen it.
        return reparameterize(source.model, plan, accept_inexact=True)
    except (TypeError, ValueError) as error:
        raise ModelError(str(error)) from error

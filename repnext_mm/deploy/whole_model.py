"""A trained detector or segmentor with its backbone fused, as a checkpoint and a config of mm."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from torch import nn

from ..checkpoints import CheckpointError, RunCheckpoint, read_run
from ..engine.cli import import_framework
from ..engine.config_file import load_config
from ..engine.errors import UserError
from ..engine.preflight import check_config, require
from ..engine.preflight.model import check_model
from ..engine.resume import require_fit
from ..engine.stored import config_classes, require_classes
from ..measure.artifacts import SCHEDULE
from ..measure.rounds import CallRunner, Schedule, compare
from ..measure.tables import record
from ..network import Network, Plan, check_plan
from ..reparam import reparameterize
from ..reparam.verify import noise
from ..runtimes import METADATA_KEY
from ..version import __version__
from .errors import ModelError, UsageError
from .folders import disk_errors, make_folder, partial_folder, place


def save_whole_model(
    config: str | Path,
    checkpoint: str | Path,
    out_dir: str | Path,
    plan: Plan = 'full',
    *,
    force: bool = False,
) -> tuple[Path, Path]:
    """Fuse the backbone inside a trained model and save all of it, with the config that loads it.

    The derived config is complete in one file, and differs from the given one in the backbone's
    `deploy` and in naming no weights to start from. With it, mm's own tools read the checkpoint
    as any other.

    Args:
        config: Config of the training.
        checkpoint: Checkpoint of the training.
        out_dir: Where `<config>_<plan>.pth` and `<config>_<plan>.py` are written, completely or
            not at all.
        plan: 'upstream', 'full', or 'single' with what is inexact in it.
        force: Replace files that are there.

    Returns:
        Paths of the checkpoint and of the config.

    Raises:
        ModelError: The checkpoint does not fit the config or is fused already, or the model has
            none of this package's backbones.
        UsageError: The files are there already, or the folder cannot be written.
    """
    plan = check_plan(plan)
    out_dir = Path(out_dir)
    stem = f'{Path(config).stem}_{plan}'
    targets = out_dir / f'{stem}.pth', out_dir / f'{stem}.py'
    if not force and (there := [path for path in targets if path.exists()]):
        raise UsageError(f'{there[0]} exists already; add --force to replace it.')
    try:
        cfg = load_config(str(config), {}, None, 'none')
        model, trained = _load(cfg, str(checkpoint))
        fused = _fuse(model, plan, str(checkpoint))
    except (CheckpointError, UserError) as error:
        raise ModelError(str(error)) from error

    derived = derived_config(cfg, plan)
    meta = {
        key: value
        for key, value in trained.content.get('meta', {}).items()
        if key == 'dataset_meta'
    }
    metadata = {
        'version': __version__,
        'scope': 'model',
        'plan': plan,
        'dtype': 'fp32',
        'weights': 'checkpoint',
        'checkpoint_sha256': trained.sha256,
    }
    meta |= {'cfg': derived.pretty_text, METADATA_KEY: json.dumps(metadata)}
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
    backbones = list(_backbone_configs(derived.model))
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


def time_whole_model(
    trained: tuple[str | Path, str | Path],
    fused: tuple[str | Path, str | Path],
    size: tuple[int, int] = (512, 512),
    *,
    threads: int | None = None,
    schedule: Schedule = SCHEDULE,
) -> dict[str, Any]:
    """Time one prediction of a trained model and of its fused form, in PyTorch on the CPU.

    The image `(1, 3, *size)` is noise, and the same for both; preprocessing is left out.

    Args:
        trained: Config and checkpoint that `save_whole_model` was given.
        fused: Checkpoint and config that it returned.

    Returns:
        A comparison, times in ms, as `repnext_mm.measure.tables.show` prints it.
    """
    models = {
        'trained': _load(load_config(str(trained[0]), {}, None, 'none'), str(trained[1]))[0],
        'fused': _load(load_config(str(fused[1]), {}, None, 'none'), str(fused[0]))[0],
    }
    image = noise((1, 3, *size), seed=0)
    about = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)

    def predict(model: nn.Module) -> CallRunner:
        @torch.inference_mode()
        def run() -> Any:
            sample = BaseDataElement(metainfo={**about, 'scale_factor': (1.0, 1.0)})
            return model(image, [sample], mode='predict')

        return CallRunner(run)

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        runners = {name: predict(model) for name, model in models.items()}
        twins = {'trained': predict(copy.deepcopy(models['trained']))}
        return record(compare(runners, twins, schedule=schedule))
    finally:
        torch.set_num_threads(before)


def _load(cfg: Config, checkpoint: str) -> tuple[nn.Module, RunCheckpoint]:
    """The trained model in eval mode, and its checkpoint."""
    trained = read_run(checkpoint)
    import_framework(cfg.get('default_scope'))
    settings = copy.deepcopy(cfg.model)
    for backbone in _backbone_configs(settings):
        backbone.init_cfg = None
    if 'pretrained' in settings:
        settings.pretrained = None
    require(check_config(cfg))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = revert_sync_batchnorm(MODELS.build(settings))
    classes = config_classes(cfg)
    require_fit(model, trained.content, checkpoint)
    require_classes(trained.content, classes, checkpoint)
    require(check_model(model, classes))
    state = trained.content.get('state_dict', trained.content)
    model.load_state_dict({k.removeprefix('module.'): v for k, v in state.items()}, strict=False)
    return model.eval(), trained


def _fuse(model: nn.Module, plan: Plan, checkpoint: str) -> nn.Module:
    for backbone in model.modules():
        if isinstance(backbone, Network) and backbone.plan is not None:
            raise ModelError(
                f'{checkpoint} is already fused with plan {backbone.plan!r}; use it as it is, or '
                'give the checkpoint and the config of the training.'
            )
    try:
        # Whoever asks for a plan by its name has chosen it.
        return reparameterize(model, plan, accept_inexact=True)
    except (TypeError, ValueError) as error:
        raise ModelError(str(error)) from error


def _backbone_configs(node: Any) -> Iterator[Any]:
    """Every part of a model's config that builds one of this package's backbones."""
    if isinstance(node, dict):
        kind = node.get('type')
        family = MODELS.get(kind) if isinstance(kind, str) else kind
        if isinstance(family, type) and issubclass(family, Network):
            yield node
        for value in node.values():
            yield from _backbone_configs(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _backbone_configs(value)

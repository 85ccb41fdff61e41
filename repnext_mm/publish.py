"""What `repnext-mm publish` does: the weights of a run as a file for others, with a model card."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from .checkpoints import CheckpointError, fetch, read_weights
from .checkpoints.reading import Weights
from .classification.tested import is_classifier, tested_size, tested_transform
from .engine.config_file import load_config
from .engine.errors import UserError, run_tool
from .engine.finite import first_non_finite
from .files import replacing, write_text
from .network import Network, networks_in
from .program import program
from .reparam import reparameterize
from .runtimes import METADATA_KEY
from .version import __version__

#: Digits of the SHA-256 in a file's name, as torch.hub reads them.
DIGITS = 8
CARD = 'README.md'
#: Figures of an evaluation that a card shows.
SHOWN = re.compile(r'^(accuracy/|coco/\w+_mAP|m?[aA]cc$|mIoU|aAcc|mAcc)')


@dataclass
class Publication:
    """What is published.

    Args:
        name: Of the file, without the digits and the suffix.
        cfg: The config of the run.
        weights: As they were read.
        model: The network of a classifier, or the complete model, in eval mode.
        state: Its tensors.
        figures: Of the run's evaluation at that checkpoint.
        fused: Whether norms and branches are folded.
    """

    name: str
    cfg: Config
    weights: Weights
    model: nn.Module
    state: dict[str, Tensor]
    figures: dict[str, float]
    fused: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm publish`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('publish'),
        description='Write the weights of a run as safetensors, without optimizer and teacher, '
        'with SHA-256 in the name and a model card.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('checkpoint', help='checkpoint file of a training run')
    parser.add_argument('config', nargs='?', help='its config (None: the one beside it)')
    parser.add_argument('--fused', action='store_true', help='fold norms and branches first')
    parser.add_argument(
        '--container',
        help='key of the weights in the checkpoint, such as ema_state_dict (None: the first there '
        'is)',
    )
    parser.add_argument('--work-dir', help='output folder (None: published)')
    parser.add_argument(
        '--push',
        metavar='OWNER/NAME',
        help='also upload a classifier to the Hugging Face hub, for timm.create_model',
    )
    args = parser.parse_args(argv)
    return run_tool(lambda: _publish(args))


def _publish(args: argparse.Namespace) -> None:
    if args.push and args.fused:
        raise UserError('--push uploads what timm builds by name, which is not fused; leave one.')
    if args.push and not re.fullmatch(r'[\w.-]+/[\w.-]+', args.push):
        raise UserError(f'--push {args.push} must be OWNER/NAME of a repository.')
    publication = gather(args.checkpoint, args.config, args.container, args.fused)
    if args.push and not is_classifier(publication.cfg):
        raise UserError('--push is for classifiers, which timm builds by their names.')
    path = write(publication, Path(args.work_dir or 'published'))
    print(f'Wrote {path} and {path.with_name(CARD)} (from {publication.weights}).', flush=True)
    if args.push:
        print(f'Uploaded {push(publication, args.push)}.', flush=True)


def gather(
    checkpoint: str, config: str | None = None, container: str | None = None, fused: bool = False
) -> Publication:
    """Read a checkpoint and build its model.

    Raises:
        UserError: The checkpoint or its config cannot be read, or do not fit each other.
    """
    try:
        file = fetch(checkpoint)
        weights = read_weights(file, container=container)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    cfg = load_config(config or str(_config_beside(file.path)), {}, None, 'none')
    model, state = _model(cfg, weights)
    if bad := first_non_finite(state):
        raise UserError(f'{checkpoint} has NaN or infinity in {bad}; give an earlier checkpoint.')
    if fused:
        networks_in(model, Network, 'fuse')
        model = reparameterize(model)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
    name = str(cfg.model.network if is_classifier(cfg) else Path(str(cfg.filename)).stem)
    name = f'{name}_fused' if fused else name
    return Publication(name, cfg, weights, model, state, _figures(file.path, weights), fused)


def _config_beside(checkpoint: Path) -> Path:
    found = sorted(checkpoint.parent.glob('*.py'))
    if len(found) != 1:
        what = f'{len(found)} configs' if found else 'no config'
        raise UserError(f'there is {what} beside {checkpoint}; name it after the checkpoint.')
    return found[0]


def _model(cfg: Config, weights: Weights) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network or model of a config with the weights, and its tensors.

    Raises:
        UserError: They do not fit.
    """
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope

    from .engine.frameworks import import_framework
    from .engine.resume import require_fit

    classifies = is_classifier(cfg)
    settings = cfg.model.copy()
    if classifies:
        settings.update(teacher=None, pretrained=False)
    import_framework(cfg.get('default_scope'))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
        model = revert_sync_batchnorm(MODELS.build(settings)).eval()
    tensors = {re.sub(r'^(module\.)+', '', k): v for k, v in weights.tensors.items()}
    if classifies and not any(key.startswith('network.') for key in tensors):
        tensors = {f'network.{key}': value for key, value in tensors.items()}
    require_fit(model, {'state_dict': tensors}, weights.label)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)
    model = model.network if classifies else model
    return model, {key: value.contiguous() for key, value in model.state_dict().items()}


def _figures(checkpoint: Path, weights: Weights) -> dict[str, float]:
    """What the run measured at a checkpoint, from the log beside it."""
    from .visualization import read_scalars

    number = weights.meta.get('epoch'), weights.meta.get('iter')
    try:
        records = [record for _, record in read_scalars(checkpoint.parent).val]
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = next((r for r in records[::-1] if r.get('step') in number), {})
    return {k: float(v) for k, v in found.items() if SHOWN.match(k)}


# --- files


def write(publication: Publication, folder: Path) -> Path:
    """Write weights and card into a folder of their own below `folder`; returns the weights.

    Raises:
        UserError: The folder holds another publication of this name and these weights.
    """
    from safetensors.torch import save

    data = save(publication.state, metadata=metadata(publication))
    digest = hashlib.sha256(data).hexdigest()
    name = f'{publication.name}-{digest[:DIGITS]}'
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    path = target / f'{name}.safetensors'
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise UserError(f'{path} exists with other content; move it away, or give --work-dir.')
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)
    write_text(target / CARD, card(publication, path.name, digest))
    return path


def metadata(publication: Publication) -> dict[str, str]:
    """What stands in the header of the file."""
    network = next((m for m in publication.model.modules() if isinstance(m, Network)), None)
    content = {
        'name': publication.name,
        'version': __version__,
        'network': network.describe() if network else type(publication.model).__name__,
        'plan': (network.plan if network else None) or 'training form',
        'container': publication.weights.container,
        'checkpoint_sha256': publication.weights.sha256,
        'classes': _classes(publication),
        'figures': publication.figures,
    }
    # One entry: safetensors writes several in any order, and a file's digest should not change.
    return {METADATA_KEY: json.dumps(content)}


def _classes(publication: Publication) -> list[str]:
    from .engine.stored import checkpoints_classes

    return [*(checkpoints_classes({'meta': publication.weights.meta}) or ())]


def card(publication: Publication, filename: str, digest: str) -> str:
    """The model card: what it is, how to load it, what the run measured, where it is from."""
    cfg, model = publication.cfg, publication.model
    count = sum(p.numel() for p in model.parameters())
    tags = 'image-classification' if is_classifier(cfg) else 'image-feature-extraction'
    lines = ['---', f'tags: [{tags}, repnext_mm]', 'library_name: timm', '---', '']
    lines += [f'# {publication.name}', '', f'{count / 1e6:.2f} M parameters.', '']
    lines += ['## Load', '', '```python', *_loading(publication, filename), '```', '']
    lines += ['## Figures of the run', '']
    if publication.figures:
        lines += ['| metric | value |', '|---|---:|']
        lines += [f'| {key} | {value:.4g} |' for key, value in publication.figures.items()]
    else:
        lines += ['None: the log of the run is not beside its checkpoint.']
    classes = _classes(publication)
    if classes:
        lines += ['', f'{len(classes)} classes: {", ".join(classes[:20])}'
                  + (', ...' if len(classes) > 20 else '') + '.']  # fmt: skip
    lines += ['', '## Origin', '']
    lines += [
        f'- Config `{Path(str(cfg.filename)).name}`, repnext_mm {__version__}, '
        f'torch {torch.__version__}.',
        f'- Weights under `{publication.weights.container or "no key"}` of a checkpoint with '
        f'SHA-256 `{publication.weights.sha256}`.',
        f'- This file has SHA-256 `{digest}`.',
    ]
    return '\n'.join(lines) + '\n'


def _loading(publication: Publication, filename: str) -> list[str]:
    if not is_classifier(publication.cfg):
        return [f"load_from = '{filename}'  # in the config {publication.name}.py"]
    cfg, count = publication.cfg, publication.model.num_classes
    network = next((m for m in publication.model.modules() if isinstance(m, Network)), None)
    lines = ['import timm', 'import repnext_mm.timm', '']
    deploy = f", deploy='{network.plan}'" if publication.fused and network else ''
    create = f"model = timm.create_model('{cfg.model.network}', num_classes={count}{deploy}"
    if publication.fused:
        return [
            *lines[:2],
            'from repnext_mm.checkpoints import load_pretrained',
            '',
            f'{create}).eval()',
            f"load_pretrained(model, '{filename}')",
        ]
    return [*lines, f"{create}, checkpoint_path='{filename}').eval()"]


# --- the hub


def push(publication: Publication, repository: str) -> str:
    """Upload a classifier so that `timm.create_model('hf-hub:OWNER/NAME')` builds it.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    from timm.models import push_to_hf_hub

    transform = tested_transform(publication.cfg)
    known = ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    settings = {key: transform[key] for key in known if key in transform}
    settings['input_size'] = (3, *tested_size(publication.cfg))
    names: Mapping[str, Any] = {'label_names': _classes(publication)}
    details = {key: f'{value:.4g}' for key, value in publication.figures.items()}
    try:
        done = push_to_hf_hub(
            publication.model,
            repository,
            commit_message=f'Add {publication.name}',
            model_config=dict(names) if names['label_names'] else None,
            model_card={
                'license': 'apache-2.0',
                'description': f'{publication.name}, trained with repnext_mm {__version__}. '
                '`import repnext_mm.timm` before `timm.create_model`.',
                'details': details,
            },
            safe_serialization=True,
            data_config=settings,
        )
    except Exception as error:  # of the hub's client, which has many
        text = ' '.join(str(error).split())[:300]
        where = os.environ.get('HF_ENDPOINT', 'the hub')
        raise UserError(
            f'{where} did not take {repository} ({type(error).__name__}: {text}); log in with '
            '`hf auth login`, or set HF_TOKEN.'
        ) from error
    return str(done)

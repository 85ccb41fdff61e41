"""What is written beside a complete model for those who use it: model.json and predict.py."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..classification.tested import UnknownTransform, is_classifier, tested_steps
from ..files import write_text
from ..runtimes import predictor
from ..visualization.colors import apart
from .calibration import innermost, tested_on
from .report import ArtifactRecord
from .source import Source
from .targets import Preprocess, Target

MODEL_JSON, PREDICT = 'model.json', 'predict.py'
#: Steps of a test pipeline that change no pixel.
WITHOUT_EFFECT = ('Load', 'Pack', 'Collect', 'ImageToTensor')


class Unshippable(ValueError):
    """A test pipeline that the predictor does not know; the message says which step."""


def pipeline_steps(cfg: Any) -> list[dict[str, Any]]:
    """What the test pipeline of a config does to an image, for the predictor.

    Raises:
        Unshippable: It has a step that the predictor does not know.
    """
    if is_classifier(cfg):
        try:
            return tested_steps(cfg)
        except UnknownTransform as error:
            raise Unshippable(str(error)) from error
    loader = tested_on(cfg)
    steps = []
    for step in (innermost(loader['dataset']).get('pipeline') or ()) if loader else ():
        name = step['type'] if isinstance(step['type'], str) else step['type'].__name__
        name = name.rpartition('.')[2]
        if name.startswith(WITHOUT_EFFECT) or (name == 'RandomFlip' and not step.get('prob')):
            continue
        if name == 'Resize' and step.get('interpolation', 'bilinear') == 'bilinear':
            steps.append({'resize': _resize(step)})
        elif name == 'ResizeToMultiple':
            steps.append({'resize': {'multiple': int(step.get('size_divisor', 32))}})
        elif name == 'Pad' and step.get('padding_mode', 'constant') == 'constant':
            steps.append({'pad': _pad(step)})
        else:
            raise Unshippable(f'the test pipeline has {name}, which the predictor does not know')
    return steps


def _resize(step: Mapping[str, Any]) -> dict[str, Any]:
    keep = bool(step.get('keep_ratio', False))
    if (scale := step.get('scale')) is not None:
        scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        return {'scale': [int(side) for side in scale], 'keep_ratio': keep}
    factor = step.get('scale_factor')
    if not isinstance(factor, int | float):
        raise Unshippable(f'Resize of the test pipeline has scale_factor={factor!r}')
    return {'factor': float(factor), 'keep_ratio': keep}


def _pad(step: Mapping[str, Any]) -> dict[str, Any]:
    value = step.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    value = list(value) if isinstance(value, list | tuple) else value
    if step.get('pad_to_square'):
        return {'square': True, 'value': value}
    if step.get('size'):
        return {'size': [int(side) for side in step['size']], 'value': value}
    return {'divisor': int(step['size_divisor']), 'value': value}


def settings_of(source: Source, target: Target, divisor: int) -> dict[str, Any]:
    """The content of model.json but for its files.

    Args:
        source: The model.
        target: What of it is exported.
        divisor: What the network requires height and width to be divisible by.

    Raises:
        Unshippable: See `pipeline_steps`.
    """
    given = source.preprocessor or {}
    if target.task == 'segmentation' and any(
        (given.get('test_cfg') or {}).get(key) for key in ('size', 'size_divisor')
    ):
        raise Unshippable('data_preprocessor.test_cfg pads images, which the predictor does not do')
    described = target.description()
    classes = source.classes or tuple(f'class {i}' for i in range(described['num_classes']))
    normalize = Preprocess.of(given) if target.preprocess is None else None
    return {
        'schema': predictor.SCHEMA,
        'name': source.name,
        'task': target.task,
        'classes': list(classes),
        'palette': palette(source.cfg, len(classes)),
        'steps': pipeline_steps(source.cfg),
        'divisor': math.lcm(divisor, int(given.get('pad_size_divisor') or 1)),
        'pad_value': float(given.get('pad_value') or 0) if target.preprocess is None else 0,
        'normalize': None
        if normalize is None
        else {'mean': normalize.mean, 'std': normalize.std, 'swap': normalize.swap},
        'checkpoint_sha256': source.checkpoint_sha256,
        **described,
    }


def palette(cfg: Any, count: int) -> list[list[int]]:
    """A color `[r, g, b]` for each class: the data set's own, or well apart."""
    from ..engine.stored import registered  # and with it mmengine's runner

    loader = tested_on(cfg)
    own = registered(innermost(loader['dataset']), cfg.get('default_scope')) if loader else None
    colors = getattr(own, 'METAINFO', {}).get('palette')
    if isinstance(colors, list | tuple) and len(colors) >= count:
        return [[int(value) for value in color] for color in colors[:count]]
    return apart(count)


def ship(folder: Path, settings: Mapping[str, Any], artifacts: list[ArtifactRecord]) -> None:
    """Write model.json, with every file of the folder that can be run, and predict.py."""
    files = [
        {
            'path': record.path,
            'format': record.format,
            'sha256': record.sha256,
            'dtype': record.dtype,
            'size': record.size,
            'batch': record.batch,
            'dynamic': record.dynamic,
            'inputs': record.inputs,
            'outputs': record.outputs,
        }
        for record in artifacts
        # The folder of a page describes itself.
        if record.status in ('ok', 'unverified') and record.format != 'web'
    ]
    if not files:
        return
    text = json.dumps({**settings, 'files': files}, indent=1)
    write_text(folder / MODEL_JSON, text + '\n')
    shutil.copyfile(predictor.__file__, folder / PREDICT)

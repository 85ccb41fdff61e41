"""Compare the Core ML packages of a folder with its golden_*.npz; needs macOS and coremltools.

python verify_on_mac.py [FOLDER]
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
from PIL import Image

Arrays = dict[str, Any]
Rows = Iterator[tuple[str, Any, str]]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
folder = folder if folder.is_dir() else folder.parent
sys.path.insert(0, str(folder))  # predict.py, of complete models


def features(outputs: Arrays, golden: Arrays, exact: bool) -> Rows:
    """Each feature map by its largest error and its signal-to-noise ratio."""
    for name, want in golden.items():
        error = outputs[name].astype(np.float64) - want
        relative = np.abs(error).max() / want.std()
        sqnr = 10 * np.log10((want**2).sum() / max((error**2).sum(), 1e-30))
        good = relative <= 1e-4 if exact else sqnr >= 35
        yield name, good, f'{relative:.1e}, {sqnr:.0f} dB'


def classes(outputs: Arrays, golden: Arrays, exact: bool) -> Rows:
    """The share of pixels of another class."""
    other = np.mean(outputs['classes'].reshape(golden['classes'].shape) != golden['classes'])
    yield 'classes', other <= (1e-4 if exact else 0.02), f'{other:.1e} of the pixels differ'


def detections(outputs: Arrays, golden: Arrays, exact: bool, meta: Any, size: Any) -> Rows:
    """The share of the detections of the first image that are found again, by score."""
    finish = importlib.import_module('predict').finish
    found = finish({k: v[0] for k, v in outputs.items()}, meta, size, size, (1.0, 1.0))
    count = golden['counts'][0]
    wanted = [golden[key][:count] for key in ('boxes', 'scores', 'labels')]
    lost = 0.0
    for box, score, label in zip(*wanted):
        own = found['boxes'][found['labels'] == label]
        near = len(own) and np.abs(own - box).max(1).min() <= (0.05 if exact else 4)
        lost += 0 if near else score
    share = 1 - lost / max(wanted[1].sum(), 1e-9)
    yield 'detections', share >= (1.0 if exact else 0.9), f'{share:.1%} found again'


def labels(outputs: Arrays, golden: Arrays, exact: bool) -> Rows:
    """The probability of each class of the first image, and which is the best."""
    found = next(value for value in outputs.values() if isinstance(value, dict))
    logits = golden['logits'][0].astype(np.float64)
    powers = np.exp(logits - logits.max())
    names = json.loads((folder / 'model.json').read_text())['classes']
    seen: dict[str, int] = {}
    worst = 0.0
    for name, want in zip(names, powers / powers.sum()):
        seen[name] = seen.get(name, 0) + 1
        own = found[name if seen[name] == 1 else f'{name} ({seen[name]})']
        worst = max(worst, abs(float(own) - want))
    yield 'probabilities', worst <= (1e-4 if exact else 0.02), f'{worst:.1e} at most'


def latency(model: Any, given: Arrays) -> str:
    """As the papers report it: mean and deviation of 20 sets, here of 10 predictions each."""
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    benchmark = MLModelBenchmarker(model)
    sets = []
    for _ in range(20):
        measured = asyncio.run(benchmark.benchmark_predict(inputs=given, iterations=10))
        sets.append(measured.statistics.average)
    return f'{np.mean(sets):.2f} ms, deviation {np.std(sets):.2f} of 20 sets'


passed = True
for path in sorted(folder.glob('*.mlpackage')):
    model = coremltools.models.MLModel(str(path))
    meta = json.loads(model.user_defined_metadata['repnext_mm'])
    golden = dict(np.load(path.with_name(meta['golden'])))
    inputs = {name: golden[name] for name in meta.get('inputs', ['image'])}
    described = {given.name: given.type for given in model.get_spec().description.input}
    given = {name: value.astype(np.float32) for name, value in inputs.items()}
    if described['image'].WhichOneof('Type') == 'imageType':
        pixels = golden['image'][0, ::-1].transpose(1, 2, 0).astype(np.uint8)  # red first
        given['image'] = Image.fromarray(np.ascontiguousarray(pixels))
    outputs = model.predict(given)
    size = golden['image'].shape[2:]
    for name in ('image', 'image_size', 'out_size'):
        golden.pop(name, None)
    exact, task = meta['dtype'] == 'fp32', meta.get('task', 'backbone')
    if task == 'classification':
        rows = labels(outputs, golden, exact)
    elif task == 'backbone':
        rows = features(outputs, golden, exact)
    elif task == 'segmentation':
        rows = classes(outputs, golden, exact)
    else:
        rows = detections(outputs, golden, exact, meta, size)
    for name, good, text in rows:
        passed = passed and bool(good)
        print(f'{"ok" if good else "FAILED"}: {path.name} {name} {text}')
    try:
        print(f'   latency: {path.name} {latency(model, given)}')
    except (ImportError, AttributeError) as reason:  # coremltools before 8.3
        print(f'   latency: not measured, this coremltools has no benchmarker ({reason})')
sys.exit(0 if passed else 6)

"""Deterministic weights and inputs for the parity fixtures in this folder.

Every fixture holds, for one backbone variant, the reference implementation's
state-dict keys with their shapes, and values sampled from its four stage
outputs in eval mode, float32, for weights made by `formula_state_dict` and the
input made by `formula_image`. Both depend on nothing but names, shapes and
numpy's PCG64, so they are the same on every machine.
"""

import json
import zlib

import numpy as np
import torch


def formula_tensor(key, shape):
    """Weight for one state-dict entry (float32), made from its key and shape."""
    if key.endswith('num_batches_tracked'):
        return torch.zeros(shape, dtype=torch.long)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith('running_var'):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith('running_mean'):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1 and (
        key.endswith('channel_mixer.2.norm.weight')
        or ('rep_mixer' in key and key.endswith('norm.weight'))
    ):
        value = rng.uniform(0.05, 0.15, shape)  # keeps deep variants in range
    elif len(shape) == 1 and key.endswith('weight'):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32).reshape(shape))


def formula_state_dict(state_dict):
    """The same keys and shapes as `state_dict`, filled by the formula."""
    return {k: formula_tensor(k, tuple(v.shape)) for k, v in state_dict.items()}


def formula_image(height, width):
    """Input image batch of shape (1, 3, height, width), float32."""
    x = np.random.default_rng(2024).standard_normal((1, 3, height, width))
    return torch.from_numpy(x.astype(np.float32))


def sample(tensor, count=16):
    """Flat indices and values of `count` entries of `tensor`."""
    flat = tensor.detach().double().flatten()
    index = np.random.default_rng(7).integers(0, flat.numel(), count)
    return [int(i) for i in index], [float(flat[i]) for i in index]


def describe(outputs):
    """JSON-ready description of a tuple of stage outputs."""
    rows = []
    for out in outputs:
        index, value = sample(out)
        rows.append(
            dict(
                shape=list(out.shape),
                mean=float(out.double().mean()),
                std=float(out.double().std()),
                index=index,
                value=value,
            )
        )
    return rows


def load(path):
    with open(path) as f:
        return json.load(f)

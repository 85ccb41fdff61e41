"""Mixed precision: real training on a CPU, gradients close to float32's, wrong settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tool_runs
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS
from networks import TINY, grads, image, tiny
from tool_runs import CONFIGS, options
from torch import nn

from repnext_mm.engine import UserError
from repnext_mm.engine.amp import (
    AMP_DTYPES,
    PortableAmpOptimWrapper,
    enable_amp,
    fit_amp_to_cpu,
    keep_float32_where_needed,
    uses_amp,
)
from repnext_mm.engine.cli import train_main

NETWORKS = pytest.mark.parametrize('name', TINY)
DTYPES = pytest.mark.parametrize('dtype', AMP_DTYPES)


def config(**optim_wrapper: object) -> Config:
    optimizer = dict(type='AdamW', lr=1e-3)
    return Config(dict(optim_wrapper=dict(optimizer=optimizer, **optim_wrapper)))


def wrapper(model: nn.Module, **settings: object) -> PortableAmpOptimWrapper:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = dict(type='PortableAmpOptimWrapper', optimizer=optimizer) | settings
    return OPTIM_WRAPPERS.build(settings)


# --- networks


@NETWORKS
@DTYPES
def test_gradients_are_close_to_those_of_float32(name: str, dtype: str) -> None:
    """Statistics are frozen: those of the few values in the last stage amplify every rounding."""
    model = tiny(name, norm_eval=True)
    x = image(model)
    expected = grads(model, x)
    model.zero_grad()
    with torch.autocast('cpu', getattr(torch, dtype)):
        outs = [o.float().flatten() for o in model(x)]
    torch.stack([(o * torch.linspace(-1, 1, len(o))).sum() for o in outs]).sum().backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    together = [torch.cat([g[k].flatten() for k in expected]) for g in (actual, expected)]
    assert all(g.isfinite().all() for g in together)
    error = (together[0] - together[1]).norm() / together[1].norm()
    assert error < (0.02 if dtype == 'float16' else 0.1)


@NETWORKS
@DTYPES
def test_every_family_trains(name: str, dtype: str) -> None:
    """Two steps on one batch: losses stay finite and fall, no step is left out."""
    model = tiny(name)
    optim = wrapper(model, dtype=dtype, loss_scale=1024.0)
    x = image(model)
    losses = []
    for _ in range(2):
        with optim.optim_context(model):
            outs = model(x)
            assert all(o.dtype in (torch.float32, getattr(torch, dtype)) for o in outs)
            loss = sum((o.float() - 1).square().mean() for o in outs)
        before = next(model.parameters()).detach().clone()
        optim.update_params(loss)
        assert not torch.equal(before, next(model.parameters()))
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# --- the wrapper


def test_steps_that_overflow_are_left_out_and_the_scale_adapts() -> None:
    model = nn.Linear(2, 1)
    optim = wrapper(model, dtype='float16')
    before = model.weight.detach().clone()
    scale = optim.loss_scaler.get_scale()
    with optim.optim_context(model):
        out = model(torch.full((1, 2), 6e4))
        assert out.dtype == torch.float16
    optim.update_params(out.float().sum() * float('inf'))
    assert torch.equal(model.weight, before)
    assert optim.loss_scaler.get_scale() < scale

    again = wrapper(model, dtype='float16')
    again.load_state_dict(optim.state_dict())
    assert again.loss_scaler.get_scale() == optim.loss_scaler.get_scale()
    fixed = wrapper(model, dtype='float16', loss_scale=8.0)
    with fixed.optim_context(model):
        loss = model(torch.ones(1, 2)).float().sum()
    fixed.update_params(loss)
    assert fixed.loss_scaler.get_scale() == 8
    assert not torch.equal(model.weight, before)


def test_dtype_comes_from_the_command_line_then_the_config() -> None:
    for given, own, expected in [
        (None, {}, 'bfloat16'),
        (None, dict(dtype='float16'), 'float16'),
        ('bfloat16', dict(type='AmpOptimWrapper', dtype='float16'), 'bfloat16'),
    ]:
        cfg = config(**own)
        enable_amp(cfg, given)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.dtype == expected
        assert (cfg.optim_wrapper.loss_scale == 'dynamic') == (expected == 'float16')
        assert uses_amp(cfg)
    assert not uses_amp(config())
    with pytest.raises(UserError, match=r"dtype='float32' is not one of bfloat16, float16"):
        enable_amp(config(dtype='float32'), None)
    with pytest.raises(UserError, match='not with ApexOptimWrapper'):
        enable_amp(config(type='ApexOptimWrapper'), None)
    with pytest.raises(ValueError, match=r"dtype='int8' is not one of"):
        wrapper(nn.Linear(1, 1), dtype='int8')


def test_a_cpu_takes_over_what_mmengine_keeps_for_gpus() -> None:
    plain = config()
    assert fit_amp_to_cpu(plain.optim_wrapper) is None
    assert plain.to_dict() == config().to_dict()
    cfg = config(type='AmpOptimWrapper', use_fsdp=False, loss_scale='dynamic')
    assert fit_amp_to_cpu(cfg.optim_wrapper) == 'mixed precision in bfloat16'
    assert uses_amp(cfg)
    model = nn.Linear(1, 1)
    optim = wrapper(model, **{k: v for k, v in cfg.optim_wrapper.items() if k != 'optimizer'})
    with optim.optim_context(model):
        assert model(torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.compat
def test_roi_align_follows_autocast_and_leaves_validation_alone() -> None:
    ops = pytest.importorskip('mmcv.ops', reason='RoIAlign is one of the compiled ops of mmcv')
    model = nn.Sequential(ops.RoIAlign(2))
    keep_float32_where_needed(model)
    args = torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    assert model[0](*args).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cpu', dtype):
            out = model[0](args[0].to(dtype), args[1])
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), model[0](*args), rtol=0.02, atol=0.02)


# --- the tool


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here, so not on a CPU')
def test_a_detector_trains_in_float16_through_the_tool(tmp_path: Path) -> None:
    """With attention inside; whole runs in bfloat16 are in test_tools.py."""
    settings = [
        'model.backbone.type=RecNeXt',
        'model.backbone.arch=a0',
        'train_cfg.max_epochs=1',
        'param_scheduler.1.end=1',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
    ]
    data = tool_runs.tiny_shapes(tmp_path / 'data', train=6)
    arguments = (CONFIGS['det'], '--amp', 'float16', *options('det', data, *settings))
    output = tool_runs.succeed_here(train_main, *arguments, cwd=tmp_path)
    assert 'mixed precision in float16' in output
    (scalars,) = tmp_path.rglob('scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses = [record['loss'] for record in records if 'loss' in record]
    assert len(losses) >= 3
    assert all(map(math.isfinite, losses))
    assert any('coco/bbox_mAP' in record for record in records)

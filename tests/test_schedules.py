"""The configs' schedules over the whole run, against the learning rates of published runs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATA, REPO
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

# The published logs keep five decimals of the learning rate. A value there of 2e-5 stands for all
# of 1.5e-5 to 2.5e-5, and one below 5e-6 stands as 0, so no relative bound is meaningful on raw
# values: ours are rounded the same way first. At each change of the fifth decimal this locates
# the schedule to within one logged interval (50 iterations out of 80 000), also near its end.
LOGGED_DECIMALS = 5
COCO_EPOCH = 7330  # iterations: 117266 images with annotations / 16, rounded up
ADE20K_RUN = 80000  # iterations


def coco_recipe(i: int) -> float:
    """Linear warm-up from 1e-6 over 500 iterations, then a tenth after 8 and after 11 epochs."""
    warmup = 1 - max(0, 1 - i / 500) * (1 - 1e-6)
    epoch = i // COCO_EPOCH
    return 2e-4 * warmup * 0.1 ** ((epoch >= 8) + (epoch >= 11))


def ade20k_recipe(i: int) -> float:
    """Poly of power 0.9 from 1e-4 to 1e-6 over 80k iterations, no warm-up."""
    return (1e-4 - 1e-6) * (1 - i / ADE20K_RUN) ** 0.9 + 1e-6


class OneWeight(BaseModel):
    """The least that a runner trains. It takes no step: the schedule alone is under test."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        raise AssertionError('not called')

    def train_step(self, data, optim_wrapper):
        optim_wrapper.optimizer.step()  # no gradient: a no-op that satisfies the schedulers
        return {}


class RecordLR(Hook):
    """The rate of each iteration, read where mmengine's RuntimeInfoHook reads it for the log."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])


def learning_rates(config: str, epoch_length: int, work_dir: Path) -> list[float]:
    """Rate of every iteration of the whole run, driven by mmengine's own runner and loop."""
    cfg = Config.fromfile(REPO / 'configs' / config, import_custom_modules=False)
    record = RecordLR()
    runner = Runner(
        model=OneWeight(),
        work_dir=str(work_dir),
        train_dataloader=DataLoader(range(epoch_length), batch_size=None),
        train_cfg=cfg.train_cfg.to_dict() | {'val_interval': 10**9},
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        default_hooks=dict(
            runtime_info=None, timer=None, sampler_seed=None, logger=None, checkpoint=None
        ),
        custom_hooks=[record],
        experiment_name=work_dir.name,
        log_level='ERROR',
    )
    runner.train()
    return record.rates


def published_rates(name: str) -> list[dict[str, str]]:
    with open(DATA / 'published' / name, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    'config, recipe, log, epoch_length, total',
    [
        (
            'mask_rcnn_repnext_m4_coco.py',
            coco_recipe,
            'coco_1x_lr.csv',
            COCO_EPOCH,
            12 * COCO_EPOCH,
        ),
        (
            'semantic_fpn_repnext_m4_ade20k.py',
            ade20k_recipe,
            'ade20k_80k_lr.csv',
            ADE20K_RUN,
            ADE20K_RUN,
        ),
    ],
)
def test_whole_run_follows_the_published_one(
    config: str,
    recipe: Callable[[int], float],
    log: str,
    epoch_length: int,
    total: int,
    tmp_path: Path,
) -> None:
    rates = learning_rates(config, epoch_length, tmp_path)
    assert len(rates) == total
    # The recipe to full precision, so that the last rates (2e-6, 1e-6) are checked as well.
    for i in range(0, total, 7):
        assert rates[i] == pytest.approx(recipe(i), rel=1e-4, abs=0), f'{config} at {i}'
    assert rates[-1] == pytest.approx(recipe(total - 1), rel=1e-4, abs=0)

    rows = published_rates(log)
    assert len(rows) > 1500
    for row in rows:
        iteration = (int(row.get('epoch', 1)) - 1) * epoch_length + int(row['iter'])
        ours = round(rates[iteration - 1], LOGGED_DECIMALS)  # the log counts from 1
        assert ours == pytest.approx(float(row['lr']), rel=0.01, abs=0), f'{config} at {row}'


@pytest.mark.parametrize('task', ['mask_rcnn', 'semantic_fpn'])
def test_every_size_trains_by_the_same_recipe(task: str) -> None:
    """Only backbone and neck differ between the configs of one task."""
    files = sorted((REPO / 'configs').glob(f'{task}_repnext_m?_[ac]*.py'))
    configs = [Config.fromfile(file, import_custom_modules=False) for file in files]
    assert len(configs) == 6
    for cfg in configs:
        rest = cfg.to_dict()
        rest['model'].pop('backbone')
        rest['model'].pop('neck')
        reference = configs[0].to_dict()
        reference['model'].pop('backbone')
        reference['model'].pop('neck')
        assert rest == reference
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.weight_decay) == ('AdamW', 0.05)
        assert 'clip_grad' not in cfg.optim_wrapper
        assert 'paramwise_cfg' not in cfg.optim_wrapper
        assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
        assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
        assert cfg.model.backbone.norm_eval is False
        assert cfg.model.backbone.frozen_stages == -1

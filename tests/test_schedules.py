"""The configs' schedules over the whole run, against the learning rates of published runs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATA, REPO
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from repnext_mm.engine.errors import UserError
from repnext_mm.engine.schedule import rescale, schedule_warnings

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


def read(config: str) -> Config:
    return Config.fromfile(REPO / 'configs' / config, import_custom_modules=False)


def learning_rates(config: str | Config, epoch_length: int, work_dir: Path) -> list[float]:
    """Rate of every iteration of the whole run, driven by mmengine's own runner and loop."""
    cfg = read(config) if isinstance(config, str) else config
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


# --- another length


@pytest.mark.compat
@pytest.mark.parametrize(
    'config, length, epoch_length',
    [
        ('mask_rcnn_repnext_m4_coco.py', {'epochs': 24, 'iterations': None}, 100),
        ('mask_rcnn_repnext_m0_shapes.py', {'epochs': 6, 'iterations': None}, 50),
        ('semantic_fpn_repnext_m4_ade20k.py', {'epochs': None, 'iterations': 2000}, ADE20K_RUN),
        ('semantic_fpn_repnext_m0_shapes.py', {'epochs': None, 'iterations': 1500}, 1500),
    ],
)
def test_another_length_has_the_same_course(
    config: str, length: dict[str, int | None], epoch_length: int, tmp_path: Path
) -> None:
    """The rate at any share of the run is that of the published run at the same share of it."""
    cfg = read(config)
    whole = learning_rates(cfg, epoch_length, tmp_path / 'whole')
    line = rescale(cfg, **length)
    new = length['epochs'] or length['iterations']
    assert line and f'to {new} ' in line
    rates = learning_rates(cfg, epoch_length, tmp_path / 'moved')
    assert len(rates) == new * (epoch_length if length['epochs'] else 1)
    ratio = len(whole) / len(rates)
    for share in (0.0, 0.003, 0.3, 0.6, 0.7, 0.9, 0.95):
        i = int(share * len(rates))
        near = whole[max(0, int(i * ratio) - 4) : int(i * ratio) + 5 + int(ratio)]
        assert min(near) * 0.98 <= rates[i] <= max(near) * 1.02, (share, rates[i], near)
    assert rates[-1] == pytest.approx(whole[-1], abs=0.005 * max(whole))


LENGTHS = st.integers(1, 40)


@given(
    old=LENGTHS,
    new=LENGTHS,
    by_epoch=st.booleans(),
    milestones=st.lists(st.integers(1, 39), unique=True, max_size=4),
    warm_up=st.integers(2, 60),
)
def test_any_length_gives_a_schedule_inside_the_run(
    old: int, new: int, by_epoch: bool, milestones: list[int], warm_up: int
) -> None:
    key = 'max_epochs' if by_epoch else 'max_iters'
    step = dict(type='MultiStepLR', milestones=sorted(milestones), end=old, by_epoch=by_epoch)
    cfg = Config(
        dict(
            train_cfg={key: old, 'val_interval': old},
            param_scheduler=[dict(type='LinearLR', end=warm_up, by_epoch=False), step],
            default_hooks=dict(checkpoint=dict(interval=10, by_epoch=by_epoch)),
            custom_hooks=[dict(type='EMAHook', begin_epoch=0, begin_iter=0)],
        )
    )
    rescale(cfg, *((new, None) if by_epoch else (None, new)))
    first, second = cfg.param_scheduler
    assert cfg.train_cfg[key] == second.end == new
    assert cfg.train_cfg.val_interval <= new
    assert cfg.default_hooks.checkpoint.interval <= max(10, new)
    assert first.end >= 2
    assert all(0 < milestone < new for milestone in second.milestones)
    assert second.milestones == sorted(set(second.milestones))
    assert len(second.milestones) <= len(milestones)


def test_all_that_follows_the_length_moves() -> None:
    cfg = Config(
        dict(
            max_epochs=300,
            train_cfg=dict(max_epochs=300, val_interval=10, dynamic_intervals=[(280, 1)]),
            param_scheduler=dict(
                generator=[
                    dict(type='CosineAnnealingLR', begin=150, end=300, T_max=150),
                    dict(type='ExponentialLR', gamma=0.9),
                ],
                discriminator=[dict(type='StepLR', step_size=30)],
            ),
            default_hooks=dict(checkpoint=dict(interval=30)),
            custom_hooks=[dict(type='PipelineSwitchHook', switch_epoch=280)],
        )
    )
    rescale(cfg, 30, None)
    cosine, exponential = cfg.param_scheduler.generator
    assert (cosine.begin, cosine.end, cosine.T_max) == (15, 30, 15)
    assert exponential.gamma**30 == pytest.approx(0.9**300)
    assert cfg.param_scheduler.discriminator[0].step_size == 3
    assert [*cfg.train_cfg.dynamic_intervals[0]] == [28, 1]
    assert cfg.custom_hooks[0].switch_epoch == 28
    assert cfg.max_epochs == 30


def test_a_length_in_the_other_unit_is_refused() -> None:
    with pytest.raises(UserError, match=r'--iters 100 .* 12 epochs'):
        rescale(read('mask_rcnn_repnext_m4_coco.py'), None, 100)
    with pytest.raises(UserError, match=r'--epochs 3 .* 80000 iterations'):
        rescale(read('semantic_fpn_repnext_m4_ade20k.py'), 3, None)
    assert rescale(read('mask_rcnn_repnext_m4_coco.py'), None, None) is None


# --- what looks wrong


@pytest.mark.parametrize('file', sorted((REPO / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_our_schedules_look_right(file: Path) -> None:
    cfg = read(file.name)
    length = 246 if 'shapes' in file.name else COCO_EPOCH
    assert schedule_warnings(cfg, length) == []
    assert schedule_warnings(cfg, None) == []


@pytest.mark.parametrize(
    'changes, epoch_length, given',
    [
        ({'train_cfg.max_epochs': 1}, 600, ['501 iterations of the 600', '[8, 11]', 'never']),
        ({'train_cfg.max_epochs': 1}, None, ['[8, 11]', 'never']),
        ({'train_cfg.max_epochs': 11}, None, ['[11]', 'never']),
        ({'train_cfg.max_epochs': 100, 'param_scheduler.1.end': 100}, None, ['[8]', 'early']),
        ({'param_scheduler.1.milestones': [1, 11]}, 100, ['[1]', 'early', '501 iterations']),
    ],
)
def test_a_schedule_that_does_not_fit_is_said(
    changes: dict, epoch_length: int | None, given: list[str]
) -> None:
    cfg = read('mask_rcnn_repnext_m4_coco.py')
    cfg.merge_from_dict(changes)
    text = '\n'.join(schedule_warnings(cfg, epoch_length))
    assert all(words in text for words in given), text


@pytest.mark.parametrize('length, given', [(20000, '80001'), (160000, '80001'), (80000, None)])
def test_a_course_that_ends_elsewhere_is_said(length: int, given: str | None) -> None:
    cfg = read('semantic_fpn_repnext_m4_ade20k.py')
    cfg.train_cfg.max_iters = length
    warnings = schedule_warnings(cfg, None)
    assert [given in text and str(length) in text for text in warnings] == [True] * bool(given)

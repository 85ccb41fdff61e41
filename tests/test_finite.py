"""NaN and infinity stop a run, and never get into a checkpoint."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tool_runs
import torch
from conftest import forget_runs
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader

from repnext_mm.engine.amp import PortableAmpOptimWrapper
from repnext_mm.engine.cli import train_main
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.finite import (
    TOLERATED,
    SayWhatWasNotMeasured,
    StopAtNonFiniteLoss,
    first_non_finite,
    without_truth,
)
from repnext_mm.engine.runner import ToolRunner

RUN_NUMBERS = itertools.count()


class Scripted(BaseModel):
    """A model whose losses are given, and what is added to its statistic."""

    def __init__(self, losses: list[float], average: dict[int, float]) -> None:
        super().__init__()
        self.losses, self.new_average = losses, average
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer('average', torch.zeros(1))
        self.iteration = 0

    def forward(self, inputs: torch.Tensor, mode: str = 'loss') -> Any:
        self.iteration += 1
        if mode == 'predict':
            return [BaseDataElement()]
        with torch.no_grad():
            self.average += self.new_average.get(self.iteration, 0.0)
        loss = torch.tensor(self.losses[self.iteration - 1])
        return {
            'loss_box': (self.weight * 0).sum() + 1.0,
            'loss_mask': self.weight.sum() * 0 + loss,
        }


class ScaledLoss(PortableAmpOptimWrapper):
    """Mixed precision with a loss scaler that works on a CPU: it leaves out steps, as float16's."""


def run(
    folder: Path,
    losses: list[float],
    average: dict[int, float] | None = None,
    scaled: bool = False,
    checkpoint: str = 'AtomicCheckpointHook',
    keep: int = 1,
) -> ToolRunner:
    forget_runs()
    optimizer = dict(type='SGD', lr=0.125)
    wrapper: dict[str, Any] = dict(type='OptimWrapper', optimizer=optimizer)
    if scaled:
        wrapper = dict(type=ScaledLoss, dtype='bfloat16', loss_scale=dict(init_scale=2.0**4))
        wrapper['optimizer'] = optimizer
    runner = ToolRunner(
        model=Scripted(losses, average or {}),
        work_dir=str(folder),
        train_dataloader=DataLoader([{'inputs': torch.ones(1)}]),
        train_cfg=dict(by_epoch=False, max_iters=len(losses)),
        optim_wrapper=wrapper,
        default_hooks=dict(
            checkpoint=dict(type=checkpoint, by_epoch=False, interval=2, max_keep_ckpts=keep)
        ),
        experiment_name=f'{folder.name}_{next(RUN_NUMBERS)}',
        log_level='ERROR',
        cfg=dict(default_hooks=dict(checkpoint=dict(by_epoch=False))),
    )
    runner.register_hook(StopAtNonFiniteLoss())
    return runner


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('*.pth*'))


@pytest.mark.compat
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_a_loss_that_is_no_number_stops_the_run(value: float, tmp_path: Path) -> None:
    runner = run(tmp_path, [1.0, 1.0, value, 1.0])
    with pytest.raises(UserError) as caught:
        runner.train()
    assert kept(tmp_path) == ['iter_2.pth']
    for given in ('iteration 3', f'loss_mask={value}', '0.125', str(tmp_path / 'iter_2.pth')):
        assert given in str(caught.value)
    assert 'loss_box' not in str(caught.value)


@pytest.mark.parametrize('hook', ['AtomicCheckpointHook', 'CheckpointHook'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_no_number_is_not_saved(hook: str, value: float, tmp_path: Path) -> None:
    """The losses stay finite, so that only the checkpoint shows it; one is kept at a time."""
    runner = run(tmp_path, [1.0] * 4, average={4: value}, checkpoint=hook)
    with pytest.raises(UserError, match=r'average .*iteration 4'):
        runner.train()
    assert kept(tmp_path) == ['iter_2.pth']
    content = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    assert first_non_finite(content) is None


def test_the_checkpoint_hook_alone_saves_nothing_broken(tmp_path: Path) -> None:
    """As in mm's own tools, which run our configs without the hook that looks at the loss."""
    runner = run(tmp_path, [1.0] * 4, average={4: float('nan')})
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, StopAtNonFiniteLoss)]
    with pytest.raises(UserError, match=r'average .*iteration 4'):
        runner.train()
    assert kept(tmp_path) == ['iter_2.pth']


@pytest.mark.skipif(torch.cuda.is_available(), reason='the scaler is that of the GPU there')
def test_a_loss_scaler_may_leave_out_a_few_steps(tmp_path: Path) -> None:
    once = [1.0, float('inf'), 1.0, 1.0]
    run(tmp_path / 'once', once, scaled=True).train()
    assert kept(tmp_path / 'once') == ['iter_4.pth']
    with pytest.raises(UserError, match='iteration 2'):
        run(tmp_path / 'unscaled', once).train()

    always = [1.0, *[float('nan')] * (TOLERATED + 5)]
    with pytest.raises(UserError, match=f'iteration {TOLERATED + 1} '):
        run(tmp_path / 'always', always, scaled=True).train()
    with pytest.raises(UserError, match=r'average .*iteration 2'):
        run(tmp_path / 'norm', once, average={2: float('nan')}, scaled=True).train()


def test_first_non_finite_looks_everywhere() -> None:
    state = {'a': {'b': [torch.ones(2), torch.tensor([1.0, torch.inf])]}, 'step': torch.tensor(3)}
    assert first_non_finite(state) == 'a.b.1'
    assert first_non_finite({'a': torch.ones(2), 'n': torch.tensor([1, 2])}) is None


def test_metrics_without_ground_truth() -> None:
    coco = {'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_s': -1.0, 'coco/disc_precision': float('nan')}
    assert without_truth(coco) == []
    assert without_truth({'coco/bbox_mAP': -1.0, 'coco/bbox_mAP_50': -1.0}) == ['coco/bbox_mAP=-1']
    assert without_truth({'aAcc': float('nan'), 'mIoU': 3.0}) == ['aAcc=nan']


class Given(BaseMetric):
    """A metric with the result that it is given."""

    def __init__(self, result: dict[str, float]) -> None:
        super().__init__()
        self.result = result

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(self.result)


@pytest.mark.compat
def test_a_test_without_ground_truth_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def evaluate(**result: float) -> None:
        forget_runs()
        runner = ToolRunner(
            model=Scripted([1.0] * 4, {}),
            work_dir=str(tmp_path),
            test_dataloader=DataLoader([{'inputs': torch.ones(1)}]),
            test_evaluator=Evaluator([Given(result)]),
            test_cfg=dict(),
            experiment_name=f'{tmp_path.name}_{next(RUN_NUMBERS)}',
        )
        runner.register_hook(SayWhatWasNotMeasured(stop=True))
        runner.test()

    evaluate(mAP=0.5, mAP_s=-1.0)
    for result in ({'mAP': -1.0, 'mAP_s': -1.0}, {'mIoU': float('nan')}):
        before = [*tmp_path.rglob('*.json')]
        with pytest.raises(UserError, match=r'=-1|=nan'):
            evaluate(**result)
        assert [*tmp_path.rglob('*.json')] == before
    capsys.readouterr()
    evaluate()
    assert 'warning: The model predicted nothing' in capsys.readouterr().out


# --- the tools


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes')


DIVERGING = [
    'optim_wrapper.optimizer.lr=1e12',
    'param_scheduler.0.start_factor=1.0',
    'default_hooks.checkpoint.interval=1',
]


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here, so not over gloo')
def test_all_processes_stop(data: Path, tmp_path: Path) -> None:
    options = tool_runs.options('seg', data, *DIVERGING)
    config = tool_runs.CONFIGS['seg']
    done = tool_runs.run('dist_train.sh', config, 2, '--iters', 8, *options, cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith('error [rank')]
    # torchrun ends the second process when it sees the first one end; either may be quicker.
    assert any(line.startswith('error [rank 0]') for line in errors)
    assert 'closed by peer' not in done.stderr
    assert len({re.search(r'iteration (\d+)', line)[1] for line in errors}) == 1


@pytest.mark.compat
@pytest.mark.slow
def test_a_run_that_diverges_and_one_that_goes_on(data: Path, tmp_path: Path) -> None:
    config, options = tool_runs.CONFIGS['seg'], tool_runs.options('seg', data)
    good = tool_runs.succeed_here(train_main, config, '--iters', 2, *options, cwd=tmp_path)
    checkpoint = shlex.split(good.splitlines()[-1])[-1]
    done = tool_runs.run_here(
        train_main, config, '--iters', 8, '--work-dir', 'bad', *options, *DIVERGING, cwd=tmp_path
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert len(errors) == 1 and 'loss=' in errors[0]
    for path in (tmp_path / 'bad').glob('*.pth'):
        assert first_non_finite(torch.load(path, weights_only=True)) is None

    content = torch.load(tmp_path / checkpoint, weights_only=True)
    state = content['optimizer']['state']
    state[0]['exp_avg'][:] = torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    done = tool_runs.run_here(
        train_main, config, '--resume', 'nan.pth', '--iters', 4, *options, cwd=tmp_path
    )
    assert done.returncode == 1
    assert 'nan.pth has NaN or infinity in optimizer.state.0.exp_avg' in done.stderr

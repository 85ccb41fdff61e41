"""Several processes: data-parallel training over gloo on CPUs, and the scripts that start them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tool_runs
import torch
from conftest import REPO
from networks import tiny
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from repnext_mm.engine.cli import evaluate_main, train_main

CONFIG = """
_base_ = [{base!r}]
model = dict(
    # SyncBN, which has no CPU form, and statistics that do not depend on a process's share.
    backbone=dict(norm_cfg=dict(type='SyncBN'), norm_eval=True),
    neck=dict(norm_cfg=None),
    decode_head=dict(norm_cfg=None, dropout_ratio=0.0),
)
train_dataloader = dict(sampler=dict(shuffle=False))
# After one step the momentum of SGD is the gradient.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9))
train_cfg = dict(max_iters=1, val_interval=1)
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes', train=4)


def gradients(work_dir: Path) -> list[torch.Tensor]:
    checkpoint = torch.load(work_dir / 'iter_1.pth', weights_only=True)
    states = checkpoint['optimizer']['state']
    return [states[i]['momentum_buffer'] for i in sorted(states)]


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here, so not over gloo')
def test_two_processes_have_the_gradients_of_the_joint_batch(data: Path, tmp_path: Path) -> None:
    config = tmp_path / 'gradients.py'
    config.write_text(CONFIG.format(base=str(tool_runs.CONFIGS['seg'])))

    def options(batch: int) -> list[str]:
        no_flip = 'train_dataloader.dataset.pipeline.2.prob=0.0'
        return tool_runs.options('seg', data, no_flip, f'train_dataloader.batch_size={batch}')

    tool_runs.succeed_here(train_main, config, '--work-dir', 'one', *options(2), cwd=tmp_path)
    two = ['--work-dir', 'two', *options(1)]
    output = tool_runs.succeed('dist_train.sh', config, 2, *two, cwd=tmp_path)
    assert output.count('2 processes over gloo') == 1  # one line, not one per process
    assert output.splitlines()[-1].startswith('Wrote two/iter_1.pth')

    joint, shared = gradients(tmp_path / 'one'), gradients(tmp_path / 'two')
    assert len(joint) == len(shared) > 100
    scale = max(float(g.abs().max()) for g in joint)
    assert scale > 1e-3
    for own, other in zip(joint, shared, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here, so not over gloo')
def test_detection_in_two_processes(data: Path, tmp_path: Path) -> None:
    """Norms that train, evaluation shared out, and the AP of dist_test.sh that of test.py."""
    settings = tool_runs.options(
        'det',
        data,
        'model.backbone.norm_cfg.type=SyncBN',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=1',
        'model.test_cfg.rcnn.score_thr=0.0',
    )
    config = tool_runs.CONFIGS['det']
    output = tool_runs.succeed('dist_train.sh', config, 2, *settings, cwd=tmp_path)
    arguments = shlex.split(output.splitlines()[-1].split('next: python tools/test.py ')[1])
    both = tool_runs.succeed('dist_test.sh', *arguments, 2, cwd=tmp_path)
    alone = tool_runs.succeed_here(evaluate_main, *arguments, cwd=tmp_path)
    found = [re.search(r'coco/bbox_mAP: (\S+)', text) for text in (both, alone)]
    assert all(found)
    assert found[0][1] == found[1][1]


@pytest.mark.compat
@pytest.mark.parametrize('name', ['repnext_m', 'recnext_a', 'inception_next'])
def test_fewer_stages_under_ddp(name: str, tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter that requires one, even in one process."""
    distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny(name, out_indices=(0, 1, 2)).train())
        for _ in range(3):
            sum(stage.mean() for stage in model(torch.randn(2, 3, 64, 64))).backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    'script, arguments, message',
    [
        ('dist_train.sh', ['config.py'], 'usage: '),
        ('dist_test.sh', ['config.py', 'a.pth'], 'usage: '),
        ('dist_train.sh', ['config.py', 'two'], "a whole number from 1, not 'two'"),
        ('dist_train.sh', ['config.py', '0'], "a whole number from 1, not '0'"),
        ('slurm_train.sh', ['partition', 'job', 'config.py'], 'usage: '),
        ('slurm_test.sh', ['partition', 'job', 'config.py'], 'usage: '),
    ],
)
def test_scripts_refuse_wrong_arguments(
    script: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = tool_runs.run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    'script, arguments, expected',
    [
        (
            'slurm_train.sh',
            ['gpu', 'job', 'a config.py', 'work dir', '--amp'],
            ['tools/train.py', 'a config.py', '--work-dir', 'work dir', '--amp'],
        ),
        (
            'slurm_test.sh',
            ['gpu', 'job', 'config.py', 'a.pth'],
            ['tools/test.py', 'config.py', 'a.pth'],
        ),
    ],
)
def test_slurm_command(
    script: str, arguments: list[str], expected: list[str], tmp_path: Path
) -> None:
    """What the scripts hand to srun; Slurm itself is stood in for by a program that repeats it."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    env = {'PATH': path, 'GPUS': '4', 'SRUN_ARGS': '--time 10 --exclusive', 'PYTHON': 'python'}
    words = subprocess.run(
        [REPO / 'tools' / script, *arguments], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {'--job-name=job', '--ntasks=4', '--gres=gpu:4', '--exclusive'} <= set(words)
    at = words.index('python')
    assert words[at : at + 2] == ['python', '-u']
    tool, *rest = words[at + 2 :]
    assert [tool.replace(f'{REPO}/', ''), *rest] == [*expected, '--launcher', 'slurm']

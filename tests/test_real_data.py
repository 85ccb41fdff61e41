"""Real COCO and ADE20K images through the real tools and configs, evaluation included.

The same commands with more iterations overfit these images; docs/training.md contains them and the
figures.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import REPO
from evaluations import ONE_POINT, trained
from tool_runs import succeed_here

from repnext_mm.deploy.cli import deploy_main
from repnext_mm.engine.cli import evaluate_main, train_main

COCO = [
    'train_dataloader.dataset.indices=4',
    'train_dataloader.dataset.pipeline.2.scale=(160,96)',
    *(
        setting
        for split in ('val', 'test')
        for setting in (
            f'{split}_dataloader.dataset.indices=2',
            f'{split}_dataloader.dataset.pipeline.1.scale=(160,96)',
        )
    ),
    'model.test_cfg.rcnn.score_thr=0.0',
    'model.train_cfg.rcnn.sampler.num=32',
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=1',
]
ADE20K = [
    'train_dataloader.dataset.pipeline.2.scale=(256,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'model.data_preprocessor.size=(64,64)',
    *(f'{split}_dataloader.dataset.pipeline.1.scale=(256,64)' for split in ('val', 'test')),
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize(
    'config, folder, settings, losses, metrics',
    [
        (
            'mask_rcnn_repnext_m0_coco.py',
            'coco',
            COCO,
            {'loss_rpn_cls', 'loss_cls', 'loss_bbox', 'loss_mask'},
            {'coco/bbox_mAP', 'coco/segm_mAP'},
        ),
        (
            'semantic_fpn_repnext_m0_ade20k.py',
            'ade/ADEChallengeData2016',
            ADE20K,
            {'decode.loss_ce'},
            {'mIoU'},
        ),
    ],
)
def test_train_and_evaluate_on_real_images(
    config: str,
    folder: str,
    settings: list[str],
    losses: set[str],
    metrics: set[str],
    data_root: Path,
    tmp_path: Path,
) -> None:
    output = succeed_here(
        train_main,
        REPO / 'configs' / config,
        '--cfg-options',
        f'data_root={data_root / folder}',
        'model.backbone.init_cfg=None',  # tests reach no network
        *settings,
        cwd=tmp_path,
    )
    log = next(tmp_path.glob('work_dirs/*/*/vis_data/scalars.json')).read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 2
    for step in steps:
        assert losses <= set(step)
        assert 0 < step['loss'] < 100
    evaluation = lines[-1]
    assert metrics <= set(evaluation)

    # The named next command evaluates the checkpoint on the same images to the same figures.
    command = shlex.split(output.splitlines()[-1].split('next: python tools/test.py ')[1])
    last = succeed_here(evaluate_main, *command, cwd=tmp_path).splitlines()[-1]
    results = json.loads((tmp_path / re.match(r'Wrote (\S+\.json)', last)[1]).read_text())
    for metric in metrics:
        assert results[metric] == pytest.approx(evaluation[metric], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, config, folder, scale',
    [
        ('det', 'mask_rcnn_repnext_m0_coco.py', 'coco', '(320,192)'),
        ('seg', 'semantic_fpn_repnext_m0_ade20k.py', 'ade/ADEChallengeData2016', '(256,64)'),
    ],
)
def test_the_file_that_ships_on_real_images(
    task: str, config: str, folder: str, scale: str, data_root: Path, tmp_path: Path
) -> None:
    """Images of many sizes and shapes, 80 and 150 classes: AP and mIoU are PyTorch's."""
    pytest.importorskip('onnxruntime', reason='needs the extra deploy: onnxruntime')
    options = [
        '--no-check',  # random masks do not lie in their boxes
        '--cfg-options',
        f'data_root={data_root / folder}/',
        f'test_dataloader.dataset.pipeline.1.scale={scale}',
    ]
    model = trained(task, tmp_path / task, options, base=REPO / 'configs' / config)
    expected = model.evaluate().metric
    assert expected > 50 * ONE_POINT[task]
    command = [str(model.config), str(model.checkpoint), '--size', '192']
    assert deploy_main([*command, '--format', 'onnx,openvino', '--work-dir', str(tmp_path)]) == 0
    for suffix in ('.onnx', '_openvino'):
        (path,) = tmp_path.glob(f'*{suffix}')
        found = model.evaluate('--model', path).metric
        assert abs(found - expected) < 0.1 * ONE_POINT[task], suffix

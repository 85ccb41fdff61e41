"""From a folder of images to a config and a trained model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import browser
import labeled_folders as made
import own_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_models import sample_batch, sample_data, train_and_predict
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from tool_runs import succeed_here

from repnext_mm.backbones import look_up
from repnext_mm.datasets.folders import LabeledFolder
from repnext_mm.engine.frameworks import import_framework
from repnext_mm.look.command import look_main
from repnext_mm.own_data.command import _weights, train_main
from repnext_mm.own_data.config import Weights, may_flip
from repnext_mm.own_data.heads import CHOICE, HEADS, build_model_config, cost
from repnext_mm.own_data.settings import choose, learning_rate, run_length
from repnext_mm.own_data.text import WIDTH, Code, assign, render
from repnext_mm.prediction.command import predict_main

INCEPTION = 'inception_next_atto'
KINDS = ('boxes', 'polygons', 'masks', 'classes')


@pytest.fixture(scope='module')
def real(data_root: Path) -> LabeledFolder:
    return made.real(data_root)


@pytest.fixture(scope='module')
def folders(real: LabeledFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight real images with each kind of labels."""
    root = tmp_path_factory.mktemp('own')
    examples = own_models.eight(real)
    assert len(examples) == 8
    return {kind: own_models.write(real, examples, root / kind, kind) for kind in KINDS}


# --- models


@pytest.mark.compat
@pytest.mark.parametrize(
    'network', ['repnext_m2', 'recnext_t', 'recnext_a3', 'inception_next_atto']
)
@pytest.mark.parametrize('head', [head for head, row in HEADS.items() if row.base])
def test_every_head_fits_every_family(head: str, network: str) -> None:
    scope = HEADS[head].scope
    import_framework(scope)
    family, _ = look_up(network)
    for lite in (False, True) if head != 'upernet' else (False,):
        model = build_model_config(head, network, 7, lite)
        with torch.device('meta'), DefaultScope.overwrite_default_scope(scope):
            built = MODELS.build(ConfigDict(model))
        assert type(built.backbone) is family
        strides = built.backbone.out_strides
        if HEADS[head].dense:
            assert strides == (8, 16, 32)
        with torch.no_grad():
            features = built.eval().extract_feat(torch.empty(1, 3, 128, 128, device='meta'))
        widths = {f.shape[1] for f in features}
        if 'neck' in model:
            assert len(widths) == 1
        generators = [m for m in built.modules() if hasattr(m, 'prior_generator')]
        for module in generators:
            used = [stride[0] for stride in module.prior_generator.strides]
            assert used == [128 // f.shape[2] for f in features]
        numbers = set(re.findall(r"'num_classes': (\d+)", str(model)))
        assert numbers == {'7'}


def test_lite_models_cost_less() -> None:
    for head, row in HEADS.items():
        if not row.base or head == 'upernet':
            continue
        usual, light = (
            cost(build_model_config(head, 'repnext_m0', 80, lite), row.scope, (640, 640))
            for lite in (False, True)
        )
        assert light[0] < 0.8 * usual[0]
        assert light[1] < 0.8 * usual[1]
    # The figure of the issue that asked for it: 21.7 M, of which 2.1 M are the backbone.
    parameters, _ = cost(build_model_config('mask_rcnn', 'repnext_m0', 5), 'mmdet', (64, 64))
    assert round(parameters / 1e6, 1) == 21.7


@pytest.mark.parametrize('head', ['mask_rcnn', 'rtmdet', 'rtmdet_ins', 'retinanet', 'semantic_fpn'])
def test_a_light_model_learns_and_predicts(head: str, tmp_path: Path) -> None:
    scope = HEADS[head].scope
    import_framework(scope)
    model = build_model_config(head, 'repnext_m0', 7, lite=True)
    if scope == 'mmseg':
        model['data_preprocessor']['size'] = (64, 64)
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(ConfigDict(model))
    pipeline = None
    if scope == 'mmdet' and not HEADS[head].masks:
        pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs'),
        ]
    batch = sample_batch(scope, sample_data(tmp_path), pipeline, size=64)
    train_and_predict(built, batch)


# --- the config


def plain(values: Any) -> Any:
    return st.recursive(
        values,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(
                st.text('abcdefgh_', min_size=1, max_size=12) | st.sampled_from(['a b', '**c']),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=25,
    )


@settings(max_examples=150, deadline=None)
@given(plain(st.none() | st.booleans() | st.integers() | st.text(max_size=30) | st.floats(-9, 9)))
def test_what_is_rendered_is_the_value(value: Any) -> None:
    def without_stars(node: Any) -> Any:
        if isinstance(node, dict):
            return {k.strip('*'): without_stars(v) for k, v in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(without_stars(item) for item in node)
        return node

    value = without_stars(value)
    assert eval(render(value)) == value
    text = assign('name', value, 'why ' * 40)
    names: dict[str, Any] = {}
    exec(text, names)
    assert names['name'] == value


def test_names_and_expressions_are_left_as_they_are() -> None:
    text = assign('x', {'**dataset': None, 'n': Code('len(classes)')})
    assert text == 'x = dict(**dataset, n=len(classes))'


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('kind', KINDS)
def test_a_config_is_short_complete_and_its_own(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = contents(folders[kind])
    path = own_models.config(folders[kind], tmp_path / 'run')
    text = path.read_text()
    lines = text.splitlines()
    assert path == tmp_path / 'run' / 'run.py'
    assert len(lines) < 290
    paths = ('data_root = ', 'annotations = ')
    assert max(len(line) for line in lines if not line.startswith(paths)) <= WIDTH
    assert '_base_' not in text
    cfg = Config.fromfile(path)
    head = HEADS[CHOICE[kind]]  # type: ignore[index]
    assert cfg.default_scope == head.scope
    assert text.count('len(classes)') >= 1
    assert cfg.default_hooks.checkpoint.save_best == head.monitor
    assert {hook.type for hook in cfg.custom_hooks} >= {'EMAHook', 'EarlyStoppingHook'}
    assert contents(folders[kind]) == before
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert Path(dataset.ann_file).is_relative_to(tmp_path)


def test_label_maps_of_mixed_endings_are_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    data = Path(shutil.copytree(folders['masks'], tmp_path / 'data'))
    images = sorted((data / 'images').iterdir())
    images[0].rename(images[0].with_suffix('.jpeg'))
    cfg = Config.fromfile(own_models.config(data, tmp_path / 'run'))
    dataset = cfg.train_dataloader.dataset
    assert (dataset.img_suffix, dataset.seg_map_suffix) == ('', '.png')
    names = Path(dataset.ann_file).read_text().split()
    assert len(names) == 8
    for name in names:
        assert (data / name).is_file()
        assert (Path(dataset.data_prefix.seg_map_path) / f'{name}.png').is_file()
    plain_cfg = Config.fromfile(own_models.config(folders['masks'], tmp_path / 'plain'))
    assert plain_cfg.train_dataloader.dataset.data_prefix == dict(
        img_path='images', seg_map_path='masks'
    )


def test_settings_follow_from_the_data(real: LabeledFolder) -> None:
    train = real.splits['train']
    chosen = choose('rtmdet', 'repnext_m0', train, from_scratch=False)
    assert chosen.size.value % 64 == 0
    assert 320 <= chosen.size.value <= 640
    smaller = [type(e)(e.file, 4 * e.height, 4 * e.width, e.objects) for e in train]
    wanted = choose('rtmdet', 'repnext_m0', smaller, from_scratch=False, batch=2)
    assert wanted.size.value > chosen.size.value or chosen.size.value == 640
    assert learning_rate('mask_rcnn', 16, False).value == 2e-4
    assert learning_rate('mask_rcnn', 4, False).value == 1e-4
    assert run_length(117266, 7330, False).value == 12
    assert run_length(1000, 125, False).value == 59
    assert run_length(8, 2, False).value == 300
    assert may_flip(['cat', 'dog'])
    assert not may_flip(['turn_left', 'turn_right'])


# --- what is refused


def fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert train_main(list(command)) == 1
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    assert len(error.strip().splitlines()) == 1, error
    return error


def test_wrong_input_is_one_sentence(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes, masks = str(folders['boxes']), str(folders['masks'])
    none = ['--pretrained=none', f'--work-dir={tmp_path / "run"}']
    (tmp_path / 'empty').mkdir()
    for said, command in {
        'has no image in a format that is known': [str(tmp_path / 'empty')],
        'cannot be trained from boxes without outlines': [boxes, '--head=mask_rcnn', *none],
        'choose semantic_fpn, upernet': [masks, '--head=rtmdet', *none],
        'must be a multiple of 32; 288 is near': [boxes, '--size=300', *none],
        "did you mean 'toilet'": [boxes, '--classes=toilets', *none],
        'is no network of this package': [boxes, '--model=resnet50', *none],
        'must be from 0 to below 1': [boxes, '--val-share=1', *none],
        'counts epochs; give --epochs': [boxes, '--iters=3', *none],
        'write it with --dry-run': [boxes, '--launcher=pytorch', *none],
        '--head is for a folder of images': ['mask_rcnn_repnext_m0_coco', '--head=rtmdet'],
        '--val-share is for a folder': ['mask_rcnn_repnext_m0_coco', '--val-share=0'],
        '--lr 0 must be above 0': [boxes, '--lr=0', *none],
        'no labels of the format coco': [boxes, '--format=coco', *none],
    }.items():
        assert said in fails(capsys, *command), said
    assert not (tmp_path / 'run').exists()


def test_a_dry_run_writes_a_config_and_never_over_another(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folders['boxes']), '--pretrained=none', '--dry-run', '--size=96',
               f'--work-dir={tmp_path / "run"}']  # fmt: skip
    assert train_main(command) == 0
    output = capsys.readouterr().out
    assert re.search(r'YOLO, \d+ boxes; images: 6 train, 2 val', output)
    assert output.rstrip().endswith('run.py')
    first = (tmp_path / 'run' / 'run.py').read_text()
    assert train_main(command) == 0
    assert 'contains another run, so this one writes to' in capsys.readouterr().out
    assert (tmp_path / 'run' / 'run.py').read_text() == first
    assert (tmp_path / 'run_2' / 'run_2.py').is_file()
    names = [
        {i['file_name'] for i in json.loads(p.read_text())['images']}
        for p in sorted((tmp_path / 'run').glob('annotations/*.json'))
    ]
    assert names == [
        {i['file_name'] for i in json.loads(p.read_text())['images']}
        for p in sorted((tmp_path / 'run_2').glob('annotations/*.json'))
    ]


def test_weights_are_chosen_by_name() -> None:
    assert _weights(None, 'repnext_m4', 'mask_rcnn', False) == Weights('repnext_m4_coco', True)
    assert _weights(None, 'recnext_a3', 'semantic_fpn', False) == Weights('recnext_a3_ade20k', True)
    imagenet = Weights('repnext_m4_distill_300e')
    for asked, head, lite in ((None, 'mask_rcnn', True), (None, 'rtmdet', False),
                              ('imagenet', 'mask_rcnn', False)):  # fmt: skip
        assert _weights(asked, 'repnext_m4', head, lite) == imagenet
    assert _weights('none', 'repnext_m4', 'mask_rcnn', False) == Weights()
    assert _weights(None, 'repnext_m0e', 'rtmdet', False) == Weights()  # none is published


@pytest.mark.slow
def test_a_start_from_a_detector_of_other_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    small = ['--size=96', '--lite', '--epochs=1']
    config = own_models.config(folders['polygons'], tmp_path / 'first', *small)
    first = own_models.checkpoint(config, tmp_path / 'first.pth', seed=5)
    work = tmp_path / 'second'
    command = [folders['polygons'], *small, '--classes=toilet,sink', f'--pretrained={first}',
               '--val-share=0', f'--work-dir={work}']  # fmt: skip
    output = succeed_here(train_main, *command, cwd=tmp_path)
    line = next(line for line in output.splitlines() if line.startswith('Loading '))
    assert 'left out, as they differ: roi_head.bbox_head.fc_cls, roi_head.bbox_head.fc_reg' in line
    assert f"load_from = '{first}'" in (work / 'second.py').read_text()
    before = torch.load(first, weights_only=True)['state_dict']
    after = torch.load(work / 'epoch_1.pth', weights_only=True)['state_dict']
    key = (
        'backbone.stem.0.conv.weight'
        if 'backbone.stem.0.conv.weight' in before
        else next(k for k, v in before.items() if k.startswith('backbone.') and v.dim() == 4)
    )
    torch.testing.assert_close(after[key], before[key], atol=0.02, rtol=0)


# --- the whole road


#: Proposals of a two-stage detector, for a few objects per image.
FEWER = [
    '--cfg-options',
    'model.train_cfg.rcnn.sampler.num=64',
    'model.train_cfg.rpn_proposal.max_per_img=200',
    'model.test_cfg.rpn.max_per_img=200',
]
#: No other sizes than the test's: what is learned by heart is asked as it was seen.
ONE_SCALE = ['--cfg-options', 'train_dataloader.dataset.pipeline.2.ratio_range=(1.0,1.0)']
ROADS = {
    # RTMDet, the first choice, needs 600 steps from random weights (docs/own_data.md).
    'boxes': ['--head=faster_rcnn', '--size=160', '--lite', '--epochs=60', '--lr=0.001', *FEWER],
    'polygons': ['--size=160', '--lite', '--epochs=75', '--lr=0.001', *FEWER],
    'masks': ['--size=160', '--lite', '--epochs=100', '--lr=0.002', *ONE_SCALE],
    'classes': ['--size=96', '--epochs=40'],
}
REACHED = {
    'boxes': ('coco/bbox_mAP_50', 0.6),
    'polygons': ('coco/bbox_mAP_50', 0.6),
    'masks': ('mIoU', 60.0),
    'classes': ('accuracy/top1', 99.0),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_the_road_from_images_to_a_model_one_looks_at(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Eight real images, learned by heart."""
    data, work = folders[kind], tmp_path / 'run'
    given = [data, '--pretrained=none', '--val-share=0', f'--work-dir={work}', *ROADS[kind]]
    output = succeed_here(train_main, *given, cwd=tmp_path)
    lines = [line for line in output.splitlines() if line.startswith('epoch ')]
    epochs = int(lines[-1].partition('/')[0].split()[-1])
    assert len(lines) == epochs  # one each
    assert all(re.search(r'loss [\d.]+  lr [\d.e-]+', line) for line in lines)
    assert 'Average Precision' not in output
    log = next(work.glob('*/*.log')).read_text()
    assert 'Epoch(train)' in log
    best = next(work.glob('best_*.pth'))
    assert f'next: repnext-mm predict {best}' in output or str(best) in output
    assert output.rstrip().endswith('--val-share 0')  # of the same images
    for name in ('curves.png', 'predictions.png'):
        assert (work / name).is_file()
    metric, least = REACHED[kind]
    records = [
        json.loads(line)
        for path in work.glob('*/vis_data/scalars.json')
        for line in path.read_text().splitlines()
    ]
    assert max(record.get(metric, 0) for record in records) >= least

    out = tmp_path / 'predictions'
    succeed_here(predict_main, best, data, '--show-truth', '--out', out, cwd=tmp_path)
    assert len([p for p in out.rglob('*') if p.suffix in ('.jpg', '.png')]) == 8
    assert json.loads((out / 'predictions.json').read_text())

    succeed_here(look_main, best, data, '--val-share=0', '--out', tmp_path / 'look', cwd=tmp_path)
    page = (tmp_path / 'look' / 'index.html').read_text()
    assert '<script' not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for title in ('Training', 'Errors', 'Worst images', 'Feature maps', 'Receptive fields', 'Data'):
        assert f'<h2>{title}</h2>' in page
    if browser.CHROMIUM:
        for width in (1200, 390):
            assert browser.width_of(tmp_path / 'look' / 'index.html', width) <= width

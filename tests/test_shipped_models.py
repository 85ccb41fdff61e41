"""Complete models from config and checkpoint to what ships: files, figures, predictor, page."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import browser
import mm_models
import numpy as np
import published_models
import pytest
import torch
from evaluations import ONE_POINT, Trained, small_models
from mmengine.config import Config
from PIL import Image

from repnext_mm.deploy import parity, web_runtime
from repnext_mm.deploy.bench import open_predictor
from repnext_mm.deploy.cli import deploy_main
from repnext_mm.deploy.explain import _part, parts_of
from repnext_mm.deploy.shipping import Unshippable, pipeline_steps
from repnext_mm.prediction.command import predict_main
from repnext_mm.runtimes import ArtifactError, open_artifact, predictor
from repnext_mm.runtimes.predictor import Model, PredictError

pytest.importorskip('onnxruntime', reason='needs the extra deploy: onnxruntime')
pytest.importorskip('openvino', reason='needs the extra deploy: openvino')

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture(scope='module')
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return small_models(tmp_path_factory.mktemp('models'))


def deploy(model: Trained, folder: Path, *options: str) -> int:
    command = [str(model.config), str(model.checkpoint), '--size', '64', *options]
    return deploy_main([*command, '--work-dir', str(folder)])


@pytest.fixture(scope='module')
def shipped(
    models: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What an export of each writes, in every format that is quick."""
    folders = {}
    for task, model in models.items():
        folders[task] = tmp_path_factory.mktemp('shipped') / task
        formats = 'onnx,openvino,pt2,torchscript,web'
        assert deploy(model, folders[task], '--format', formats) == 0
    return folders


def file(folder: Path, suffix: str) -> Path:
    (found,) = folder.glob(f'*{suffix}')
    return found


def pictures(model: Trained) -> list[Path]:
    return sorted(path for path in model.data_root.rglob('*.jpg') if 'val' in path.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_what_is_written(task: str, shipped: dict[str, Path]) -> None:
    report = json.loads((shipped[task] / 'report.json').read_text())
    assert report['status'] == 'ok'
    assert report['model']['scope'] == 'model'
    assert report['plans'][0]['bn_left'] == 0
    open_sizes = {a['format']: a['dynamic'] for a in report['artifacts']}
    fixed = {'det': 'none', 'seg': 'batch'}[task]
    assert open_sizes == dict.fromkeys(('onnx', 'openvino', 'pt2', 'web'), 'batch-hw') | {
        'torchscript': fixed
    }
    for row in report['parity']:
        assert row['passed']
        assert row['output'] == {'det': 'detections', 'seg': 'classes'}[task]
    if task == 'det':
        assert sum(row['measures']['detections'] for row in report['parity']) > 100
    described = json.loads((shipped[task] / 'model.json').read_text())
    for each in described['files']:
        assert predictor.digest(shipped[task] / each['path']) == each['sha256']
    assert deploy_main(['check', str(shipped[task]), '--trust']) == 0


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['fp32_batch-hw.onnx', '_openvino', '.pt2'])
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_the_figures_of_the_file(
    task: str, suffix: str, models: dict[str, Trained], shipped: dict[str, Path]
) -> None:
    """AP and mIoU of what ships are those of PyTorch."""
    model = models[task]
    expected = model.evaluate().metric
    evaluation = model.evaluate('--model', file(shipped[task], suffix))
    assert expected > 90 * ONE_POINT[task]
    assert abs(evaluation.metric - expected) < 0.1 * ONE_POINT[task]
    assert f'Model: {file(shipped[task], suffix)}' in evaluation.out
    assert '--model' in evaluation.out.splitlines()[-1]


@pytest.mark.slow
def test_bfloat16_and_float16_have_their_own_figures(
    models: dict[str, Trained], shipped: dict[str, Path], tmp_path: Path
) -> None:
    model = models['seg']
    assert deploy(model, tmp_path, '--format', 'onnx', '--dtype', 'fp16', '--max-drop', '50') == 0
    (record,) = json.loads((tmp_path / 'report.json').read_text())['artifacts']
    metric = record['metric']
    assert metric['name'] == 'mIoU'
    assert metric['value'] == pytest.approx(metric['reference'], abs=0.5)
    half, full = (model.evaluate('--model', file(at, '.onnx')) for at in (tmp_path, shipped['seg']))
    assert 90 < half.metric < full.metric  # which has its own predictions for the truth
    assert deploy(model, tmp_path / 'no', '--dtype', 'fp16', '--max-drop', '-200') == 6
    assert list((tmp_path / 'no' / 'rejected').iterdir())
    assert not list((tmp_path / 'no').glob('*.onnx'))


@pytest.mark.slow
def test_logits_are_compared_as_a_map(models: dict[str, Trained], tmp_path: Path) -> None:
    """In float64, at the size of the image and at that of an original."""
    assert deploy(models['seg'], tmp_path, '--output', 'logits') == 0
    rows = json.loads((tmp_path / 'report.json').read_text())['parity']
    assert {row['output'] for row in rows} == {'logits'}
    assert len({tuple(row['measures']['shape']) for row in rows}) == len(rows) > 2
    assert all(row['measures']['max_rel'] <= 1e-4 for row in rows)
    assert deploy_main(['check', str(tmp_path)]) == 0


@pytest.mark.slow
def test_files_that_the_test_tool_refuses(
    models: dict[str, Trained], shipped: dict[str, Path], tmp_path: Path
) -> None:
    det, seg = models['det'], models['seg']
    assert deploy(det, tmp_path / 'b', '--scope', 'backbone') == 0
    backbone = file(tmp_path / 'b', '.onnx')
    assert deploy(seg, tmp_path / 'f', '--dynamic', 'none', '--size', '32') == 0
    whole = file(shipped['det'], '.onnx')
    for arguments, words in (
        (('--model', backbone), 'is a backbone alone; name it by --backbone'),
        (('--backbone', whole), 'is a complete model and no backbone; name it by --model'),
        (('--model', whole, '--backbone', backbone), 'give one of them'),
        (('--model', file(shipped['det'], '.torchscript')), 'add --trust'),
    ):
        assert words in det.evaluate(*arguments).sentence
    sentence = seg.evaluate('--model', file(tmp_path / 'f', '.onnx')).sentence
    assert 'requires images of (32, 32), and the test pipeline makes one of (64, 64)' in sentence


# --- the predictor


def alone(folder: Path) -> dict[str, str]:
    """An environment with numpy, Pillow and ONNX Runtime, and nothing else."""
    packages = folder / 'packages'
    packages.mkdir()
    for name in ('numpy', 'PIL', 'onnxruntime'):
        module = __import__(name)
        assert module.__file__ is not None
        (packages / name).symlink_to(Path(module.__file__).parent)
        libraries = Path(module.__file__).parent.parent / f'{name}.libs'
        for extra in (libraries, libraries.with_name('pillow.libs')):
            if extra.is_dir() and not (packages / extra.name).exists():
                (packages / extra.name).symlink_to(extra)
    return {'PATH': os.environ['PATH'], 'PYTHONPATH': str(packages)}


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_where_nothing_else_is_installed(
    task: str, models: dict[str, Trained], shipped: dict[str, Path], tmp_path: Path
) -> None:
    """Its results there, with Pillow and without OpenCV, are those that it has here."""
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    for name in ('model.json', 'predict.py', file(shipped[task], 'hw.onnx').name):
        shutil.copy(shipped[task] / name, folder)
    images = [tmp_path / f'{i}.png' for i in range(2)]
    for path, source in zip(images, pictures(models[task])):
        Image.open(source).resize((101, 77)).save(path)
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'no image')
    environment = alone(tmp_path)
    probe = 'import importlib.util as u; print([n for n in ("torch", "cv2") if u.find_spec(n)])'
    command = [sys.executable, '-S']
    run = {'capture_output': True, 'text': True, 'env': environment, 'cwd': folder}
    seen = subprocess.run([*command, '-c', probe], check=True, **run)  # type: ignore[call-overload]
    assert seen.stdout == '[]\n'
    arguments = [*map(str, images), str(broken), '--json', '--out', str(tmp_path / 'drawn')]
    done = subprocess.run([*command, 'predict.py', *arguments], **run)  # type: ignore[call-overload]
    assert done.returncode == 1, done.stderr  # one of three cannot be read
    assert done.stderr == f'skipped: {broken} is not an image that can be read.\n'
    records = json.loads(done.stdout)
    model = Model(folder)
    for path, record in zip(images, records, strict=True):
        result = model(path)
        expected = predictor.as_record(result, model.settings)
        assert {k: v for k, v in record.items() if k in expected} == json.loads(
            json.dumps(expected)
        )
        drawn = np.asarray(Image.open(tmp_path / 'drawn' / f'{path.name}.png'))
        assert drawn.shape == (77, 101, 3)
        assert (drawn != np.asarray(Image.open(path).convert('RGB'))).any()


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['hw.onnx', '.pt2', '.torchscript'])
def test_the_same_inside_the_package(
    suffix: str,
    models: dict[str, Trained],
    shipped: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = pictures(models['det'])[0]
    command = [str(file(shipped['det'], suffix)), str(image), '--json']
    if suffix == '.torchscript':
        assert predict_main(command) == 1
        assert 'add --trust' in capsys.readouterr().err
        command.append('--trust')
    assert predict_main(command) == 0
    (record,) = json.loads(capsys.readouterr().out)
    wanted = Model(shipped['det'])(image)
    assert [row['label'] for row in record['detections']] == wanted['labels'].tolist()
    boxes = [row['box'] for row in record['detections']]
    np.testing.assert_allclose(boxes, wanted['boxes'], atol=0.01)


@pytest.mark.slow
def test_the_figures_of_the_predictor(
    models: dict[str, Trained], shipped: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From image files, without mm: the AP that the test tool prints."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    model = models['det']
    truth = COCO(model.config.parent / 'found.json')
    predictor_ = Model(shipped['det'])
    ids = {category['name']: category['id'] for category in truth.dataset['categories']}
    rows = []
    for image in truth.dataset['images']:
        result = predictor_(model.data_root / 'val2017' / image['file_name'])
        for number, (x0, y0, x1, y1) in enumerate(result['boxes'].astype(float)):
            encoded = coco_mask.encode(np.asfortranarray(result['masks'][number].astype(np.uint8)))
            rows.append(
                {
                    'image_id': image['id'],
                    'category_id': ids[predictor_.classes[result['labels'][number]]],
                    'score': float(result['scores'][number]),
                    'bbox': [x0, y0, x1 - x0, y1 - y0],
                    'segmentation': encoded,
                }
            )
    evaluation = COCOeval(truth, truth.loadRes(rows), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert evaluation.stats[0] == pytest.approx(model.evaluate().metric, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_openvino_finds_what_onnx_finds(
    task: str, models: dict[str, Trained], shipped: dict[str, Path]
) -> None:
    one, other = (Model(file(shipped[task], suffix)) for suffix in ('hw.onnx', '_openvino'))
    for path in pictures(models[task]):
        wanted, found = one(path), other(path)
        assert found.keys() == wanted.keys()
        if task == 'seg':
            assert (found['classes'] != wanted['classes']).mean() < 1e-3
        else:
            assert found['labels'].tolist() == wanted['labels'].tolist()
            np.testing.assert_allclose(found['boxes'], wanted['boxes'], atol=0.01)


def test_resizing_is_that_of_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, for any sizes; the page has the same arithmetic."""
    cv2 = pytest.importorskip('cv2')
    generator = np.random.default_rng(0)
    for height, width, to in ((480, 640, (1067, 800)), (333, 500, (192, 128)), (50, 7, (9, 120))):
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        expected = cv2.resize(image, to, interpolation=cv2.INTER_LINEAR)
        monkeypatch.setattr(predictor, 'cv2', None)
        np.testing.assert_array_equal(predictor.resize(image, *to), expected)


@pytest.mark.parametrize('scale', [(333, 176), (200, 150)])
def test_images_are_prepared_as_by_mm(scale: tuple[int, int], tmp_path: Path) -> None:
    """Keeping the aspect ratio, padded and normalized: equal to mm's pipeline and preprocessor."""
    from mmdet.models.data_preprocessors import DetDataPreprocessor
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.registry import DefaultScope

    register_all_modules(init_default_scope=False)
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=scale, keep_ratio=True),
        dict(type='Pad', size_divisor=16, pad_val=dict(img=(114, 114, 114))),
        dict(type='PackDetInputs', meta_keys=('img_shape', 'scale_factor')),
    ]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    settings = {
        'task': 'detection',
        'steps': pipeline_steps(cfg),
        'divisor': 32,
        'normalize': {'mean': mean, 'std': std, 'swap': True},
    }
    preprocessor = DetDataPreprocessor(mean, std, bgr_to_rgb=True, pad_size_divisor=32)
    for number, (width, height) in enumerate(((211, 157), (90, 301), (64, 64))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f'{number}.png'
        Image.fromarray(pixels).save(path)
        with DefaultScope.overwrite_default_scope('mmdet'):
            data = Compose(pipeline)(dict(img_path=str(path), img_id=0))
        meta = data['data_samples'].metainfo
        batch = preprocessor(pseudo_collate([data]))['inputs']
        ready, inside, factors = predictor.prepare(predictor.read_image(path), settings)
        np.testing.assert_array_equal(ready, batch.numpy())
        assert inside == tuple(meta['img_shape'])
        assert factors == pytest.approx(meta['scale_factor'])


def test_images_of_segmentors_are_prepared_as_by_mm(tmp_path: Path) -> None:
    """Both sides rounded up to a multiple after the resize, as in the configs for ADE20K."""
    from mmengine.dataset import Compose
    from mmengine.registry import DefaultScope
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(256, 64), keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
        dict(type='PackSegInputs'),
    ]
    settings = {
        'task': 'segmentation',
        'steps': pipeline_steps(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline)))),
    }
    for number, (width, height) in enumerate(((211, 157), (90, 301))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f'{number}.png'
        Image.fromarray(pixels).save(path)
        with DefaultScope.overwrite_default_scope('mmseg'):
            data = Compose(pipeline)(dict(img_path=str(path), reduce_zero_label=False))
        ready, _, _ = predictor.prepare(predictor.read_image(path), settings)
        np.testing.assert_array_equal(ready[0], data['inputs'].numpy())


def test_steps_that_the_predictor_does_not_know() -> None:
    def steps(*pipeline: dict[str, Any]) -> list[dict[str, Any]]:
        return pipeline_steps(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))))

    assert steps({'type': 'mmdet.LoadImageFromFile'}, {'type': 'Resize', 'scale': 64}) == [
        {'resize': {'scale': [64, 64], 'keep_ratio': False}}
    ]
    with pytest.raises(Unshippable, match='has Albu, which the predictor does not know'):
        steps({'type': 'Albu'})


@pytest.mark.slow
def test_models_and_images_that_it_refuses(shipped: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / 'copy'
    shutil.copytree(shipped['det'], folder)
    model = Model(folder / file(folder, 'hw.onnx').name)
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(PredictError, match='uint8, blue first, or a path'):
            model(image)
    with pytest.raises(PredictError, match='is a setting of OpenVINO'):
        Model(folder, precision='bf16')
    with pytest.raises(PredictError, match='is not there, or not one of'):
        Model(folder / 'other.onnx')
    file(folder, 'hw.onnx').write_bytes(b'changed')
    with pytest.raises(PredictError, match=r'is not the file that model\.json describes'):
        Model(folder)
    described = json.loads((folder / 'model.json').read_text())
    (own,) = [f for f in described['files'] if f['format'] == 'onnx']
    own |= {'sha256': predictor.digest(folder / own['path'])}
    elsewhere = shipped['det'] / own['path']
    for change, words in (
        ({'palette': []}, 'is not complete'),
        ({'classes': None}, 'is not complete'),
        ({'files': [{**own, 'path': os.path.relpath(elsewhere, folder)}]}, 'is not in the folder'),
        ({'files': [3]}, 'is not one of schema 1'),
    ):
        (folder / 'model.json').write_text(json.dumps({**described, 'files': [own], **change}))
        with pytest.raises(PredictError, match=words):
            Model(folder)
    (folder / 'model.json').write_text('{}')
    with pytest.raises(PredictError, match='is not one of schema 1'):
        Model(folder)
    with pytest.raises(PredictError, match='cannot be read'):
        Model(tmp_path)


@pytest.mark.slow
def test_no_image_is_overwritten(
    models: dict[str, Trained],
    shipped: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = []
    for name in 'ab':
        (tmp_path / name).mkdir()
        images.append(tmp_path / name / 'one.jpg')
        shutil.copy(pictures(models['det'])[0], images[-1])
    command = ['--model', str(shipped['det']), *map(str, images)]
    before = images[0].read_bytes()
    assert predictor.main([*command[:3], '--out', str(images[0])]) == 2
    assert 'is one of the images; give another name' in capsys.readouterr().err
    assert images[0].read_bytes() == before
    assert predictor.main([*command[:3], '--out', str(tmp_path / 'a.txt')]) == 2
    assert 'is no name of a picture' in capsys.readouterr().err
    assert predictor.main([*command, '--out', str(tmp_path / 'drawn')]) == 0
    drawn = sorted(path.name for path in (tmp_path / 'drawn').iterdir())
    assert drawn == ['1_one.jpg.png', 'one.jpg.png']
    assert predictor.main([*command[:2], str(tmp_path / 'none.jpg')]) == 1
    assert 'is not an image that can be read' in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_one_size(models: dict[str, Trained], tmp_path: Path) -> None:
    """Images are resized to fit into it; any other size is refused by the file."""
    assert deploy(models['det'], tmp_path, '--dynamic', 'none') == 0
    result = Model(tmp_path)(np.full((100, 30, 3), 90, np.uint8))
    assert result['masks'].shape[1:] == (100, 30)
    with (
        open_artifact(file(tmp_path, '.onnx')) as artifact,
        pytest.raises(ArtifactError, match=r'requires images of shape \(1, 3, 64, 64\)'),
    ):
        artifact.run_named({'image': torch.zeros(1, 3, 96, 64), 'image_size': [[96, 64]]})


@pytest.mark.slow
def test_a_neck_that_requires_multiples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RTMDet adds a feature map to one of twice its stride, doubled: sizes open in steps of 32."""
    config = tmp_path / 'det.py'
    config.write_text(
        f'_base_ = {str(CONFIGS / "rtmdet_repnext_m0_coco.py")!r}\n'
        'model = dict(backbone=dict(init_cfg=None), data_preprocessor=dict(pad_size_divisor=1))\n'
    )
    torch.manual_seed(0)
    model = mm_models.build(Config.fromfile(config)).eval()
    image, size = torch.randn(1, 3, 160, 192), torch.tensor([[160.0, 192.0]])
    published_models.spread(model, lambda: parity._detected(model, image, size))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'det.pth')
    command = [str(config), str(tmp_path / 'det.pth'), '--format', 'onnx,openvino']
    folder = tmp_path / 'out'
    assert deploy_main([*command, '--size', '160x192', '--work-dir', str(folder)]) == 0
    assert json.loads((folder / 'model.json').read_text())['divisor'] == 32
    assert len(Model(folder)(np.full((100, 37, 3), 90, np.uint8))['boxes']) > 10
    for suffix in ('.onnx', '_openvino'):
        with open_artifact(file(folder, suffix), threads=1) as artifact:
            assert artifact.takes((2, 3, 96, 256))
            inputs = {'image': torch.zeros(1, 3, 96, 100), 'image_size': [[96, 100]]}
            with pytest.raises(ArtifactError, match=r'divisible by 32, not \(1, 3, 96, 100\)'):
                artifact.run_named(inputs)
    assert deploy_main([*command, '--size', '100', '--work-dir', str(tmp_path / 'odd')]) == 2
    assert 'stride 32 leaves 4 px; use 96 or 128' in capsys.readouterr().err


@pytest.mark.slow
def test_an_operator_set_without_a_second_stage(
    models: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(models['det'], tmp_path / 'out', '--opset', '22') == 2
    assert 'has no RoiAlign of it; give --opset 21 or lower' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


# --- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize('container', ['state_dict_ema', 'ema_state_dict', 'state_dict'])
def test_weights_of_every_container(
    container: str, models: dict[str, Trained], tmp_path: Path
) -> None:
    """With the prefixes of DDP and torch.compile; the report says which were taken."""
    state = torch.load(models['seg'].checkpoint, weights_only=True)['state_dict']
    path = tmp_path / 'a.pth'
    torch.save({container: {f'module._orig_mod.{k}': v for k, v in state.items()}}, path)
    command = [str(models['seg'].config), str(path), '--size', '64', '--format', 'torchscript']
    assert deploy_main([*command, '--work-dir', str(tmp_path / 'out')]) == 0
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['model']['container'] == container


@pytest.mark.slow
def test_a_fused_checkpoint_and_one_with_nan(
    models: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models['seg']
    assert deploy(model, tmp_path / 'pth', '--format', 'pth') == 0
    fused = file(tmp_path / 'pth', '.pth')
    command = [str(model.config), str(fused), '--size', '64', '--format', 'torchscript']
    assert deploy_main([*command, '--work-dir', str(tmp_path / 'again')]) == 0
    content = torch.load(model.checkpoint, weights_only=True)
    content['state_dict']['decode_head.conv_seg.bias'][0] = torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    command[1] = str(tmp_path / 'nan.pth')
    assert deploy_main([*command, '--work-dir', str(tmp_path / 'nan')]) == 3
    assert 'NaN or infinity in decode_head.conv_seg.bias' in capsys.readouterr().err
    assert not (tmp_path / 'nan').exists()


# --- the page

TEST_PAGE = """<script type="module">
import { Model } from './model.js';
const send = (body) => fetch('/result', { method: 'POST', body: JSON.stringify(body) });
try {
  const model = await Model.open('model.json'), found = [];
  for (const name of NAMES) {
    const blob = await (await fetch(name)).blob();
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const pen = canvas.getContext('2d');
    pen.drawImage(bitmap, 0, 0);
    const result = await model.predict(pen.getImageData(0, 0, bitmap.width, bitmap.height));
    const plain = (array) => array && Array.from(array);
    found.push({ ...result, masks: result.masks?.map(plain), classes: plain(result.classes) });
  }
  send(found);
} catch (error) { send({ error: String(error.stack) }); }
</script>"""


@pytest.fixture(scope='module')
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime for browsers, fetched once; from the registry, or its copy."""
    folder = tmp_path_factory.mktemp('runtime')
    (folder / web_runtime.PAGE).touch()
    try:
        return web_runtime.fetch_runtime(folder)
    except web_runtime.DependencyError as error:
        pytest.skip(f'needs {web_runtime.NAME} of the npm registry: {error}')


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason='needs chromium')
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_the_page_finds_what_the_predictor_finds(
    task: str, models: dict[str, Trained], shipped: dict[str, Path], runtime: Path, tmp_path: Path
) -> None:
    page = tmp_path / 'page'
    shutil.copytree(file(shipped[task], '_web'), page)
    shutil.copytree(runtime, page / 'runtime')
    names = [f'{i}.png' for i in range(3)]
    sources = (pictures(models[task]) * 2)[:3]
    for name, source, size in zip(names, sources, ((64, 64), (131, 97), (90, 140))):
        Image.open(source).convert('RGB').resize(size).save(page / name)
    with browser.serve(page, {'/test': TEST_PAGE.replace('NAMES', json.dumps(names))}) as server:
        results = browser.run(server, '/test')
        assert 'error' not in results, results
        assert not [path for path in server.asked if path.startswith('http')]
    model = Model(file(shipped[task], 'hw.onnx'))
    for name, found in zip(names, results, strict=True):
        wanted = model(page / name)
        if task == 'seg':
            classes = np.array(found['classes']).reshape(wanted['classes'].shape)
            assert (classes != wanted['classes']).mean() <= 1e-3
            continue
        assert found['labels'] == wanted['labels'].tolist()
        np.testing.assert_allclose(found['scores'], wanted['scores'], atol=1e-4)
        np.testing.assert_allclose(found['boxes'], wanted['boxes'], atol=0.01)
        for mask, own in zip(found['masks'], wanted['masks'], strict=True):
            assert (np.array(mask).reshape(own.shape) != own).mean() <= 1e-3

    for width, height in ((1100, 800), (390, 844)):
        picture = tmp_path / f'{width}.png'
        for seconds in (20, 60, 180):  # a busy machine draws it late
            with browser.serve(page) as server:
                url = f'{server.url}/index.html?image={names[1]}'
                browser.screenshot(url, picture, width, height, seconds)
            pixels = np.asarray(Image.open(picture).convert('RGB')).astype(int)
            colored = (pixels.max(2) - pixels.min(2) > 30).any(0)
            if colored.sum() > 0.5 * min(width, 600):
                break
        # The picture is there, and as wide as the page lets it be.
        assert colored.sum() > 0.5 * min(width, 600)


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason='needs chromium')
def test_a_page_without_its_runtime_says_so(shipped: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / 'page'
    shutil.copytree(file(shipped['seg'], '_web'), page)
    script = TEST_PAGE.replace('NAMES', '[]')
    with browser.serve(page, {'/test': script}) as server:
        assert 'repnext-mm deploy runtime' in browser.run(server, '/test')['error']


def test_only_the_pinned_runtime_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a loopback server in the place of the registry."""
    import base64
    import io
    import tarfile

    served = tmp_path / 'registry' / web_runtime.NAME / '-'
    served.mkdir(parents=True)
    archive = served / f'{web_runtime.NAME}-{web_runtime.VERSION}.tgz'
    with tarfile.open(archive, 'w:gz') as package:
        for name in (*web_runtime.FILES, '../../outside'):
            entry = tarfile.TarInfo(f'package/dist/{name}')
            entry.size = 3
            package.addfile(entry, io.BytesIO(b'abc'))
    page = tmp_path / 'page'
    page.mkdir()
    assert deploy_main(['runtime', str(page)]) == 2
    assert 'give a folder that --format web wrote' in capsys.readouterr().err
    (page / web_runtime.PAGE).touch()
    with browser.serve(tmp_path / 'registry') as server:
        monkeypatch.setenv('npm_config_registry', server.url)
        assert deploy_main(['runtime', str(page)]) == 4
        assert 'was damaged or changed, and is not kept' in capsys.readouterr().err
        assert [path.name for path in page.iterdir()] == [web_runtime.PAGE]
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        monkeypatch.setattr(web_runtime, 'INTEGRITY', f'sha512-{digest}')
        assert deploy_main(['runtime', str(page)]) == 0
        asked = len(server.asked)
        assert deploy_main(['runtime', str(page)]) == 0  # offline from now on
        assert len(server.asked) == asked
    names = {path.name for path in (page / 'runtime').iterdir()}
    assert names == {*web_runtime.FILES, 'LICENSE.txt'}
    monkeypatch.setenv('npm_config_registry', 'http://127.0.0.1:9')
    (page / 'runtime' / web_runtime.FILES[0]).unlink()
    assert deploy_main(['runtime', str(page)]) == 4
    assert 'could not be fetched' in capsys.readouterr().err


# --- time and parts


@pytest.mark.slow
def test_time_and_where_it_goes(
    shipped: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'copy'
    shutil.copytree(shipped['det'], folder)
    report = json.loads((folder / 'report.json').read_text())
    kept = [a for a in report['artifacts'] if a['format'] in ('onnx', 'openvino')]
    (folder / 'report.json').write_text(json.dumps({**report, 'artifacts': kept}))
    command = ['bench', str(folder), '--threads', '1', '--rounds', '2', '--budget-s', '2']
    assert deploy_main(command) == 0
    rows = json.loads((folder / 'report.json').read_text())['latency']
    names = {row['name'] for row in rows}
    assert {
        'mm predict, trained',
        'mm predict, fused',
        'onnx fp32',
        'onnx fp32, with pixels',
    } < names
    assert all(row['reference'] == 'mm predict, trained' and row['p50'] > 0 for row in rows)
    capsys.readouterr()
    for path in (file(folder, 'hw.onnx'), file(folder, '_openvino')):
        assert deploy_main(['explain', str(path), '--threads', '1', '--json']) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert {'backbone', 'neck', 'head', 'RoIAlign', 'NMS', 'masks'} <= set(record['parts'])
        assert sum(part['share'] for part in record['parts'].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    'name, part',
    [
        ('backbone::node_conv2d', 'backbone'),
        ('box head::node_linear', 'box head'),
        ('fused head::node_conv2d', 'head'),
        ('image_f32_abcd_bf16_acdb_images::node_where', 'images'),
        ('images::node_where_abcd_acdb_backbone::node_conv2d', 'images'),
        ('VariadicSplit_236453_bf16_f32_RoIAlign::node_roi_align', 'RoIAlign'),
        ('Multiply_85111', ''),
        ('of another tool::node', ''),
    ],
)
def test_the_part_in_the_names_of_runtimes(name: str, part: str) -> None:
    assert _part(name) == part


@pytest.mark.slow
def test_convolutions_that_the_runtime_renames_keep_their_part(
    shipped: dict[str, Path], tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    path = file(shipped['det'], 'hw.onnx')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    exported, computed = (
        onnx.load(each).graph.node for each in (path, options.optimized_model_filepath)
    )
    parts = parts_of(computed, exported)
    counts = Counter(parts[node.name] for node in computed if 'Conv' in node.op_type)
    assert counts == Counter(
        node.name.split('::')[0] for node in exported if 'Conv' in node.op_type
    )
    assert {*counts} == {'backbone', 'neck', 'head', 'masks'}


@pytest.mark.slow
def test_core_ml_takes_an_image_and_knows_the_classes(
    models: dict[str, Trained], tmp_path: Path
) -> None:
    coremltools = pytest.importorskip('coremltools', reason='needs the extra deploy: coremltools')
    assert deploy(models['seg'], tmp_path, '--format', 'coreml') == 0
    (record,) = json.loads((tmp_path / 'report.json').read_text())['artifacts']
    assert (record['status'], record['dynamic'], record['inputs']) == (
        'unverified',
        'none',
        ['image'],
    )
    description = coremltools.utils.load_spec(str(file(tmp_path, '.mlpackage'))).description
    image = description.input[0].type.imageType
    assert (image.width, image.height) == (64, 64)
    assert image.ColorSpace.Name(image.colorSpace) == 'BGR'
    (output,) = description.output
    assert output.name == 'classes'
    assert output.type.multiArrayType.dataType == output.type.multiArrayType.INT32
    shown = description.metadata.userDefined['com.apple.coreml.model.preview.parameters']
    described = json.loads((tmp_path / 'model.json').read_text())
    assert json.loads(shown)['labels'] == described['classes']
    golden = np.load(tmp_path / record['golden'])['image']
    assert (golden == golden.round()).all()
    assert (golden.min(), golden.max()) == (0, 255)


@pytest.mark.slow
def test_int8_of_a_complete_model(
    models: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions alone: what makes boxes stays in float."""
    import onnx

    photos = tmp_path / 'photos'
    photos.mkdir()
    for number, path in enumerate(pictures(models['det']) * 12):
        Image.open(path).rotate(7 * number).save(photos / f'{number}.png')
    options = ('--dtype', 'int8', '--calib', str(photos), '--format', 'onnx')
    assert deploy(models['det'], tmp_path / 'out', *options, '--gate-db', '0.5') == 0
    graph = onnx.load(file(tmp_path / 'out', '.onnx')).graph
    writers = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == 'Conv']
    kernels = [writers.get(node.input[1]) for node in convolutions]
    quantized = [node for node in kernels if node and node.op_type == 'DequantizeLinear']
    assert len(quantized) > 10
    for node in graph.node:
        if node.op_type in ('NonMaxSuppression', 'RoiAlign', 'TopK'):
            # The feature maps of RoiAlign are those of a convolution, in 8 bits.
            names = node.input[1:] if node.op_type == 'RoiAlign' else node.input
            inputs = [writers[name].op_type for name in names if name in writers]
            assert 'DequantizeLinear' not in inputs
    result = Model(tmp_path / 'out')(pictures(models['det'])[0])
    assert np.isfinite(result['boxes']).all()

    # The benchmark's row of the predictor: its precision, and the pixels of the other rows.
    spec = {
        'path': str(file(tmp_path / 'out', '.onnx')),
        'golden': str(file(tmp_path / 'out', '.npz')),
        'threads': 1,
        'precision': None,
        'dtype': 'int8',
    }
    settings = tmp_path / 'out' / 'model.json'
    larger = {'resize': {'scale': [96, 96], 'keep_ratio': False}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), 'steps': [larger]}))
    run, facts = open_predictor(spec)
    assert facts == {'runtime': 'onnxruntime', 'precision': 'int8'}
    assert run()['masks'].shape[1:] == (64, 64)
    with monkeypatch.context() as patch:
        patch.setattr('repnext_mm.runtimes.predictor.resize', None)
        run()

"""Classifiers from config and checkpoint to what ships: files, top-1, predictor, page."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest
import timm
import tool_runs
import torch
from conftest import REPO
from mmengine.config import Config
from PIL import Image
from test_classifiers import drawn
from test_shipped_models import TEST_PAGE, runtime  # noqa: F401  a fixture

from repnext_mm import reparameterize
from repnext_mm.classification import TimmDataset, tested
from repnext_mm.datasets import shapes
from repnext_mm.deploy.cli import deploy_main
from repnext_mm.engine.cli import evaluate_main
from repnext_mm.runtimes import open_artifact
from repnext_mm.runtimes.predictor import Model, PredictError, as_record, draw, prepare

pytest.importorskip('onnxruntime', reason='needs the extra deploy: onnxruntime')
pytest.importorskip('openvino', reason='needs the extra deploy: openvino')

CONFIG = REPO / 'configs' / 'imagenet' / 'repnext_m0_shapes.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'shapes'
    return shapes.generate(root, shapes.Spec(train=6, val=12, size=64))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published scripts write it: without a prefix."""
    path = tmp_path_factory.mktemp('checkpoint') / 'random.pth'
    torch.save({'model': drawn('repnext_m0', num_classes=5).state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def shipped(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('shipped') / 'classifier'
    formats = 'onnx,openvino,pt2,torchscript,web'
    command = [str(CONFIG), str(checkpoint), '--format', formats, '--work-dir', str(folder)]
    assert deploy_main(command) == 0
    return folder


def file(folder: Path, suffix: str) -> Path:
    (found,) = folder.glob(f'*{suffix}')
    return found


def crops(data: Path) -> list[Path]:
    return sorted((data / 'imagenet' / 'val').rglob('*.jpg'))


@pytest.mark.slow
def test_what_is_written(shipped: Path) -> None:
    report = json.loads((shipped / 'report.json').read_text())
    assert report['status'] == 'ok'
    model = report['model']
    assert (model['task'], model['family'], model['arch']) == (
        'classification',
        'RepNeXtClassifier',
        'm0',
    )
    assert model['params'] == 2_008_685 and model['size'] == [64, 64]
    assert {row['output'] for row in report['parity']} == {'logits'}
    assert all(row['passed'] and row['measures']['max_rel'] < 1e-4 for row in report['parity'])
    (plan,) = report['plans']
    assert plan['bn_left'] == 0
    assert [row['output'] for row in plan['proof_float64']] == ['logits']
    assert plan['proof_float64'][0]['max_rel'] < 1e-12
    assert {a['dynamic'] for a in report['artifacts']} == {'batch-hw'}
    described = json.loads((shipped / 'model.json').read_text())
    assert described['classes'] == [*shapes.THINGS]
    assert described['steps'] == [
        {'shorter': {'side': 72, 'filter': 'bicubic'}},
        {'crop': [64, 64]},
    ]
    assert deploy_main(['check', str(shipped), '--trust']) == 0


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['hw.onnx', '_openvino', '.pt2'])
def test_the_top1_of_the_file(
    suffix: str, shipped: Path, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    own = tmp_path / 'run.pth'  # as our runs write it
    state = torch.load(checkpoint, weights_only=True)['model']
    torch.save({'state_dict': {f'network.{k}': v for k, v in state.items()}, 'meta': {}}, own)
    options = ['--cfg-options', f'sample_data_root={data}', f'data_root={data / "imagenet"}']

    def top1(*more: str) -> str:
        arguments = ['repnext_m0_shapes', own, '--work-dir', 'run', *more, *options]
        output = tool_runs.succeed_here(evaluate_main, *arguments, cwd=tmp_path)
        return re.search(r'accuracy/top1: (\S+)', output)[1]

    assert top1('--model', str(file(shipped, suffix))) == top1()


@pytest.mark.slow
@pytest.mark.parametrize('size', [(72, 72), (61, 203), (300, 97), (40, 50)])
def test_images_are_prepared_as_by_timm(size: tuple[int, int], shipped: Path, data: Path) -> None:
    """The predictor's input, normalized as the file does it, is that of timm's transforms."""
    settings = json.loads((shipped / 'model.json').read_text())
    image = Image.open(crops(data)[0]).resize(size)
    array = np.asarray(image)[..., ::-1]
    raw, inside, _ = prepare(array, settings)
    assert inside == (64, 64) and raw.shape == (1, 3, 64, 64)
    cfg = Config.fromfile(CONFIG)
    wanted = timm.data.create_transform(**cfg.val_dataloader.dataset.transform)(image)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = (wanted * std + mean) * 255
    np.testing.assert_allclose(raw[0, ::-1], pixels.numpy(), atol=1e-3)


@pytest.mark.slow
def test_the_predictor_answers_as_pytorch(shipped: Path, checkpoint: Path, data: Path) -> None:
    cfg = Config.fromfile(CONFIG)
    transform = cfg.val_dataloader.dataset.transform
    dataset = TimmDataset(root=str(data / 'imagenet' / 'val'), transform=transform)
    network = timm.create_model('repnext_m0', num_classes=5).eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True)['model'])
    for suffix in ('hw.onnx', '_openvino'):
        model = Model(file(shipped, suffix))
        for i in range(0, len(dataset), 7):
            found = model(dataset.filename(i))['probabilities']
            with torch.no_grad():
                wanted = network(dataset[i]['inputs'][None]).softmax(1)[0]
            np.testing.assert_allclose(found, wanted, atol=1e-4)
    record = as_record({'probabilities': found}, model.settings)['best']
    assert [row['label'] for row in record] == np.argsort(-found).tolist()
    picture = np.zeros((30, 40, 3), np.uint8)
    assert draw(picture, {'probabilities': found}, model.settings, 0.3).shape[0] > 30


def test_a_fixed_size_is_the_tested_one(checkpoint: Path, tmp_path: Path) -> None:
    """A file for more pixels would answer for an image with a margin, which nobody has tested."""
    command = [str(CONFIG), str(checkpoint), '--size', '96', '--dynamic', 'none']
    assert deploy_main([*command, '--work-dir', str(tmp_path / 'x')]) == 0
    with pytest.raises(PredictError, match='does not fit into the file, which requires 96 x 96'):
        Model(tmp_path / 'x')(np.zeros((80, 80, 3), np.uint8))


@pytest.mark.slow
def test_a_network_of_timm_ships_too(tmp_path: Path) -> None:
    """A network that is not ours: exported from its logits on, and compared."""
    config = tmp_path / 'rival.py'
    config.write_text(f"""
_base_ = [{str(CONFIG)!r}]
model = dict(network='test_resnet', num_classes=5)
""")
    torch.save(drawn_rival().state_dict(), tmp_path / 'rival.pth')
    command = [str(config), str(tmp_path / 'rival.pth'), '--work-dir', str(tmp_path / 'out')]
    assert deploy_main(command) == 0
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert report['plans'][0]['bn_left'] < 3, 'those of convolutions are folded'
    assert all(row['passed'] for row in report['parity'])


def drawn_rival() -> torch.nn.Module:
    model = timm.create_model('test_resnet', num_classes=5)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.slow
def test_core_ml_takes_an_image_and_names_the_class(checkpoint: Path, tmp_path: Path) -> None:
    coremltools = pytest.importorskip('coremltools', reason='needs the extra deploy: coremltools')
    command = [
        str(CONFIG),
        str(checkpoint),
        '--format',
        'coreml',
        '--work-dir',
        str(tmp_path / 'm'),
    ]
    assert deploy_main(command) == 0
    spec = coremltools.utils.load_spec(str(file(tmp_path / 'm', '.mlpackage')))
    assert spec.description.input[0].type.WhichOneof('Type') == 'imageType'
    kinds = [output.type.WhichOneof('Type') for output in spec.description.output]
    assert sorted(kinds) == ['dictionaryType', 'stringType']
    text = (tmp_path / 'm' / 'verify_on_mac.py').read_text()
    assert 'MLModelBenchmarker' in text and 'def labels(' in text


@pytest.mark.parametrize(
    'more, said',
    [
        (['--nms', 'host'], '--nms and --output are not for classifiers'),
        (['--plan', 'auto'], '--plan auto is for --scope backbone'),
    ],
)
def test_options_of_other_models_are_refused(
    more: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(CONFIG), str(checkpoint), '--work-dir', str(tmp_path / 'x'), *more]
    assert deploy_main(command) == 2
    assert said in capsys.readouterr().err


def test_a_classifier_needs_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy_main([str(CONFIG)]) == 3
    assert 'is of a classifier; give its checkpoint as well' in capsys.readouterr().err


def test_an_unknown_transform_is_named() -> None:
    cfg = Config.fromfile(CONFIG)
    cfg.test_dataloader.dataset.transform = dict(input_size=64, crop_pct=1.0, crop_mode='border')
    with pytest.raises(
        tested.UnknownTransform, match='ResizeKeepRatio, which the predictor does not'
    ):
        tested.tested_steps(cfg)


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason='needs chromium')
def test_the_page_answers_as_the_predictor(
    shipped: Path,
    data: Path,
    runtime: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    page = tmp_path / 'page'
    shutil.copytree(file(shipped, '_web'), page)
    shutil.copytree(runtime, page / 'runtime')
    names = [f'{i}.png' for i in range(4)]
    for name, source, size in zip(names, crops(data), ((72, 72), (131, 97), (91, 340), (50, 41))):
        Image.open(source).convert('RGB').resize(size).save(page / name)
    with browser.serve(page, {'/test': TEST_PAGE.replace('NAMES', json.dumps(names))}) as server:
        results = browser.run(server, '/test')
    assert 'error' not in results, results
    model = Model(file(shipped, 'hw.onnx'))
    for name, found in zip(names, results, strict=True):
        wanted = model(page / name)['probabilities']
        np.testing.assert_allclose(found['probabilities'], wanted, atol=5e-5)
    with browser.serve(page) as server:
        url = f'{server.url}/index.html?image={names[1]}'
        browser.screenshot(url, tmp_path / 'page.png', 390, 844, 60)
    assert np.asarray(Image.open(tmp_path / 'page.png')).std() > 5


def test_an_artifact_says_what_it_is(shipped: Path) -> None:
    assert importlib.util.find_spec('onnxruntime')
    with open_artifact(file(shipped, 'hw.onnx')) as artifact:
        assert artifact.task == 'classification'
        assert artifact.metadata['num_classes'] == 5
        (logits,) = artifact.run(np.zeros((2, 3, 64, 64), np.float32))
        assert logits.shape == (2, 5)


@pytest.mark.slow
def test_times_beside_the_model_itself(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(CONFIG), str(checkpoint), '--work-dir', str(tmp_path / 'w'), '--bench']
    assert deploy_main([*command, '--rounds', '2', '--budget-s', '5']) == 0
    output = capsys.readouterr().out
    assert 'mm predict, fused' in output and 'onnx fp32, with pixels' in output


@pytest.mark.slow
def test_fused_weights_with_a_config(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """As of a detector: the test tool reads both."""
    command = [str(CONFIG), str(checkpoint), '--format', 'pth', '--work-dir', str(tmp_path / 'w')]
    assert deploy_main(command) == 0
    weights, config = file(tmp_path / 'w', '.pth'), file(tmp_path / 'w', '.py')
    options = ['--cfg-options', f'sample_data_root={data}', f'data_root={data / "imagenet"}']
    fused = tool_runs.succeed_here(evaluate_main, config, weights, *options, cwd=tmp_path)
    own = tmp_path / 'run.pth'
    state = torch.load(checkpoint, weights_only=True)['model']
    torch.save({'state_dict': {f'network.{k}': v for k, v in state.items()}, 'meta': {}}, own)
    plain = tool_runs.succeed_here(evaluate_main, CONFIG, own, *options, cwd=tmp_path)
    found = [re.search(r'accuracy/top1: (\S+)', text)[1] for text in (fused, plain)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_published_fused_archive_deploys(checkpoint: Path, tmp_path: Path) -> None:
    from weight_files import Tree

    model = timm.create_model('repnext_m0', num_classes=5).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)['model'])
    fused = reparameterize(model, 'upstream')
    archive = tmp_path / 'repnext_m0_fused.pt'
    torch.jit.script(Tree.of({k: v.clone() for k, v in fused.state_dict().items()})).save(archive)
    assert deploy_main([str(CONFIG), str(archive), '--work-dir', str(tmp_path / 'w')]) == 0
    session = open_artifact(file(tmp_path / 'w', '.onnx'))
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 64)).round().astype(np.float32)
    (logits,) = session.run(image)
    own = session.metadata['preprocess']
    mean, std = (np.array(own[key]).reshape(3, 1, 1) for key in ('mean', 'std'))
    ready = torch.from_numpy(((image[:, ::-1] - mean) / std).astype(np.float32))
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(ready).numpy(), atol=1e-3)
    session.close()

"""int8: calibration on real images, the gates, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import exports
import numpy as np
import onnx
import openvino
import pytest
import tool_runs
import torch
from evaluations import backbone_of, trained
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from networks import tiny
from PIL import Image
from tool_runs import run_here

from repnext_mm import reparameterize
from repnext_mm.backbones import PyramidBackbone
from repnext_mm.deploy import calibration
from repnext_mm.deploy import quantize as quantizing
from repnext_mm.deploy.calibration import calibration_images
from repnext_mm.deploy.errors import ParityError, UsageError
from repnext_mm.deploy.quantize import HELD_OUT, QuantizationReport, TaskMetric, quantize
from repnext_mm.deploy.source import load_source
from repnext_mm.engine.cli import evaluate_main
from repnext_mm.reparam import equalize
from repnext_mm.runtimes import open_artifact

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def _cpu_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 7 bits, which every CPU computes with as it should."""
    monkeypatch.setattr(quantizing, 'isa_flags', list)


#: Multiplied onto one channel, and divided out again by the layer after it.
OUTLIER = 1e4
BROKEN = 'stages.2.blocks.0.channel_mixer.0'
FILES = {'onnx': 'net.onnx', 'openvino': 'net_openvino'}
runtimes = pytest.mark.parametrize('runtime', FILES)


def fused() -> PyramidBackbone:
    return reparameterize(tiny('repnext_m').eval(), 'full')


def with_outlier() -> PyramidBackbone:
    """The same function, with one channel far out of the others' range between two layers."""
    model = fused()
    mixer, channels = model.get_submodule('stages.2.blocks.0.token_mixer'), model.channels[2]
    with torch.no_grad():
        mixer.conv_s.weight[0] *= OUTLIER
        mixer.conv_s.bias[0] *= OUTLIER
        model.get_submodule(BROKEN).weight[:, channels // 4] /= OUTLIER
    return model


def export(model: PyramidBackbone, runtime: str, folder: Path, **more: Any) -> Path:
    metadata = {'family': 'RepNeXt', 'dtype': 'fp32', 'out_indices': [0, 1, 2, 3], **more}
    exports.write(exports.job(model, SIZE, metadata), folder / FILES[runtime])
    return folder / FILES[runtime]


@pytest.fixture(scope='module')
def photos(data_root: Path) -> Sequence[np.ndarray]:
    return calibration_images(data_root / 'coco', SIZE, limit=calibration.MIN_IMAGES)[:]


@pytest.fixture(scope='module')
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(runtime: str) -> Path:
        if runtime not in made:
            made[runtime] = export(fused(), runtime, tmp_path_factory.mktemp(runtime))
        return made[runtime]

    return get


def int8_weights(path: Path) -> int:
    """Number of convolutions' weights that the file holds in int8."""
    if path.suffix == '.onnx':
        return sum(
            i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4
            for i in onnx.load(path).graph.initializer
        )
    operations = openvino.Core().read_model(path / 'model.xml').get_ops()
    return sum(
        op.get_type_name() == 'Constant'
        and op.get_element_type() == openvino.Type.i8
        and len(op.shape) >= 4
        and np.prod(op.shape) > 1
        for op in operations
    )


def sqnr(actual: Path, expected: Path, images: Sequence[np.ndarray]) -> list[float]:
    with open_artifact(actual) as a, open_artifact(expected) as e:
        pairs = [list(zip(a.run(image), e.run(image))) for image in images]
    levels = []
    for stage in zip(*pairs):
        noise = sum(((x - y) ** 2).sum() for x, y in stage)
        levels.append(float(10 * np.log10(sum((y**2).sum() for _, y in stage) / noise)))
    return levels


# --- what is written


@runtimes
def test_all_layers_in_int8(
    runtime: str, artifact: Any, photos: Sequence[np.ndarray], tmp_path: Path
) -> None:
    source, out = artifact(runtime), tmp_path / f'int8{artifact(runtime).suffix}'
    lines: list[str] = []
    report = quantize(source, out, photos, say=lines.append)
    assert report.kept_float == []
    assert len(report.quantized) == int8_weights(out) > 10
    measured = sqnr(out, source, photos[:HELD_OUT])
    assert [*report.stages_db.values()] == pytest.approx(measured, abs=0.01)
    assert [*report.stages_db] == ['stage0', 'stage1', 'stage2', 'stage3']
    assert 20 <= min(measured) < max(measured) < 60  # int8, not float
    assert any('8 images; 128' in line for line in lines if line.startswith('warning'))
    with open_artifact(out) as opened:
        assert opened.metadata['dtype'] == opened.precision == 'int8'
        assert opened.metadata['family'] == 'RepNeXt'
        assert opened.metadata['quantization']['stages_db'] == report.stages_db
    assert [*tmp_path.iterdir()] == [out]
    json.dumps(report.as_record())


@runtimes
def test_one_broken_layer_stays_in_float(
    runtime: str, photos: Sequence[np.ndarray], tmp_path: Path
) -> None:
    source = export(with_outlier(), runtime, tmp_path)
    out = tmp_path / f'int8{source.suffix}'
    report = quantize(source, out, photos)
    assert report.equalized == 0
    assert len(report.kept_float) == 1
    assert next(iter(report.damage_db)) == report.kept_float[0]
    # The name tells the module in ONNX; OpenVINO numbers the convolutions.
    assert report.kept_float == ([BROKEN] if runtime == 'onnx' else [numbered(BROKEN)])
    assert min(sqnr(out, source, photos[:HELD_OUT])) >= report.gate_db
    assert int8_weights(out) == len(report.quantized)
    assert report.kept_float[0] in str(report)

    model = with_outlier()
    names = equalize(model, [torch.from_numpy(image) for image in photos[:4]])
    equal = tmp_path / 'equal'
    equal.mkdir()
    source = export(model, runtime, equal, equalized=len(names))
    mended = quantize(source, tmp_path / f'mended{source.suffix}', photos)
    assert mended.kept_float == []
    assert mended.equalized == len(names) > 4
    assert min(mended.stages_db.values()) > 25


def numbered(layer: str) -> str:
    convolutions = [n for n, m in fused().named_modules() if isinstance(m, torch.nn.Conv2d)]
    return f'convolution_{convolutions.index(layer)}'


def test_percentile_and_entropy_find_other_ranges(
    artifact: Any, photos: Sequence[np.ndarray], tmp_path: Path
) -> None:
    reports = [
        quantize(artifact('onnx'), tmp_path / f'{name}.onnx', photos, calibrator=name, gate_db=10)
        for name in ('minmax', 'percentile', 'entropy')
    ]
    assert len({round(r.stages_db['stage3'], 3) for r in reports}) == 3


@pytest.mark.parametrize(
    'flags, option, largest',
    [([], None, 64), (['avx_vnni'], None, 127), (['asimddp'], True, 64), ([], False, 127)],
)
def test_weights_have_seven_bits_where_eight_would_overflow(
    flags: list[str],
    option: bool | None,
    largest: int,
    artifact: Any,
    photos: Sequence[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only written: what 8 bits compute depends on the CPU."""
    monkeypatch.setattr(quantizing, 'isa_flags', lambda: flags)
    out = tmp_path / 'a.onnx'
    quantize(artifact('onnx'), out, photos, reduce_range=option, gate_db=-100)
    weights = [
        np.abs(onnx.numpy_helper.to_array(i).astype(int)).max()
        for i in onnx.load(out).graph.initializer
        if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4
    ]
    assert max(weights) in (largest, largest - 1)


class LayerCount:
    """Falls by one with every layer in int8."""

    max_drop = 9.0

    def __call__(self, path: Path) -> tuple[str, float]:
        return 'layers', 100.0 - int8_weights(path)


def test_the_metric_keeps_layers_in_float(
    artifact: Any, photos: Sequence[np.ndarray], tmp_path: Path
) -> None:
    report = quantize(artifact('onnx'), tmp_path / 'a.onnx', photos, metric=LayerCount())
    total = len(report.quantized) + len(report.kept_float)
    assert report.metric == {'name': 'layers', 'fp32': 100, 'max_drop': 9, 'int8': 91}
    assert len(report.quantized) == 9 < total
    assert [*report.damage_db][: total - 9] == report.kept_float
    damage = [*report.damage_db.values()]
    assert damage == sorted(damage)


def test_no_go(artifact: Any, photos: Sequence[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r'does not pass its gate with \d+ of \d+ layers in flo'):
        quantize(artifact('onnx'), tmp_path / 'out', photos, gate_db=90)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_task_metric_is_that_of_the_evaluation(
    photos: Sequence[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tool_runs.tiny_shapes(tmp_path / 'shapes')
    model = trained('seg', tmp_path / 'seg', tool_runs.options('seg', data))
    options = (*model.options, *model.truth)
    metric = TaskMetric(str(model.config), str(model.checkpoint), options=options, max_drop=100)
    exported = export(reparameterize(backbone_of(model).eval(), 'full'), 'onnx', tmp_path)
    # Without a process for each evaluation.
    here = SimpleNamespace(
        run=lambda command, **_: run_here(evaluate_main, *command[3:], cwd=Path.cwd())
    )
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, 'subprocess', here)
        report = quantize(exported, tmp_path / 'a.onnx', photos, metric=metric)
    assert report.metric is not None
    assert report.metric['name'] == 'mIoU'
    assert report.metric['fp32'] > 90
    assert 0 < report.metric['int8'] < report.metric['fp32']
    with pytest.raises(UsageError, match='does not measure mAP; it measures aAcc, mIoU'):
        TaskMetric(str(model.config), str(model.checkpoint), 'mAP', options=options)(exported)


# --- images


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_config_images_are_what_its_model_sees(task: str, tmp_path: Path) -> None:
    data = tool_runs.tiny_shapes(tmp_path / 'shapes', train=16)
    moved = dict(pair.split('=') for pair in tool_runs.options(task, data)[1:])
    images = calibration_images(tool_runs.CONFIGS[task], SIZE, options=moved, limit=None)
    assert isinstance(images, calibration.DatasetImages)

    cfg = Config.fromfile(tool_runs.CONFIGS[task])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        preprocessor = MODELS.build(cfg.model.data_preprocessor)
        expected = [
            preprocessor(pseudo_collate([images.dataset[i]]), training=False)['inputs'].numpy()
            for i in images.order
        ]
    assert len(images) == len(expected) >= 15
    for image, wanted in zip(images, expected, strict=True):
        np.testing.assert_allclose(image, wanted, rtol=1e-5, atol=1e-5)
    assert 'train' in str(images.dataset.data_prefix)  # not what AP and mIoU are measured on


def test_folder_images_are_the_same_each_time(tmp_path: Path, data_root: Path) -> None:
    first, second = (calibration_images(data_root / 'coco', (48, 80), limit=20) for _ in range(2))
    assert len(first) == 20
    assert first[3].shape == (1, 3, 48, 80)
    np.testing.assert_array_equal(first[3], second[3])
    assert abs(np.mean(first[:])) < 1  # normalised

    red = np.zeros((30, 50, 3), np.uint8)
    red[..., 0] = 255
    for i in range(calibration.MIN_IMAGES):
        Image.fromarray(red).save(tmp_path / f'{i}.png')
    mean, std = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    image = calibration_images(tmp_path, (20, 20))[0]
    np.testing.assert_allclose(image[0, :, 7, 7], (np.array([255, 0, 0]) - mean) / std, rtol=1e-5)
    raw = calibration_images(tmp_path, (20, 20), calibration.RAW)[0]
    np.testing.assert_allclose(raw[0, :, 7, 7], [0, 0, 255], atol=1e-4)  # BGR, as mm loads it


KINDS: dict[str, Callable[[Image.Image, Path], None]] = {
    'grey16.png': lambda image, path: image.convert('L').convert('I;16').save(path),
    'color16.png': lambda image, path: cv2.imwrite(str(path), np.asarray(image).astype('u2') * 257),
    'alpha.png': lambda image, path: image.convert('RGBA').save(path),
    'cmyk.jpg': lambda image, path: image.convert('CMYK').save(path),
    'turned.jpg': lambda image, path: image.save(path, exif=turned()),
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loader', [None, dict(imdecode_backend='pillow')])
def test_folder_images_are_read_as_mm_reads(kind: str, loader: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for i in range(calibration.MIN_IMAGES):
        KINDS[kind](Image.fromarray(pixels), tmp_path / f'{i}_{kind}')
    path = str(tmp_path / f'0_{kind}')
    wanted = LoadImageFromFile(**(loader or {})).transform({'img_path': path})['img']
    images = calibration_images(tmp_path, wanted.shape[:2], calibration.RAW, loader=loader)
    np.testing.assert_array_equal(images[0][0], wanted.transpose(2, 0, 1))


def test_what_a_folder_image_is_loaded_as(tmp_path: Path) -> None:
    for i in range(calibration.MIN_IMAGES):
        Image.new('RGBA', (40, 60)).save(tmp_path / f'{i}.png')
    images = calibration_images(tmp_path, SIZE, loader=dict(color_type='unchanged'))
    with pytest.raises(UsageError, match=r'\(60, 40, 4\).*unchanged'):
        _ = images[0]


def test_config_says_how_images_are_loaded(tmp_path: Path) -> None:
    config = tmp_path / 'own.py'
    step = "dict(type='LoadImageFromFile', color_type='unchanged')"
    config.write_text(
        f'_base_ = [{str(tool_runs.CONFIGS["seg"])!r}]\n'
        f'test_dataloader = dict(dataset=dict(pipeline=[{step}]))\n'
    )
    assert load_source(str(config)).loader == eval(step)


def test_left_out_and_dark_images_are_said(artifact: Any, tmp_path: Path) -> None:
    for i in range(calibration.MIN_IMAGES):
        pixels = np.random.default_rng(i).integers(0, 4096, (4, 4), dtype=np.uint16)
        pixels[0] = 4095
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.kron(pixels, np.ones((16, 16), np.uint16)))
    for i in range(3):
        (tmp_path / f'{i}.heic').touch()
    said: list[str] = []
    images = calibration_images(tmp_path, SIZE)
    with pytest.raises(UsageError, match='keep_float'):
        quantize(
            artifact('onnx'), tmp_path / 'a.onnx', images, keep_float=['none'], say=said.append
        )
    left_out, dark = images.warnings()
    assert re.search(r'\b3 of 19 files\b.*\.heic \(3\)', left_out)
    assert re.search(r'\b16 bits\b.* 4095 of 65535', dark)
    assert {f'warning: {left_out}', f'warning: {dark}'} <= {*said}
    assert not calibration_images(tmp_path, SIZE, loader=dict(color_type='unchanged')).warnings()[
        1:
    ]

    for i in range(1, calibration.MIN_IMAGES):
        (tmp_path / f'{i}.png').rename(tmp_path / f'{i}.raw')
    with pytest.raises(UsageError, match=r'has 1 images .*\.raw \(15\)'):
        calibration_images(tmp_path, SIZE)


# --- what is refused


@pytest.mark.parametrize('source', ['random', 'no/such/folder'])
def test_calibration_needs_images(source: str) -> None:
    with pytest.raises(UsageError, match='neither a folder of images nor a config'):
        calibration_images(source, SIZE)


def test_folder_with_few_or_broken_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='has 0 images for calibration; give at least 16'):
        calibration_images(tmp_path, SIZE)
    for i in range(20):
        (tmp_path / f'{i}.jpg').write_bytes(b'no image')
    with pytest.raises(UsageError, match=r'\d+\.jpg cannot be decoded'):
        _ = calibration_images(tmp_path, SIZE)[0]


def noise(count: int) -> list[np.ndarray]:
    return [*np.random.default_rng(0).standard_normal((count, 1, 3, *SIZE)).astype(np.float32)]


@pytest.mark.parametrize(
    'images, options, message',
    [
        (noise(20), {}, 'are noise or blank .* random calibration data is refused'),
        ([np.ones((1, 3, *SIZE), np.float32)] * 20, {}, 'are noise or blank'),
        (noise(15), {}, 'has 15 images for calibration; give at least 16'),
        (None, dict(calibrator='mean'), "'mean' is not one of minmax, percentile, entropy"),
        (None, dict(keep_float=['stem']), 'keep_float names stem, not among the layers'),
    ],
)
def test_refused(
    images: Any, options: Any, message: str, artifact: Any, photos: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(artifact('onnx'), tmp_path / 'a.onnx', images or photos, **options)
    assert not [*tmp_path.iterdir()]


def test_formats_without_int8(artifact: Any, photos: Any, tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    meta = {'family': 'RepNeXt', 'arch': 'm0', 'plan': 'full', 'out_indices': [0, 1, 2, 3]}
    model = reparameterize(build_m0(), 'full')
    torch.save({'state_dict': model.state_dict(), 'meta': {'repnext_mm': json.dumps(meta)}}, path)
    with pytest.raises(UsageError, match='int8 is for ONNX and OpenVINO'):
        quantize(path, tmp_path / 'b.pth', photos)
    with pytest.raises(UsageError, match="calibrator='entropy' is ONNX Runtime's"):
        quantize(artifact('openvino'), tmp_path / 'b', photos, calibrator='entropy')


def build_m0() -> PyramidBackbone:
    from repnext_mm import RepNeXt

    return RepNeXt('m0').eval()


def test_report_in_one_line() -> None:
    report = QuantizationReport('a', 'b', 'onnxruntime', 'minmax', 8, 8, True, 20.0)
    report.stages_db = {'stage0': 31.24}
    report.quantized = ['x', 'y']
    assert str(report) == '2 layers in int8; SQNR in dB: stage0 31.2 (gate 20)'

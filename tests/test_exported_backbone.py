"""Exported backbones inside mm's models: equal figures, every size and batch, every refusal."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import tool_runs
import torch
from conftest import REPO
from evaluations import NETWORK, ONE_POINT, Trained, backbone_of, boxes_of, trained
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from networks import tiny
from PIL import Image
from torch import nn

from repnext_mm import ExportedBackbone, reparameterize
from repnext_mm.engine.exported_backbone import padding_line
from repnext_mm.runtimes import METADATA_KEY, ArtifactError

onnx = pytest.importorskip('onnx', reason='needs onnx, from the extra onnx')
pytest.importorskip('onnxruntime', reason='needs onnxruntime, from the extra onnx')
pytest.importorskip('openvino', reason='needs openvino, from the extra openvino')


def export(
    path: Path, backbone: nn.Module | None = None, size: tuple[int, int] = (64, 64), **options: Any
) -> Path:
    """Export a small network as the tool does; `.onnx`, or an OpenVINO folder."""
    backbone = (backbone or tiny(NETWORK)).eval()
    metadata = dict(
        family='RepNeXt',
        plan='full',
        size=size,
        batch=options.get('batch', 1),
        weights='checkpoint',
    ) | options.pop('metadata', {})
    metadata['dynamic'] = options.get('dynamic', 'none')
    suffix = '' if path.suffix == '.onnx' else '_openvino'
    written = path.with_name(path.name.removesuffix('_openvino') + suffix)
    exports.write(exports.job(reparameterize(backbone), size, metadata, **options), written)
    written.rename(path)
    return path


def set_metadata(content: Any, **entries: Any) -> None:
    """Change what the exporter wrote into an ONNX model."""
    (prop,) = (p for p in content.metadata_props if p.key == METADATA_KEY)
    prop.value = json.dumps(json.loads(prop.value) | entries)


# --- the figures of an evaluation


#: Files and their runtimes, which do not know whose backbone they are.
ARTIFACTS = {
    'det': {'any.onnx': 'onnxruntime', 'any_openvino': 'openvino'},
    'seg': {'any.onnx': 'onnxruntime'},
}


@pytest.fixture(scope='module')
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A detector and a segmentor, with their backbones exported beside their checkpoints."""
    root = tmp_path_factory.mktemp('models')
    data = tool_runs.tiny_shapes(root / 'shapes', val=3)
    made = {
        task: trained(task, root / task, tool_runs.options(task, data)) for task in ('det', 'seg')
    }
    for model in made.values():
        digest = hashlib.sha256(model.checkpoint.read_bytes()).hexdigest()
        metadata = {'checkpoint_sha256': digest}
        folder = model.checkpoint.parent
        backbone = backbone_of(model)
        for name in ARTIFACTS[model.task]:
            export(folder / name, backbone, dynamic='hw', metadata=metadata)
    return made


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_the_same_figures_as_in_pytorch(task: str, models: dict[str, Trained]) -> None:
    model = models[task]
    folder = model.checkpoint.parent
    expected = model.evaluate().metric
    assert expected > 90 * ONE_POINT[task]
    for name, runtime in ARTIFACTS[task].items():
        shipped = model.evaluate('--backbone', folder / name)
        assert abs(shipped.metric - expected) < 0.1 * ONE_POINT[task]
        assert f'(1, 3, ?, ?), {runtime} in f32.' in shipped.out
        assert 'warning' not in shipped.out
        assert 'unexpected key' not in shipped.out + shipped.err
        command = shlex.split(shipped.out.splitlines()[-1].split('next: ')[1])
        assert str(folder / name) in Path(command[2]).read_text()


@pytest.mark.slow
def test_a_run_with_averaged_weights(models: dict[str, Trained], tmp_path: Path) -> None:
    """EMAHook copies the model, which a session of a runtime cannot be copied with."""
    model = models['seg']
    config = tmp_path / 'ema.py'
    config.write_text(
        f'_base_ = {str(model.config)!r}\n'
        "custom_hooks = [dict(type='EMAHook', update_buffers=True, priority=49)]\n"
    )
    expected = model.evaluate(config=config).metric
    shipped = model.evaluate('--backbone', model.checkpoint.parent / 'any.onnx', config=config)
    assert abs(shipped.metric - expected) < 0.1 * ONE_POINT['seg']


EMA = dict(type='EMAHook', ema_type='ExponentialMovingAverage', update_buffers=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['any.onnx', 'any_openvino'])
@pytest.mark.parametrize(
    'hook',
    [EMA, EMA | dict(ema_type='mmdet.ExpMomentumEMA', momentum=0.0002, strict_load=True)],
    ids=['mmengine', 'mmdet'],
)
def test_with_averaged_weights(
    hook: dict, name: str, models: dict[str, Trained], tmp_path: Path
) -> None:
    """EMAHook copies the model, and swaps its weights with the copy's for the test."""
    model = models['det']
    config = tmp_path / 'ema.py'
    config.write_text(f'_base_ = {str(model.config)!r}\ncustom_hooks = [{hook!r}]\n')
    shipped = model.evaluate('--backbone', model.checkpoint.parent / name, config=config)
    assert shipped.metric == pytest.approx(1.0, abs=0.001)
    assert 'unexpected key' not in shipped.out + shipped.err


@pytest.mark.slow
def test_the_tool_says_what_it_padded(models: dict[str, Trained], tmp_path: Path) -> None:
    model = models['det']
    sizes = [(64, 64), (96, 96)]
    files = [export(tmp_path / f'{size[0]}.onnx', backbone_of(model), size=size) for size in sizes]
    padded = model.evaluate('--backbone', files[1])
    lines = [line for line in padded.out.splitlines() if '3 of 3 images' in line]
    assert len(lines) == 1
    assert f'3 to (96, 96) by {files[1]}' in lines[0]
    assert padded.metric < 1.0
    exact = model.evaluate('--backbone', *files)
    assert exact.metric == pytest.approx(1.0, abs=0.001)
    assert 'padded' not in exact.out


@pytest.mark.slow
def test_other_weights_give_other_figures(models: dict[str, Trained], tmp_path: Path) -> None:
    """That the figures above are those of the file; and a file from elsewhere is pointed out."""
    model = models['det']
    content = onnx.load(model.checkpoint.parent / 'any.onnx')
    for tensor in content.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value[::-1].copy(), tensor.name))
    set_metadata(content, checkpoint_sha256='0' * 64)
    path = tmp_path / 'other.onnx'
    onnx.save(content, path)
    evaluation = model.evaluate('--backbone', path)
    assert evaluation.metric < 0.5
    assert f'warning: {path} was exported from another checkpoint than' in evaluation.out


COCO = [
    'test_dataloader.dataset.indices=2',
    'test_dataloader.dataset.pipeline.1.scale=(160,96)',
    # 80 classes x each proposal go through NMS when no score is too low.
    'model.test_cfg.rpn.nms_pre=50',
    'model.test_cfg.rpn.max_per_img=30',
    'model.test_cfg.rcnn.max_per_img=10',
]
ADE20K = [
    'test_dataloader.dataset.indices=2',
    'test_dataloader.dataset.pipeline.1.scale=(256,64)',
]


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, config, folder, settings',
    [
        ('det', 'mask_rcnn_repnext_m0_coco.py', 'coco', COCO),
        ('seg', 'semantic_fpn_repnext_m0_ade20k.py', 'ade/ADEChallengeData2016', ADE20K),
    ],
)
def test_the_same_figures_on_real_images(
    task: str, config: str, folder: str, settings: list[str], data_root: Path, tmp_path: Path
) -> None:
    """They come in many sizes."""
    options = ['--cfg-options', f'data_root={data_root / folder}', *settings]
    model = trained(task, tmp_path / task, options, REPO / 'configs' / config)
    shipped = export(tmp_path / 'any.onnx', backbone_of(model), dynamic='hw')
    expected = model.evaluate().metric
    assert expected > 90 * ONE_POINT[task]
    found = model.evaluate('--backbone', shipped).metric
    assert abs(found - expected) < 0.1 * ONE_POINT[task]


# --- inside of a model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def features(backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(backbone.eval()(x))


def assert_close(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def fixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network for several fixed sizes, for two images at once, and in two formats."""
    folder = tmp_path_factory.mktemp('fixed')
    return {
        'small': export(folder / 'small.onnx'),
        'wide': export(folder / 'wide.onnx', size=(64, 128)),
        'pair': export(folder / 'pair_openvino', batch=2),
    }


def test_registered_like_any_backbone(fixed: dict[str, Path]) -> None:
    for kind in ('ExportedBackbone', 'repnext_mm.ExportedBackbone'):
        backbone = MODELS.build(dict(type=kind, artifact=str(fixed['small'])))
        assert isinstance(backbone, ExportedBackbone)
        assert backbone.out_channels == (8, 16, 32, 64)
        assert backbone.out_strides == (4, 8, 16, 32)
    assert str(fixed['small']) in repr(backbone)


@pytest.mark.parametrize('name', ['small', 'pair'])
@pytest.mark.parametrize('number', [1, 3])
def test_any_number_of_images(fixed: dict[str, Path], name: str, number: int) -> None:
    x = images(number, 3, 64, 64)
    found = ExportedBackbone(str(fixed[name]))(x)
    assert_close(found, features(tiny(NETWORK), x))
    half = ExportedBackbone(str(fixed[name]))(x.half())
    assert {stage.dtype for stage in half} == {torch.float16}


def test_the_smallest_size_that_fits(fixed: dict[str, Path]) -> None:
    backbone = ExportedBackbone([str(fixed['wide']), str(fixed['small'])])
    network = tiny(NETWORK)
    for size, bucket in (
        ((64, 64), (64, 64)),
        ((64, 128), (64, 128)),
        ((50, 40), (64, 64)),
        ((33, 70), (64, 128)),
    ):
        x = images(1, 3, *size)
        padded = torch.zeros(1, 3, *bucket)
        padded[:, :, : size[0], : size[1]] = x
        cropped = [
            stage[:, :, : -(-size[0] // stride), : -(-size[1] // stride)]
            for stage, stride in zip(features(network, padded), network.strides)
        ]
        assert_close(backbone(x), cropped)
        assert [s.shape for s in backbone(x)] == [s.shape for s in features(network, x)]
    with pytest.raises(
        ArtifactError,
        match=r'128 x 64 pixels fits into no artifact \(.*wide\.onnx \(64, 128\), .*--dynamic hw',
    ):
        backbone(images(1, 3, 128, 64))


def test_padded_images_are_counted(fixed: dict[str, Path]) -> None:
    model = nn.Module()
    model.backbone = ExportedBackbone([str(fixed['wide']), str(fixed['small'])])
    model.backbone(images(2, 3, 64, 64))
    model.backbone(images(1, 3, 64, 128))
    assert padding_line(model) is None
    copied = copy.deepcopy(model)
    for number, height, width in ((1, 33, 70), (3, 50, 64), (1, 64, 100)):
        copied.backbone(images(number, 3, height, width))
    line = padding_line(model)
    assert line
    assert '5 of 8 images' in line
    assert f'2 to (64, 128) by {fixed["wide"]}' in line
    assert f'3 to (64, 64) by {fixed["small"]}' in line
    assert len(line.splitlines()) == 1
    assert padding_line(nn.Module()) is None


@pytest.mark.parametrize('names', [['small'], ['pair'], ['wide', 'small']])
def test_copies_share_the_open_files(fixed: dict[str, Path], names: list[str]) -> None:
    backbone = ExportedBackbone([str(fixed[name]) for name in names])
    copied = copy.deepcopy(nn.Sequential(backbone))[0]
    assert copied is not backbone
    assert all(a is b for a, b in zip(copied.artifacts, backbone.artifacts, strict=True))
    x = images(1, 3, 64, 64)
    assert_close(copied(x), features(tiny(NETWORK), x))
    assert_close(backbone(x), features(tiny(NETWORK), x))


def test_it_is_not_trained(fixed: dict[str, Path]) -> None:
    backbone = ExportedBackbone(str(fixed['small']))
    assert not list(backbone.parameters())
    with pytest.raises(ArtifactError, match=r'small\.onnx is an exported file, which cannot be tr'):
        backbone.train()(images(1, 3, 64, 64))


def test_a_checkpoint_of_the_network_is_loaded_without_complaint(
    fixed: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    model = nn.Module()
    model.backbone, model.neck = tiny(NETWORK), nn.Conv2d(8, 8, 1)
    state = model.state_dict()
    model.backbone, model.neck = ExportedBackbone(str(fixed['small'])), nn.Conv2d(8, 8, 1)
    load_state_dict(model, state, strict=True)
    torch.testing.assert_close(model.neck.weight, state['neck.weight'])
    del state['neck.weight']
    with pytest.raises(RuntimeError, match=r'missing keys in source state_dict: neck\.weight'):
        load_state_dict(model, state, strict=True)


# --- what is refused, before the first image


#: A node that makes one feature map of stride 4.
POOLING = [('AveragePool', ['image'], ['out'], dict(kernel_shape=[4, 4], strides=[4, 4]))]


def save_onnx(path: Path, nodes: list, outputs: list[str], initializers: dict[str, Any]) -> Path:
    """A model of any nodes on an `image`."""
    values = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, out, **more) for kind, inputs, out, more in nodes],
        'g',
        [values('image', 1, (1, 3, 'h', 'w'))],
        [values(name, 1, None) for name in outputs],
        initializer=[
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in initializers.items()
        ],
    )
    opset = [onnx.helper.make_opsetid('', 18)]
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )
    return path


def test_outputs_that_are_no_feature_maps(tmp_path: Path) -> None:
    path = tmp_path / 'm.onnx'
    flat = [('ReduceMean', ['image'], ['out'], dict(keepdims=0))]
    save_onnx(path, flat, ['out'], {})
    with pytest.raises(ArtifactError, match=r'returns out of shape \(\) .*no feature map'):
        ExportedBackbone(str(path))
    nan = [('Mul', ['image', 'nan'], ['out'], {})]
    save_onnx(path, nan, ['out'], {'nan': np.float32('nan')})
    with pytest.raises(ArtifactError, match='returns NaN or infinity in out'):
        ExportedBackbone(str(path))
    odd = [('AveragePool', ['image'], ['out'], dict(kernel_shape=[3, 3]))]
    save_onnx(path, odd, ['out'], {})
    with pytest.raises(ArtifactError, match=r'\(1, 3, 126, 126\) .*which no stride explains'):
        ExportedBackbone(str(path))


def test_files_of_different_networks(fixed: dict[str, Path], tmp_path: Path) -> None:
    other = save_onnx(tmp_path / 'other.onnx', POOLING, ['out'], {})
    with pytest.raises(ArtifactError, match=r'returns 3 channels at strides 4, .*of one network'):
        ExportedBackbone([str(fixed['small']), str(other)])


def test_images_that_would_be_normalised_twice(fixed: dict[str, Path], tmp_path: Path) -> None:
    content = onnx.load(fixed['small'])
    set_metadata(content, preprocess={'mean': [0, 0, 0]})
    path = tmp_path / 'raw.onnx'
    onnx.save(content, path)
    with pytest.raises(ArtifactError, match='normalises its images itself'):
        ExportedBackbone(str(path))


@pytest.mark.slow
def test_the_tool_says_it_in_one_sentence(
    models: dict[str, Trained], fixed: dict[str, Path], tmp_path: Path
) -> None:
    model = models['seg']
    noise = tmp_path / 'noise.onnx'
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    narrow = save_onnx(tmp_path / 'narrow.onnx', POOLING, ['out'], {})
    for arguments, pattern in (
        (('--backbone', noise), r'noise\.onnx cannot be opened in onnxruntime'),
        (('--backbone', tmp_path / 'none.onnx'), r'there is no file .*none\.onnx'),
        (('--backbone', narrow), r'stages of 3 channels, and the FPN .* 8, 16, 32, 64;'),
        (('--backbone', fixed['small'], '--precision', 'bf16'), 'is a setting of OpenVINO'),
        (('--precision', 'bf16'), 'name it by --model or --backbone'),
    ):
        assert re.search(pattern, model.evaluate(*arguments).sentence)


# --- what fails later


@pytest.mark.slow
def test_results_survive_a_file_that_fails_in_the_middle(
    models: dict[str, Trained], tmp_path: Path
) -> None:
    """The third image has another size, for which a reshape in the graph does not work out."""
    model = models['det']
    whole = model.checkpoint.parent / 'any.onnx'
    content = onnx.load(whole)
    for node in content.graph.node:
        for i, name in enumerate(node.input):
            if name == 'image':
                node.input[i] = 'checked'
    # Only multiples of 4096 pixels: 64x64, and 128x128 at the start, but not 96x64.
    ints = dict(rows=np.array([1, 3, -1, 4096]))
    content.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in ints.items())
    make = onnx.helper.make_node
    content.graph.node.insert(0, make('Reshape', ['as_rows', 'size'], ['checked']))
    content.graph.node.insert(0, make('Reshape', ['image', 'rows'], ['as_rows']))
    content.graph.node.insert(0, make('Shape', ['image'], ['size']))
    fragile = tmp_path / 'fragile.onnx'
    onnx.save(content, fragile)

    data = Path(shutil.copytree(model.data_root, tmp_path / 'data'))
    truth = json.loads((model.checkpoint.parent / 'found.json').read_text())
    last = truth['images'][-1]
    with Image.open(data / 'val2017' / last['file_name']) as image:
        image.resize((96, 64)).save(data / 'val2017' / last['file_name'])
    last['width'] = 96
    truth['annotations'] = [a for a in truth['annotations'] if a['image_id'] != last['id']]
    found = tmp_path / 'found.json'
    found.write_text(json.dumps(truth))
    options = [*model.options, f'data_root={data}']
    model = dataclasses.replace(model, truth=boxes_of(found), options=options)
    stopped = model.evaluate('--backbone', fragile)
    assert 'failed in onnxruntime on images of shape (1, 3, 64, 96)' in stopped.sentence
    note = re.search(r'Stopped after 2 of 3 images; .* in (\S+\.json)', stopped.err)
    assert note, stopped.err
    kept = json.loads(Path(note[1]).read_text())
    assert kept['finished_images'] == 2
    assert kept[stopped.name] == pytest.approx(1.0, abs=0.05)

"""Opening exported backbones: what they say of themselves, and what broken ones are met with."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from conftest import REPO
from networks import tiny

from repnext_mm import reparameterize
from repnext_mm.deploy.formats import FORMATS
from repnext_mm.deploy.job import Job
from repnext_mm.runtimes import Artifact, ArtifactError, open_artifact
from repnext_mm.runtimes.programs import is_arithmetic

onnx = pytest.importorskip('onnx', reason='needs the extra deploy: onnx')
pytest.importorskip('onnxruntime', reason='needs the extra deploy: onnxruntime')
pytest.importorskip('openvino', reason='needs the extra deploy: openvino')

SIZE = (64, 96)
FILES = ('m.onnx', 'm_openvino', 'm.pt2', 'm.torchscript', 'm.pth')
RUNTIMES = ('onnxruntime', 'openvino', 'torch.export', 'torchscript', 'torch')


def job(**options: Any) -> Job:
    backbone = reparameterize(tiny('repnext_m', out_indices=(1, 3)).eval())
    metadata = dict(
        family='RepNeXt',
        arch=dict(backbone.settings),
        plan='full',
        out_indices=backbone.out_indices,
        size=SIZE,
        batch=1,
        dynamic=options.get('dynamic', 'none'),
        dtype=options.get('dtype', 'fp32'),
    )
    return exports.job(backbone, SIZE, metadata, **options)


@pytest.fixture(scope='module')
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fixed-size artifact of every format, and one ONNX file for any size."""
    folder = tmp_path_factory.mktemp('artifacts')
    fixed = job()
    for name in FILES:
        exports.write(fixed, folder / name)
    exports.write(job(dynamic='hw'), folder / 'any_size.onnx')
    return folder


@pytest.mark.parametrize('name, runtime', [*zip(FILES, RUNTIMES)])
def test_every_format_computes_what_it_says(artifacts: Path, name: str, runtime: str) -> None:
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = job().target.model(images)
    with open_artifact(artifacts / name, threads=1, trust=True) as artifact:
        assert artifact.runtime == runtime
        assert artifact.precision == 'f32'
        assert artifact.output_names == ('stage1', 'stage3')
        assert artifact.metadata['arch']['channels'] == [8, 16, 32, 64]
        fixed = name != 'm.pth'
        assert artifact.input_shape == ((1, 3, *SIZE) if fixed else (None, 3, None, None))
        outputs = artifact.run(images)
        for output, reference in zip(outputs, expected, strict=True):
            assert output.dtype == np.float32
            np.testing.assert_allclose(output, reference.numpy(), rtol=1e-4, atol=1e-5)
        # What was handed out stays, whatever runs afterwards.
        kept = outputs[0].copy()
        artifact.run(images + 1)
        np.testing.assert_array_equal(outputs[0], kept)
        if fixed:
            with pytest.raises(
                ArtifactError, match=r'requires .*\(1, 3, 64, 96\), not \(2, 3, 64, 64'
            ):
                artifact.run(torch.zeros(2, 3, 64, 64))


def test_any_size(artifacts: Path) -> None:
    backbone = job().target.model
    with open_artifact(artifacts / 'any_size.onnx', threads=1) as artifact:
        assert artifact.input_shape == (1, 3, None, None)
        for size in ((64, 64), (45, 130)):
            images = torch.randn(1, 3, *size)
            with torch.no_grad():
                expected = backbone(images)
            for output, reference in zip(artifact.run(images), expected, strict=True):
                np.testing.assert_allclose(output, reference.numpy(), rtol=1e-4, atol=1e-5)


def test_float16_and_asked_for_precision(tmp_path: Path) -> None:
    half = job(dtype='fp16')
    exports.write(half, tmp_path / 'half.pth')
    with torch.no_grad():
        images = torch.randn(1, 3, *SIZE)
        expected = job().target.model(images)
    with open_artifact(tmp_path / 'half.pth') as artifact:
        assert artifact.precision == 'f16'
        worst = max(
            float(np.abs(o - e.numpy()).max()) for o, e in zip(artifact.run(images), expected)
        )
        assert 1e-5 < worst < 0.1
    with pytest.raises(ArtifactError, match=r'precision=.bf16. is a setting of OpenVINO'):
        open_artifact(tmp_path / 'half.pth', precision='bf16')


def test_settings_of_a_runtime_are_checked(artifacts: Path) -> None:
    with pytest.raises(ArtifactError, match="'f8' is not allowed; OpenVINO computes in f32, bf16"):
        open_artifact(artifacts / 'm_openvino', precision='f8')
    with pytest.raises(ArtifactError, match=r'has no NoExecutionProvider here; it has .*CPU'):
        open_artifact(artifacts / 'm.onnx', providers=['NoExecutionProvider'])
    with pytest.raises(ArtifactError, match='is a setting of ONNX Runtime'):
        open_artifact(artifacts / 'm_openvino', providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('name', [n for n in FILES if n != 'm_openvino'])
@pytest.mark.parametrize('damage', ['empty', 'cut', 'noise'])
def test_damaged_files(artifacts: Path, name: str, damage: str, tmp_path: Path) -> None:
    whole = (artifacts / name).read_bytes()
    broken = tmp_path / name
    noise = np.random.default_rng(0).bytes(4096)
    broken.write_bytes(dict(empty=b'', cut=whole[: len(whole) // 2], noise=noise)[damage])
    with pytest.raises(ArtifactError, match=name) as caught:
        open_artifact(broken)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('suffix', ['.xml', '.bin'])
@pytest.mark.parametrize('damage', ['missing', 'cut', 'noise'])
def test_damaged_openvino_files(artifacts: Path, suffix: str, damage: str, tmp_path: Path) -> None:
    for source in (artifacts / 'm_openvino').iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    broken = next(tmp_path.glob(f'*{suffix}'))
    content = broken.read_bytes()
    if damage == 'missing':
        broken.unlink()
    elif damage == 'cut':
        broken.write_bytes(content[: len(content) // 2])
    elif suffix == '.xml':
        broken.write_bytes(np.random.default_rng(0).bytes(4096))
    else:
        return  # weights are numbers: any bytes are some
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path)
    assert '\n' not in str(caught.value)


def test_no_file_and_no_format(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r'there is no file .*x\.onnx'):
        open_artifact(tmp_path / 'x.onnx')
    with pytest.raises(ArtifactError, match=r'folder with 0 .xml files'):
        open_artifact(tmp_path)
    (tmp_path / 'x.tflite').touch()
    with pytest.raises(ArtifactError, match=r'no suffix of a format; there are .onnx'):
        open_artifact(tmp_path / 'x.tflite')
    (tmp_path / 'x.mlpackage').mkdir()
    with pytest.raises(ArtifactError, match='macOS only'):
        open_artifact(tmp_path / 'x.mlpackage')


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize('part', ['weights', 'custom_obj', 'sample_inputs', 'old'])
def test_a_pt2_with_a_pickle_is_refused(artifacts: Path, part: str, tmp_path: Path) -> None:
    """`torch.export.load` would unpickle each of these without protection."""
    mark, bomb = tmp_path / 'mark', tmp_path / 'bomb.pt2'
    evil = tmp_path / 'evil.pt'
    torch.save(Bomb(mark), evil)
    with zipfile.ZipFile(artifacts / 'm.pt2') as source, zipfile.ZipFile(bomb, 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if part == 'weights' and name.endswith('model_weights_config.json'):
                config = json.loads(content)
                first = next(iter(config['config'].values()))
                first['use_pickle'] = True
                target.writestr(f'm/data/weights/{first["path_name"]}', evil.read_bytes())
                content = json.dumps(config).encode()
            if part == 'sample_inputs' and 'sample_inputs' in name:
                content = evil.read_bytes()
            if name not in target.namelist():
                target.writestr(name, content)
        if part == 'custom_obj':
            target.writestr('m/data/constants/custom_obj_0', evil.read_bytes())
        if part == 'old':
            target.writestr('version', '5.1')
            target.writestr('serialized_state_dict.pt', pickle.dumps(Bomb(mark)))
    with pytest.raises(ArtifactError, match=r'bomb\.pt2'):
        open_artifact(bomb)
    assert not mark.exists()


#: What sympy would evaluate, and what a graph would call.
EXPRESSIONS = (
    '__import__("pathlib").Path({mark!r}).touch()',
    'Max(1, (lambda: open({mark!r}, "w"))() and 2)',
    '[open({mark!r}, "w")][0] and 1',
    'Symbol("s0").__class__.__mro__',
    'open({mark!r}, "w")',
    '9' * 30_000,
)
CALLS = ('torch.os.system', 'torch.ops.load_library', 'torch.hub.load', '_operator.attrgetter')


def changed_program(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """A copy of an exported program with another graph."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('models/model.json'):
                program = json.loads(content)
                change(program['graph_module']['graph'])
                content = json.dumps(program).encode()
            new.writestr(name, content)
    return target


def with_size(expression: str) -> Callable[[dict], None]:
    """Give every tensor of a graph this height."""
    size = {'as_expr': {'expr_str': expression, 'hint': {'as_int': 1}}}

    def change(graph: dict) -> None:
        for tensor in graph['tensor_values'].values():
            tensor['sizes'][-1:] = [size]

    return change


@pytest.mark.parametrize('expression', EXPRESSIONS)
def test_a_pt2_with_code_for_a_size_is_refused(
    artifacts: Path, expression: str, tmp_path: Path
) -> None:
    mark = tmp_path / 'mark'
    bomb = changed_program(
        artifacts / 'm.pt2', tmp_path / 'bomb.pt2', with_size(expression.format(mark=str(mark)))
    )
    for read in (open_artifact, FORMATS['pt2'].operations):
        with pytest.raises(ArtifactError, match=r'bomb\.pt2 .*which is no arithmetic'):
            read(bomb)
    assert not mark.exists()


def test_that_code_runs_where_nothing_refuses_it(artifacts: Path, tmp_path: Path) -> None:
    mark = tmp_path / 'mark'
    code = with_size(EXPRESSIONS[0].format(mark=str(mark)))
    bomb = changed_program(artifacts / 'm.pt2', tmp_path / 'bomb.pt2', code)
    with contextlib.suppress(Exception):
        torch.export.load(bomb)
    assert mark.exists()


@pytest.mark.parametrize('call', CALLS)
def test_a_pt2_that_calls_no_operator_is_refused(
    artifacts: Path, call: str, tmp_path: Path
) -> None:
    bomb = changed_program(
        artifacts / 'm.pt2',
        tmp_path / 'bomb.pt2',
        lambda graph: graph['nodes'][0].update(target=call),
    )
    with pytest.raises(ArtifactError, match=rf'bomb\.pt2 .*calls {call!r}'):
        open_artifact(bomb)


@pytest.mark.parametrize(
    'text',
    [
        "Add(FloorDiv(Add(Symbol('s82', integer=True), Integer(-1)), Integer(2)), 1)",
        's0 + 2*Max(1, s1//4)**2',
        'Mod(s0, 32) >= 1',
    ],
)
def test_arithmetic_of_sizes_is_allowed(text: str) -> None:
    assert is_arithmetic(text)


def save_onnx(path: Path, nodes: list, inputs: list, outputs: list, **more: Any) -> Path:
    graph = onnx.helper.make_graph(nodes, 'g', inputs, outputs, **more)
    opsets = [onnx.helper.make_opsetid('', 18), onnx.helper.make_opsetid('evil', 1)]
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    return path


def value(name: str, *shape: Any, kind: int = 1) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(ArtifactError, match=pattern) as caught:
        open_artifact(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('location', ['../secret.bin', '/etc/hostname', 'absent.bin'])
def test_onnx_weights_outside_of_its_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / 'model'
    folder.mkdir()
    (tmp_path / 'secret.bin').write_bytes(b'\0' * 4096)
    tensor = onnx.TensorProto(name='w', data_type=1, dims=[1, 3, 1, 1], data_location=1)
    tensor.external_data.add(key='location', value=location)
    image, out = value('image', 1, 3, 8, 8), value('out', 1, 3, 8, 8)
    add = onnx.helper.make_node('Add', ['image', 'w'], ['out'])
    refused(
        save_onnx(folder / 'm.onnx', [add], [image], [out], initializer=[tensor]),
        'cannot be opened in onnxruntime',
    )


def test_onnx_that_is_no_backbone(tmp_path: Path) -> None:
    path = tmp_path / 'm.onnx'
    node = onnx.helper.make_node
    image, out = value('image', 1, 3, 8, 8), value('out', 1, 3, 8, 8)
    same = node('Identity', ['image'], ['out'])
    refused(
        save_onnx(path, [node('Evil', ['image'], ['out'], domain='evil')], [image], [out]),
        'cannot be opened in onnxruntime: .*evil',
    )
    add = node('Add', ['image', 'scale'], ['out'])
    refused(save_onnx(path, [add], [image, value('scale', 1)], [out]), r'2 inputs \(image, scale\)')
    refused(
        save_onnx(path, [same], [value('image', 1, 8)], [value('out', 1, 8)]), r'requires \(1, 8\)'
    )
    grey = [value('image', 1, 1, 8, 8)], [value('out', 1, 1, 8, 8)]
    refused(
        save_onnx(path, [same], *grey), r'requires \(1, 1, 8, 8\), and a backbone requires images'
    )
    bytes_ = [value('image', 1, 3, 8, 8, kind=2)], [value('out', 1, 3, 8, 8, kind=2)]
    refused(save_onnx(path, [same], *bytes_), r'requires tensor\(uint8\)')
    # mm calls them features, whatever they are: the number and the shapes are checked in place.
    with open_artifact(save_onnx(path, [same], [image], [out])) as artifact:
        assert artifact.metadata == {}
        assert artifact.output_names == ('out',)


def test_a_failing_run_is_one_sentence(tmp_path: Path) -> None:
    """A graph that takes any size by its word, and one size by what is in it."""
    image, out = value('image', 1, 3, 'h', 'w'), value('out', 'a', 'b', 'c', 'd')
    weight = onnx.numpy_helper.from_array(np.zeros((1, 3, 8, 8), np.float32), 'w')
    add = onnx.helper.make_node('Add', ['image', 'w'], ['out'])
    path = save_onnx(tmp_path / 'm.onnx', [add], [image], [out], initializer=[weight])
    with open_artifact(path) as artifact:
        artifact.run(np.zeros((1, 3, 8, 8)))
        with pytest.raises(
            ArtifactError, match=r'failed in onnxruntime .*\(1, 3, 9, 9\)'
        ) as caught:
            artifact.run(np.zeros((1, 3, 9, 9)))
    assert '\n' not in str(caught.value)


def test_a_pth_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': {'epoch': 1}}, path)
    refused(path, r'does not say what network it holds; .*tools/deploy.py')
    torch.save(Bomb(tmp_path / 'mark'), path)
    refused(path, 'holds Python objects')
    assert not (tmp_path / 'mark').exists()


SIGNALLED = """
import gc, os, signal, sys
import numpy as np
from repnext_mm.runtimes.openvino import kept_signal_stack
from repnext_mm.runtimes import open_artifact

image = np.zeros((1, 3, 64, 96), np.float32)


def ours():
    first, second = (open_artifact(sys.argv[2]) for _ in range(2))
    for artifact in (first, second):
        with artifact:
            artifact.run(image)


def theirs():
    import openvino

    files = [path for path in os.listdir(sys.argv[2]) if path.endswith('.xml')]
    path = os.path.join(sys.argv[2], files[0])
    # Left to itself it takes the precision that the CPU is fastest in, for which a cap of
    # instruction sets may leave no kernel.
    exact = {'INFERENCE_PRECISION_HINT': 'f32'}
    models = [openvino.Core().compile_model(path, 'CPU', exact) for _ in range(2)]
    for _ in range(2):
        del models[0]
        gc.collect()


if sys.argv[1] == 'ours':
    ours()
else:
    with kept_signal_stack():
        theirs()
gc.collect()
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
os.kill(os.getpid(), signal.SIGUSR1)
print('survived', len(seen))
"""


@pytest.mark.parametrize('cores', ['ours', 'theirs'])
def test_signals_after_openvino(artifacts: Path, cores: str) -> None:
    """OpenVINO's cores take the memory away that signal handlers run in."""
    command = [sys.executable, '-c', SIGNALLED, cores, str(artifacts / 'm_openvino')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, done.stdout) == (0, 'survived 1\n'), done.stderr


def test_importing_costs_no_runtime() -> None:
    """`import repnext_mm` and the module itself load neither onnxruntime nor openvino."""
    code = (
        'import sys, repnext_mm, repnext_mm.runtimes as r\n'
        'assert not {"onnx", "onnxruntime", "openvino"} & set(sys.modules)\n'
        'sys.modules["onnxruntime"] = None\n'
        'try: r.open_artifact(sys.argv[1])\n'
        'except r.ArtifactError as error: print(error)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, __file__.replace('.py', '.onnx')],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'there is no file' in done.stdout


def test_a_missing_runtime_is_named(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (('m.onnx', 'onnxruntime'), ('m_openvino', 'openvino')):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ArtifactError, match=f'pip install {package}'):
            open_artifact(artifacts / name)
    assert issubclass(ArtifactError, ValueError)
    assert Artifact.__abstractmethods__

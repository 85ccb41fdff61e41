"""Every family through every format: what is in an artifact, and what it computes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import TINY, tiny
from rich.console import Console
from torch import nn

from repnext_mm import RecNeXt
from repnext_mm.backbones.recnext import LinearAttention
from repnext_mm.deploy import parity
from repnext_mm.deploy.errors import ExportError, ParityError, SomeFailedError, UsageError
from repnext_mm.deploy.formats import FORMATS, ONNX
from repnext_mm.deploy.job import Job
from repnext_mm.deploy.options import Options
from repnext_mm.deploy.pipeline import Export
from repnext_mm.deploy.report import ArtifactRecord, Report
from repnext_mm.deploy.source import Source
from repnext_mm.deploy.targets import BackboneTarget, Preprocess
from repnext_mm.engine.quiet import muffled
from repnext_mm.reparam import reparameterize
from repnext_mm.runtimes import open_artifact

FAMILIES = ('repnext_m', 'recnext_m', 'recnext_a', 'recnext_l_share', 'inception_next')
RUN_HERE = [name for name, row in FORMATS.items() if row.runtime and name != 'web']
RUN_HERE_AT_ANY_SIZE = ['onnx', 'openvino', 'pth', 'pt2', 'torchscript']
#: All but the one that needs a C++ compiler, and half a minute of it.
WRITTEN = [name for name in FORMATS if name not in ('aoti', 'web')]


def source(name: str, **kwargs: Any) -> Source:
    return Source(name, tiny(name, **kwargs).eval(), 'random')


def export(
    model: Source, folder: Path, *formats: str, size: tuple[int, int] = (64, 64), **options: Any
) -> Report:
    chosen = Options(format=','.join(formats), sizes=[size], **options)
    run = Export(model, chosen, folder, Console(quiet=True))
    report = run.run()
    run.raise_failures()
    return report


def artifacts(report: Report) -> dict[str, ArtifactRecord]:
    return {record.format: record for record in report.artifacts}


def opened(report: Report, name: str) -> Any:
    path = FORMATS[name].file(report.folder / artifacts(report)[name].path)
    return open_artifact(path, trust=True)


def assert_equal(actual: list[np.ndarray], model: nn.Module, image: torch.Tensor) -> None:
    """Against the network as it was before fusing, in float32."""
    with torch.no_grad():
        expected = model(image)
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        scale = float(want.std())
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_every_format(family: str, tmp_path: Path) -> None:
    model = source(family)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.model.modules())
    report = export(model, tmp_path, *WRITTEN)
    found = artifacts(report)
    assert set(found) == set(WRITTEN)
    assert_artifacts(report, model, family)
    # All graphs hold the same convolutions; weights are fewer where a recursion shares them.
    counts = {name: record.convs for name, record in found.items() if name != 'pth'}
    assert len(set(counts.values())) == 1, counts
    assert_coreml(tmp_path / found['coreml'].path, 'fp16', model)
    assert (tmp_path / 'verify_on_mac.py').exists()
    assert json.loads((tmp_path / 'report.json').read_text())['status'] == 'ok'


@pytest.mark.slow
@pytest.mark.usefixtures('inductor')
def test_a_package_compiled_for_this_machine(tmp_path: Path) -> None:
    """Of the family with the most kinds of operators."""
    model = source('recnext_a')
    report = export(model, tmp_path, 'aoti')
    assert set(artifacts(report)) == {'aoti'}
    assert_artifacts(report, model, 'recnext_a')


def assert_artifacts(report: Report, model: Source, family: str) -> None:
    """What every artifact of a report promises."""
    image = torch.randn(1, 3, 64, 64)
    found = artifacts(report)
    for name, record in found.items():
        assert record.status == ('ok' if name in RUN_HERE else 'unverified'), name
        assert record.bn_left == 0, name
        assert not [op for op in record.operations if 'norm' in op.lower()], name
        assert record.path.startswith(f'{family}_64x64_b1_full_'), name
        assert record.bytes > 10_000
        if name not in RUN_HERE:
            continue
        with opened(report, name) as artifact:
            assert artifact.metadata['arch'] == json.loads(json.dumps(model.arch)), name
            assert artifact.metadata['plan'] == 'full'
            assert artifact.metadata['out_channels'] == list(model.model.out_channels)
            assert artifact.output_names == ('stage0', 'stage1', 'stage2', 'stage3'), name
            if name != 'pth':
                assert artifact.input_shape == (1, 3, 64, 64), name
            assert_equal(artifact.run(image), model.model, image)
        rows = [row for row in report.parity if row.format == name]
        assert [row.output for row in rows] == ['stage0', 'stage1', 'stage2', 'stage3']
        assert all(row.passed and row.measures['max_rel'] <= 1e-4 for row in rows)


def assert_coreml(path: Path, dtype: str, model: Source) -> None:
    """What a phone would be given; nothing on Linux runs it."""
    import coremltools
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2

    spec = coremltools.utils.load_spec(str(path))
    description = spec.description
    assert [i.name for i in description.input] == ['image']
    assert [o.name for o in description.output] == ['stage0', 'stage1', 'stage2', 'stage3']
    shapes = [tuple(o.type.multiArrayType.shape) for o in description.output]
    assert [shape[1] for shape in shapes] == list(model.model.out_channels)
    float32 = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.FLOAT32
    for feature in [*description.input, *description.output]:
        assert feature.type.multiArrayType.dataType == float32
    function = spec.mlProgram.functions['main']
    block = function.block_specializations[function.opset]
    convolutions = [op for op in block.operations if op.type.startswith('conv')]
    wanted = {'fp16': MIL_pb2.DataType.FLOAT16, 'fp32': MIL_pb2.DataType.FLOAT32}[dtype]
    assert convolutions
    assert {op.outputs[0].type.tensorType.dataType for op in convolutions} == {wanted}
    attention = [op for op in block.operations if op.type in ('matmul', 'elu', 'reduce_mean')]
    assert all(
        op.outputs[0].type.tensorType.dataType == MIL_pb2.DataType.FLOAT32 for op in attention
    )
    assert bool(attention) == any(isinstance(m, LinearAttention) for m in model.model.modules())
    metadata = json.loads(description.metadata.userDefined['repnext_mm'])
    assert metadata['golden'] == 'golden_64x64_b1.npz'
    assert (path.parent / metadata['golden']).exists()


def test_coreml_in_float32(tmp_path: Path) -> None:
    model = source('repnext_m')
    report = export(model, tmp_path, 'coreml', dtype='fp32')
    assert_coreml(tmp_path / artifacts(report)['coreml'].path, 'fp32', model)


@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_reduced_precision(dtype: str, tmp_path: Path) -> None:
    names = [name for name in RUN_HERE if dtype in FORMATS[name].dtypes and name != 'aoti']
    model = source('recnext_a')  # attention keeps float32 inside
    report = export(model, tmp_path, *names, dtype=dtype)
    low, high = {'fp16': (45, 90), 'bf16': (25, 60)}[dtype]  # float32 has 110 and more
    for name in names:
        with opened(report, name) as artifact:
            outputs = artifact.run(torch.randn(1, 3, 64, 64))
        assert all(out.dtype == np.float32 for out in outputs)
        rows = [row for row in report.parity if row.format == name]
        assert all(low < row.measures['sqnr_db'] < high for row in rows), (name, rows)


@pytest.mark.parametrize('family', FAMILIES)
def test_open_height_and_width(family: str, tmp_path: Path) -> None:
    model = source(family)
    names = ['onnx'] if family != 'recnext_m' else RUN_HERE_AT_ANY_SIZE
    report = export(model, tmp_path, *names, dynamic='hw')
    for name in names:
        rows = [row for row in report.parity if row.format == name]
        assert len({tuple(row.measures['shape']) for row in rows if row.output == 'stage0'}) == 3
        with opened(report, name) as artifact:
            assert artifact.input_shape[2:] == (None, None)
            for height, width in ((127, 66), (96, 251), (320, 192)):
                image = torch.randn(1, 3, height, width)
                assert_equal(artifact.run(image), model.model, image)


def test_open_batch(tmp_path: Path) -> None:
    model = source('recnext_a')
    report = export(model, tmp_path, 'onnx', 'openvino', 'pt2', dynamic='batch')
    for name in ('onnx', 'openvino', 'pt2'):
        with opened(report, name) as artifact:
            assert artifact.input_shape == (None, 3, 64, 64)
            for batch in (1, 5):
                image = torch.randn(batch, 3, 64, 64)
                assert_equal(artifact.run(image), model.model, image)


def test_open_size_is_refused_where_it_is_not_exact(tmp_path: Path) -> None:
    arch = TINY['recnext_m'][1] | dict(token_mixer=dict(type='grouped', level=1))
    model = Source('grouped', RecNeXt(arch).eval(), 'random')
    with pytest.raises(UsageError, match=r'multiples of 2.*Export one artifact per size'):
        export(model, tmp_path, 'onnx', dynamic='hw')
    with pytest.raises(UsageError, match='--dynamic hw is not possible for coreml: its upsampling'):
        export(model, tmp_path, 'coreml', dynamic='hw')
    assert not [path for path in tmp_path.rglob('*') if path.suffix in ('.onnx', '.mlpackage')]


def test_odd_size_by_name(tmp_path: Path) -> None:
    model = source('recnext_m')
    with pytest.raises(UsageError, match='--size 75: stride 32 leaves 11 px; use 64 or 96'):
        export(model, tmp_path, 'onnx', size=(75, 90))
    report = export(model, tmp_path, 'onnx', 'openvino', size=(75, 90), allow_odd=True)
    assert {record.status for record in report.artifacts} == {'ok'}


@pytest.mark.parametrize('opset', [18, 20, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    import onnx

    model = source('repnext_m')
    report = export(model, tmp_path, 'onnx', opset=opset)
    record = artifacts(report)['onnx']
    graph = onnx.load(tmp_path / record.path)
    assert record.opset == opset
    assert next(o.version for o in graph.opset_import if o.domain == '') == opset
    # From 20 on, GELU is one operation.
    assert ('Gelu' in record.operations) == (opset >= 20)
    assert not list(tmp_path.glob('*.data'))


def test_preprocessing_inside(tmp_path: Path) -> None:
    from mmengine.model import ImgDataPreprocessor

    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    model = source('repnext_m')
    model.preprocessor = dict(mean=mean, std=std, bgr_to_rgb=True, type='DetDataPreprocessor')
    with pytest.raises(UsageError, match='--preprocess embed is not possible for pth'):
        export(model, tmp_path, 'onnx', 'pth', preprocess='embed')
    report = export(model, tmp_path, 'onnx', 'openvino', preprocess='embed')
    raw = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    normal = ImgDataPreprocessor(mean, std, bgr_to_rgb=True)({'inputs': [raw[0]]})['inputs']
    for name in ('onnx', 'openvino'):
        with opened(report, name) as artifact:
            assert artifact.metadata['preprocess']['mean'] == list(mean)
            with torch.no_grad():
                expected = model.model(normal)
            for got, want in zip(artifact.run(raw.float()), expected, strict=True):
                atol = 1e-4 * float(want.std())
                torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=atol)


def test_preprocess_undo() -> None:
    step = Preprocess((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), swap=True)
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(step.apply(step.undo(image)), image)


def test_stages_on_request(tmp_path: Path) -> None:
    model = source('repnext_m', out_indices=(1, 3))
    report = export(model, tmp_path, 'pt2')  # test_runtimes.py has the other formats
    with opened(report, 'pt2') as artifact:
        assert artifact.output_names == ('stage1', 'stage3')
        assert artifact.metadata['out_strides'] == [8, 32]
        image = torch.randn(1, 3, 64, 64)
        assert_equal(artifact.run(image), model.model, image)


@pytest.mark.parametrize('plan', ['upstream', 'single'])
def test_other_plans(plan: str, tmp_path: Path) -> None:
    model = source('repnext_m')
    report = export(model, tmp_path, 'onnx', plan=plan)
    record = artifacts(report)['onnx']
    assert f'_{plan}_' in record.path
    # Branches merged alone, each block and downsampling keeps the norm between its mixers.
    (fused,) = report.plans
    assert fused.bn_left == (8 if plan == 'upstream' else 0)
    warned = [text for text in report.warnings if 'is not exact' in text]
    assert len(warned) == (plan == 'single')
    worst = max(stage['max_rel'] for stage in fused.proof_float64)
    assert (worst > 1e-4) == (plan == 'single')


# --- what must not get through


class Spoiled(ONNX):
    """An exporter with a mistake in one weight of the last stage."""

    def export(self, job: Job, path: Path) -> None:
        broken = copy.deepcopy(job.target)
        with torch.no_grad():
            [m for m in broken.modules() if isinstance(m, nn.Conv2d)][-1].bias[0] += 0.05
        super().export(replace(job, target=broken, _programs={}, _onnx={}), path)


def test_a_wrong_artifact_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, 'onnx', Spoiled())
    with pytest.raises(ParityError, match=r'onnx differs from the network in stage3: '):
        export(source('repnext_m'), tmp_path, 'onnx')
    (rejected,) = (tmp_path / 'rejected').iterdir()
    assert rejected.suffix == '.onnx'
    assert not list(tmp_path.glob('*.onnx'))
    report = Report.load(tmp_path)
    assert report.status == 'failed'
    assert [row.passed for row in report.parity] == [True, True, True, False]


def test_one_failure_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, 'onnx', Spoiled())
    with pytest.raises(SomeFailedError, match='1 of 2 artifacts failed: onnx: ') as caught:
        export(source('repnext_m'), tmp_path, 'onnx', 'pth')
    assert caught.value.exit_code == 7
    assert [path.suffix for path in tmp_path.glob('repnext*')] == ['.pth']


def test_a_norm_that_was_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source('repnext_m')

    class Unfused(ONNX):
        def export(self, job: Job, path: Path) -> None:
            target = BackboneTarget(model.model)
            super().export(replace(job, target=target, _programs={}, _onnx={}), path)

    monkeypatch.setitem(FORMATS, 'onnx', Unfused())
    # torch.onnx folds what it can, so that not all of them are left.
    with pytest.raises(ExportError, match=r'onnx holds \d+ BatchNorm, though plan full leaves'):
        export(model, tmp_path, 'onnx')
    assert not list(tmp_path.glob('**/*.onnx'))


@pytest.mark.parametrize('family', ['repnext_m', 'recnext_l_share', 'inception_next'])
def test_a_network_that_was_not_fused(family: str, tmp_path: Path) -> None:
    """Somebody else's exporter gets the published operations, whose weights need no computing.

    Of the families that train with computed weights.
    """
    model = source(family).model
    path, image = tmp_path / 'unfused.onnx', torch.randn(1, 3, 64, 64)
    with muffled():
        torch.onnx.export(model, (image,), str(path), dynamo=True)
    with open_artifact(path, trust=True) as artifact:
        assert_equal(artifact.run(image), model, image)
    operations = {str(n.target) for n in torch.export.export(model, (image,)).graph.nodes}
    assert not {name for name in operations if 'pad' in name or 'flip' in name}


@pytest.mark.parametrize('family', FAMILIES)
def test_red_and_blue_change_places_in_the_weights(family: str) -> None:
    """In programs alone: weights that are saved are those of the network."""
    model = reparameterize(tiny(family).eval(), 'full')
    step = Preprocess((120.0, 110.0, 100.0), (60.0, 50.0, 40.0), swap=True)
    target = BackboneTarget(model, step).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = target.without_swap()
    image = 255 * torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(target.double()(image.double()), twin.double()(image.double())):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    job = Job(target.float(), (64, 64), {})
    for module, flips in ((job.module(), True), (job.program().module(), False)):
        graph = torch.export.export(module, job.example).graph
        assert any('flip' in str(node.target) for node in graph.nodes) == flips
    assert all((job.module().model.state_dict()[k] == v).all() for k, v in before.items())
    plain = BackboneTarget(model, replace(step, swap=False))
    assert plain.without_swap() is plain


def test_compare_sees_every_kind_of_difference() -> None:
    want = np.random.default_rng(0).standard_normal((1, 2, 3, 3))
    golden = parity.Golden({'image': np.zeros((1, 3, 4, 4), np.float32)}, {'stage0': want})
    tolerance = parity.TOLERANCES['fp32']

    def passes(*outputs: np.ndarray) -> bool:
        named = dict(zip(['stage0'], outputs))
        rows = parity.FeatureParity().compare(named, golden, tolerance, {})
        return all(row.passed for row in rows)

    assert passes(want.astype(np.float32))
    one_wrong = want.copy()
    one_wrong[0, 1, 2, 2] += 2e-4 * want.std()
    assert not passes(one_wrong)
    assert not passes(want[..., :2])
    assert not passes()
    assert not passes(np.where(want == want.max(), np.nan, want))


def test_golden_survives_a_file(tmp_path: Path) -> None:
    model = tiny('repnext_m').eval()
    inputs = {'image': torch.randn(1, 3, 64, 64)}
    before = parity.FeatureParity().of(BackboneTarget(model), inputs)
    assert next(model.parameters()).dtype == torch.float32
    before.save(tmp_path / 'golden.npz')
    after = parity.Golden.load(tmp_path / 'golden.npz')
    assert list(after.outputs) == ['stage0', 'stage1', 'stage2', 'stage3']
    assert all((after.outputs[k] == v).all() for k, v in before.outputs.items())
    assert after.outputs['stage0'].dtype == np.float64

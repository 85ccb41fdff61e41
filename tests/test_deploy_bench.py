"""Timing artifacts in processes of their own, choosing plans, explaining. No time is asserted."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
from conftest import randomise
from PIL import Image
from rich.console import Console
from torch import nn

from repnext_mm import RecNeXt, RepNeXt, reparameterize
from repnext_mm.deploy import bench
from repnext_mm.deploy.cli import deploy_main
from repnext_mm.deploy.explain import explain, kind_of
from repnext_mm.deploy.formats import FORMATS
from repnext_mm.deploy.report import ArtifactRecord, ModelRecord, PlanRecord, Report
from repnext_mm.measure import Comparison, Floor, Ratio, Samples, Schedule, artifacts, environment
from repnext_mm.measure.artifacts import (
    BASELINE,
    BenchError,
    Measured,
    Network,
    Subject,
    Worker,
)
from repnext_mm.measure.worker import serve

TINY = dict(channels=[8, 16, 32, 64], depths=[1, 1, 1, 1])
NETWORK = Network(RepNeXt, TINY, (0, 3))
SHAPE = (1, 3, 64, 96)
QUICK = Schedule(rounds=2, round_s=1e-3, warmup_cap_s=0.05, budget_s=1.0)
HERE = ('pth', 'pt2', 'onnx', 'openvino', 'torchscript')


def record(name: str, plan: str, dtype: str = 'fp32') -> ArtifactRecord:
    """An entry of report.json's `artifacts`."""
    metadata = {'family': 'RepNeXt', 'arch': TINY, 'out_indices': [0, 3], 'plan': plan, 'batch': 1}
    return ArtifactRecord(
        format=name,
        path=f'{plan}{FORMATS[name].suffix}',
        golden='golden.npz',
        status='ok',
        sha256='',
        bytes=1,
        opset=None,
        dtype=dtype,
        plan=plan,
        why='',
        size=list(SHAPE[2:]),
        batch=1,
        dynamic='none',
        inputs=['image'],
        outputs=['stage0', 'stage3'],
        operations={},
        bn_left=0,
        convs=0,
        metadata=metadata,
        quantization=None,
        metric=None,
        tolerance={},
        seconds=0.0,
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the tiny network that run here."""
    path = tmp_path_factory.mktemp('artifacts')
    for name in HERE:
        row = FORMATS[name]
        for plan in ('full', 'upstream') if name == 'onnx' else ('full',):
            bench.export(row, NETWORK.fused(plan), SHAPE, path / f'{plan}{row.suffix}')
    return path


@pytest.fixture(scope='module', autouse=True)
def _cpu_without_bfloat16() -> Iterator[None]:
    """Which rows there are does not depend on the CPU that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, 'isa_flags', lambda: ['avx2'])
        yield


class WorkerHere(Worker):
    """A worker in a thread of this process, which has imported torch already."""

    def __init__(self, threads: int, variables: Mapping[str, str] | None = None) -> None:
        (requests, ask), (answer, answers) = os.pipe(), os.pipe()
        streams = os.fdopen(requests), os.fdopen(answers, 'w')
        thread = threading.Thread(target=self._serve, args=streams, daemon=True)
        thread.start()
        self.process = SimpleNamespace(
            stdin=os.fdopen(ask, 'w'), stdout=os.fdopen(answer), wait=thread.join
        )

    @staticmethod
    def _serve(requests: TextIO, answers: TextIO) -> None:
        with requests, answers:
            serve(requests, answers, cores=None)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers without processes of their own."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(artifacts, 'Worker', WorkerHere)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def report(folder: Path) -> Report:
    """A report with two artifacts, timed."""
    report = Report(folder, MODEL, [PLAN])
    report.artifacts = [record('onnx', 'full'), record('openvino', 'full')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, 'Worker', WorkerHere)
        [measured] = bench.bench_report(report, threads=1, compiled=False, schedule=QUICK)
    assert isinstance(measured, Measured)
    return report


MODEL = ModelRecord(
    name='tiny',
    task='backbone',
    scope='backbone',
    family='RepNeXt',
    arch='tiny',
    config=None,
    checkpoint=None,
    checkpoint_sha256=None,
    container='',
    weights_source='random',
    seed=0,
    params=1,
    macs=1,
    size=list(SHAPE[2:]),
    details={},
)
LOAD = dict(headline=True, reason=None)
PLAN = PlanRecord('full', [], [], bn_left=0, convs_before=1, convs_after=1)


# --- workers


@pytest.fixture(scope='module')
def worker() -> Iterator[Worker]:
    worker = Worker(threads=1)
    yield worker
    worker.process.stdin.close()
    assert worker.process.wait(300) == 0  # `close` kills one that takes longer than 10 seconds
    worker.close()


def test_a_worker_answers_runs_and_survives_errors(worker: Worker, folder: Path) -> None:
    spec = {'shape': SHAPE, 'threads': 1, 'path': str(folder / 'full.onnx')}
    opened = worker.ask({'open': 'a', 'spec': spec})
    assert (opened['runtime'], opened['precision']) == ('onnxruntime', 'f32')
    assert opened['load_s'] > 0
    assert opened['first_s'] > 0
    with pytest.raises(BenchError, match='there is no file'):
        worker.ask({'open': 'b', 'spec': spec | {'path': str(folder / 'none.onnx')}})
    with pytest.raises(BenchError, match='requires images of shape'):
        worker.ask({'open': 'b', 'spec': spec | {'shape': (1, 3, 32, 32)}})
    seconds = worker.ask({'run': 'a', 'n': 3})['seconds']
    assert len(seconds) == 3
    assert all(second > 0 for second in seconds)


@pytest.mark.skipif(
    not hasattr(os, 'sched_getaffinity'), reason='this system pins no process to cores'
)
def test_a_worker_computes_on_as_many_cores_as_threads(worker: Worker, folder: Path) -> None:
    spec = {'shape': SHAPE, 'threads': 1, 'path': str(folder / 'full.onnx')}
    worker.ask({'open': 'a', 'spec': spec})  # pinned before it answers
    cores = os.sched_getaffinity(worker.process.pid)
    assert cores == set(sorted(os.sched_getaffinity(0))[:1])


def test_the_end_of_a_worker_is_an_error_and_not_a_wait() -> None:
    worker = Worker(threads=1)
    worker.process.kill()
    with pytest.raises(BenchError, match='the process ended with code -9'):
        worker.ask({'run': 'a', 'n': 1})
    worker.close()


# --- rows


def test_every_artifact_is_compared_with_upstream_in_its_runtime(report: Report) -> None:
    rows = {row['name']: row for row in report.latency}
    assert list(rows) == [
        'torch eager, upstream',
        'torch eager, full',
        'torch eager channels_last, upstream',
        'torch eager channels_last, full',
        'onnx fp32, upstream',
        'onnx fp32, full',
        'openvino fp32, upstream',
        'openvino fp32, full',
    ]
    for name, row in rows.items():
        mode = name.rpartition(',')[0]
        assert row['reference'] == f'{mode}, upstream'
        assert row['baseline'] == BASELINE
        assert row['precision'] == 'f32'
        assert row['threads'] == 1
        assert row['p50'] > 0
        assert (row['p90'], row['p99']) == (None, None)
        assert row['ci95'][0] <= row['ratio'] <= row['ci95'][1]
        assert row['vs_baseline_ci95'][0] <= row['vs_baseline'] <= row['vs_baseline_ci95'][1]
        assert row['floor'] >= 1
        assert (row['verdict'] == 'reference') == name.endswith('upstream')
    assert rows['onnx fp32, full']['path'] == 'full.onnx'
    assert rows['onnx fp32, full']['runtime'] == 'onnxruntime'
    assert rows['openvino fp32, full']['runtime'] == 'openvino'
    assert rows[BASELINE]['vs_baseline'] == rows[BASELINE]['ratio'] == 1


def test_the_report_and_a_picture_lie_in_the_folder(report: Report, folder: Path) -> None:
    saved = json.loads((folder / 'report.json').read_text())
    assert len(saved['latency']) == 8
    [run] = saved['bench']
    assert {'load', 'env', 'threads', 'failed', 'size', 'batch'} <= set(run)
    with Image.open(folder / run['picture']) as picture:
        width, height = picture.size
        assert width > 800
        assert height > 400
        assert len(picture.convert('RGB').getcolors(1 << 20)) > 4  # more than paper and ink
    text = (folder / 'report.md').read_text('utf-8')
    assert 'onnx fp32, full' in text
    assert run['picture'] in text


def test_an_upstream_artifact_that_is_there_is_taken(folder: Path, tmp_path: Path) -> None:
    full, upstream = record('onnx', 'full'), record('onnx', 'upstream')
    path = bench._upstream_of(full, [full, upstream], folder, NETWORK, SHAPE, tmp_path)
    assert path == folder / 'upstream.onnx'
    # int8 is compared with float32; another format's file will not do.
    path = bench._upstream_of(record('onnx', 'full', 'int8'), [upstream], folder, NETWORK, SHAPE,
                              tmp_path)  # fmt: skip
    assert path == folder / 'upstream.onnx'
    path = bench._upstream_of(record('pt2', 'full'), [upstream], folder, NETWORK, SHAPE, tmp_path)
    assert path == tmp_path / 'upstream_fp32.pt2'
    norms = FORMATS['pt2'].operations(path)
    assert any('batch_norm' in name for name in norms)


def test_int8_is_labelled_and_compared_with_float32(folder: Path) -> None:
    row = FORMATS['onnx']
    subject = bench.artifact_subject(row, folder / 'x.onnx', SHAPE, 'full', 'int8', None)
    assert (subject.name, subject.reference) == ('onnx int8, full', 'onnx fp32, upstream')
    row = FORMATS['openvino']
    subject = bench.artifact_subject(row, folder / 'x', SHAPE, 'full', 'fp32', 'bf16')
    assert (subject.name, subject.reference) == ('openvino bf16, full', 'openvino bf16, upstream')
    assert subject.spec['precision'] == 'bf16'


@pytest.mark.parametrize('flags, takes', [([], False), (['avx512_bf16'], True), (['bf16'], True)])
def test_openvino_is_asked_for_bfloat16_where_the_cpu_has_it(
    flags: list[str], takes: bool, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(environment, 'isa_flags', lambda: flags)
    exact = record('openvino', 'full')
    rows = bench._artifact_rows(FORMATS['openvino'], exact, folder, folder, SHAPE, ['bf16'], True)
    names = [row.name for row in rows]
    assert ('openvino bf16, full' in names) is takes
    assert 'openvino fp32, full' in names


@pytest.mark.usefixtures('here')
def test_what_cannot_be_run_is_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / 'broken.onnx'
    broken.write_bytes(b'no model')
    good = bench.artifact_subject(
        FORMATS['onnx'], folder / 'full.onnx', SHAPE, 'upstream', 'fp32', None
    )
    bad = bench.artifact_subject(FORMATS['onnx'], broken, SHAPE, 'full', 'fp32', None)
    measured = artifacts.measure([good, bad], good.name, threads=1, schedule=QUICK)
    assert list(measured.comparison.samples) == [good.name]
    assert 'broken.onnx cannot be opened in onnxruntime' in measured.failed[bad.name]
    with pytest.raises(BenchError, match='cannot be timed'):
        artifacts.measure([good, bad], bad.name, threads=1, schedule=QUICK)


@pytest.mark.parametrize('mode', ['eager', 'eager channels_last'])
def test_pytorch_rows_run_the_plan_in_the_layout(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[nn.Module, torch.Tensor]] = []
    monkeypatch.setattr(
        RepNeXt, 'forward', lambda self, x: seen.append((self, x)) or (x,), raising=True
    )
    subjects = artifacts.torch_subjects(NETWORK, SHAPE, ['full'], [mode])
    assert [s.facts['plan'] for s in subjects] == ['upstream', 'full']
    for subject in subjects:
        function, facts = artifacts.open_subject({**subject.spec, 'threads': 1})
        function()
        assert facts == {'runtime': 'torch', 'precision': 'f32'}
    assert [model.plan for model, _ in seen] == ['upstream', 'full']
    # The reference is what the published code computes.
    assert [{m.fast for m in model.modules() if hasattr(m, 'fast')} for model, _ in seen] == [
        {False},
        {True},
    ]
    last = 'channels_last' in mode
    for _, image in seen:
        assert image.shape == SHAPE
        assert image.is_contiguous(memory_format=torch.channels_last) is last


# --- choosing a plan


def planted(**seconds: float) -> Measured:
    """What measuring plans would give if they took so long."""
    samples = {plan: Samples([[s]] * 30) for plan, s in seconds.items()}
    subjects = {plan: Subject(plan, 'w', {}, 'full', {'plan': plan}) for plan in seconds}
    floor = Floor(Ratio(1.0, 0.98, 1.02, 30))
    opened = {p: dict(runtime='r', precision='f32', load_s=1, first_s=1) for p in seconds}
    comparison = Comparison(dict.fromkeys(seconds, 'full'), samples, {'full': floor})
    return Measured(subjects, comparison, opened, 'full', {}, LOAD, 1)


@pytest.mark.parametrize(
    'seconds, plan',
    [
        (dict(full=1.0, upstream=0.9), 'upstream'),
        (dict(full=1.0, upstream=0.99), 'full'),  # within the noise
        (dict(full=1.0, upstream=1.5), 'full'),
        (dict(full=1.0, upstream=0.9, single=0.8), 'single'),
    ],
)
def test_another_plan_is_chosen_where_it_is_faster_beyond_noise(
    seconds: dict[str, float], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, 'measure', lambda *args, **kwargs: planted(**seconds))
    model = NETWORK.fused('upstream')
    model.plan = None
    choice = bench.choose_plan(NETWORK.family(TINY).eval(), FORMATS['pth'], SHAPE)
    assert choice.plan == plan
    assert choice.ratios == seconds


def test_only_exact_plans_are_tried() -> None:
    trained = randomise(RepNeXt(TINY)).eval()
    assert bench.exact_plans(trained) == ['full', 'upstream']  # a bias reaches over the border
    untrained = RepNeXt(TINY).eval()
    for name, parameter in untrained.named_parameters():
        if name.endswith('bias'):
            nn.init.zeros_(parameter)
    assert 'single' in bench.exact_plans(untrained)
    recursive = RecNeXt(TINY | dict(series='m')).eval()
    assert bench.exact_plans(recursive)[:2] == ['full', 'upstream']


def test_plans_are_measured_for_real_and_without_a_runtime_not_at_all() -> None:
    model = randomise(RepNeXt(TINY, out_indices=(0, 3))).eval()
    choice = bench.choose_plan(model, FORMATS['pth'], SHAPE, threads=1, schedule=QUICK)
    assert set(choice.ratios) == {'full', 'upstream'}
    assert choice.ratios['full'] == 1
    assert choice.plan in ('full', 'upstream')
    choice = bench.choose_plan(model, FORMATS['coreml'], SHAPE)
    assert (choice.plan, choice.ratios) == ('full', {})
    assert 'cannot be run on this system' in choice.why
    fused = reparameterize(model, 'upstream')
    assert bench.choose_plan(fused, FORMATS['pth'], SHAPE).plan == 'upstream'


# --- explain


@pytest.mark.parametrize(
    'name, weight, kind',
    [
        ('aten::mkldnn_convolution', (8, 1, 3, 3), 'depthwise convolution'),
        ('Conv', (8, 8, 1, 1), '1x1 convolution'),
        ('Conv', (8, 3, 3, 3), 'other convolution'),
        ('Convolution', (), 'convolution'),
        ('ReorderOutput', (), 'reorder'),
        ('aten::copy_', (), 'reorder'),
        ('Convert', (), 'reorder'),
        ('aten::gelu', (), 'activation'),
        ('Erf', (), 'activation'),
        ('VariadicSplit', (), 'split or join'),
        ('aten::cat', (), 'split or join'),
        ('aten::native_batch_norm', (), 'norm'),
        ('QuantizeLinear', (), 'quantisation'),
        ('MatMul', (), 'matrix product'),
        ('Add', (), 'element-wise'),
        ('aten::resize_', (), 'other'),
    ],
)
def test_operators_are_sorted_by_kind(name: str, weight: tuple[int, ...], kind: str) -> None:
    assert kind_of(name, weight) == kind


# The tiny network: 2 convolutions in the stem; in each of 4 blocks two 1x1, and 4 depthwise in its
# token mixer; in each of 3 downsamples two 1x1 and two depthwise.
COUNTS = {'other convolution': 2, '1x1 convolution': 14, 'depthwise convolution': 22}


@pytest.mark.parametrize('name', HERE)
def test_a_profile_finds_every_convolution_of_the_network(name: str, folder: Path) -> None:
    path = FORMATS[name].file(folder / f'full{FORMATS[name].suffix}')
    explanation = explain(path, runs=2, trust=True)
    assert explanation.runtime == (FORMATS[name].runtime or '')
    kinds = explanation.kinds
    assert sum(row['share'] for row in kinds.values()) == pytest.approx(1)
    assert {'1x1 convolution', 'depthwise convolution'} <= set(kinds)
    times = [operator.ms for operator in explanation.operators]
    assert times == sorted(times, reverse=True)
    if name == 'onnx':
        assert {kind: explanation.nodes[kind] for kind in COUNTS} == COUNTS
        assert {kind: round(kinds[kind]['calls']) for kind in COUNTS} == COUNTS
    if name == 'openvino':
        assert sum(explanation.nodes[kind] for kind in COUNTS) == sum(COUNTS.values())
        assert explanation.nodes['1x1 convolution'] == COUNTS['1x1 convolution']
        assert all(o.kernel for o in explanation.operators if 'convolution' in o.kind)


# --- the verbs


@pytest.mark.usefixtures('here')
def test_bench_and_explain_as_verbs(
    report: Report, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    quick = ['--rounds', '2', '--budget-s', '0.5', '--threads', '1', '--no-compile']
    assert deploy_main(['bench', str(folder), *quick]) == 0
    output = capsys.readouterr().out
    assert 'onnx fp32, full' in output
    assert 'time / upstream' in output
    assert deploy_main(['explain', str(folder / 'full.onnx'), '--threads', '1', '--json']) == 0
    [explanation] = json.loads(capsys.readouterr().out)
    assert explanation['runtime'] == 'onnxruntime'
    assert explanation['nodes']['1x1 convolution'] == 14


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['explain', 'none.onnx'], 'there is no file none.onnx'),
        (['bench', 'nowhere'], 'does not exist'),
    ],
)
def test_wrong_inputs_are_told_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    assert deploy_main(arguments) != 0
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    assert sentence in error


def test_a_folder_without_anything_to_run_is_told(tmp_path: Path) -> None:
    report = Report(tmp_path, MODEL, [PLAN])
    with pytest.raises(BenchError, match='holds no artifact that can be run here'):
        bench.bench_report(report)


def test_people_see_the_fastest_first(capsys: pytest.CaptureFixture) -> None:
    measured = planted(full=1.0, upstream=0.5)
    artifacts.show(measured, Console(file=sys.stdout, width=160))
    output = capsys.readouterr().out
    assert output.index('upstream') < output.index('full ')
    assert '0.50 [0.50, 0.50]' in output

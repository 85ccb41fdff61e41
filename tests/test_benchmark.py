"""tools/benchmark.py: that it measures what it says. No time is asserted."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from tool_runs import run_here, script, succeed, succeed_here
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt, backbones
from repnext_mm.engine.allocator import keep_freed_memory
from repnext_mm.measure import Schedule
from repnext_mm.measure import networks as benchmark
from repnext_mm.measure.networks import Settings, Trial, Variant
from repnext_mm.text import parse_size

QUICK = Schedule(rounds=2, budget_s=0.01)
SMALL = Settings(size=(32, 64), batch=2, schedule=QUICK)
NETWORKS = ('repnext_m0', 'recnext_a0', 'inception_next_atto')
ROW_KEYS = {
    *('variant', 'ratio', 'interval', 'confidence', 'rounds', 'verdict', 'p50_ms', 'p90_ms'),
    *('p99_ms', 'runs', 'noise', 'settled', 'first_run_ms', 'build_ms', 'memory_bytes'),
}


# --- what is compared


@pytest.mark.parametrize(
    'command, name',
    [
        *(('train-step', name) for name in NETWORKS),
        *(('inference', name) for name in NETWORKS),
        *(('layers', name) for name in benchmark.LAYERS),
    ],
)
def test_all_forms_of_a_subject_compute_the_same(command: str, name: str) -> None:
    # Norms over two values alone would make much of any rounding.
    settings = Settings(size=(64, 128), batch=2, channels=16)
    subject = benchmark.COMMANDS[command](name, settings)
    expected = None
    for form, build in subject.forms.items():
        torch.manual_seed(0)
        model = build().train(subject.train)
        assert Trial(subject, Variant(form), settings).image.shape == subject.shape
        torch.manual_seed(1)
        outputs = model.double()(torch.randn(subject.shape, dtype=torch.float64))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert outputs[0].requires_grad or not subject.train
        if expected is not None and form != 'single':  # which differs at the border
            torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
        expected = expected or outputs


def test_the_reference_of_training_is_the_published_form() -> None:
    subject = benchmark.train_step('repnext_m0', SMALL)
    trial = Trial(subject, subject.reference, SMALL)
    assert isinstance(trial.model, RepNeXt)
    assert str(subject.reference) == 'branches'
    assert trial.model.stages[0].blocks[0].token_mixer.conv_s.fast is False
    assert trial.model.training
    trial.run()
    grads = {name: p.grad for name, p in trial.model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    trial.run()  # gradients start anew
    assert torch.allclose(
        trial.model.stem.stem[0].conv.weight.grad, grads['stem.stem.0.conv.weight'], rtol=1e-3
    )


def test_the_reference_of_inference_keeps_the_norms_that_fuse_leaves() -> None:
    subject = benchmark.inference('repnext_m0', SMALL)
    norms = {
        str(v): sum(isinstance(m, _BatchNorm) for m in Trial(subject, v, SMALL).model.modules())
        for v in (subject.reference, Variant('full'))
    }
    assert norms == {'upstream': 17, 'full': 0}


def test_a_variant_has_its_memory_format_and_starts_from_a_contiguous_image() -> None:
    subject = benchmark.train_step('inception_next_atto', SMALL)
    trial = Trial(subject, Variant('merged', channels_last=True), SMALL)
    assert trial.image.is_contiguous()
    for output in trial.forward():
        assert output.is_contiguous(memory_format=torch.channels_last)
    for output in Trial(subject, Variant('merged'), SMALL).forward():
        assert output.is_contiguous()


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval_freezes_the_statistics_of_networks_and_layers(norm_eval: bool) -> None:
    settings = Settings(size=(32, 32), batch=2, channels=16, norm_eval=norm_eval)
    for subject in (
        benchmark.train_step('repnext_m0', settings),
        benchmark.layer('downsample', settings),
    ):
        trial = Trial(subject, subject.reference, settings)
        before = copy.deepcopy(trial.model.state_dict())
        trial.run()
        moved = [
            name
            for name, value in trial.model.state_dict().items()
            if 'running' in name and not torch.equal(value, before[name])
        ]
        assert bool(moved) is not norm_eval


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_other_dtypes_are_autocast(dtype: str) -> None:
    settings = Settings(size=(32, 32), dtype=dtype)
    subject = benchmark.inference('repnext_m0', settings)
    outputs = Trial(subject, subject.reference, settings).forward()
    assert {str(output.dtype) for output in outputs} == {f'torch.{dtype}'}


def test_a_layer_is_asked_for_the_gradient_of_its_input() -> None:
    subject = benchmark.layer('gelu', SMALL)
    trial = Trial(subject, subject.reference, SMALL)
    # Without one, nothing of a GELU would be kept for backward.
    assert trial.memory() == trial.image.numel() * 4
    trial.run()


# --- the result


def test_the_result_is_json_with_the_environment_and_a_row_per_variant() -> None:
    result = benchmark.run('train-step', ['repnext_m0'], ['merged', 'merged/channels_last'], SMALL)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result))
    assert set(result) == {
        *('schema_version', 'command', 'settings', 'environment', 'load', 'comparisons')
    }
    assert result['settings']['size'] == (32, 64)
    assert result['settings']['schedule']['rounds'] == 2
    assert result['settings']['keeps_memory'] == keep_freed_memory()
    assert {'cpu', 'isa', 'threads', 'versions', 'gpu', 'load_average'} <= set(
        result['environment']
    )
    assert {'headline', 'reason'} <= set(result['load'])
    [comparison] = result['comparisons']
    assert comparison['shape'] == [2, 3, 32, 64]
    assert comparison['floor']['limit'] >= 1
    rows = comparison['rows']
    assert [row['variant'] for row in rows] == ['branches', 'merged', 'merged/channels_last']
    assert all(set(row) == ROW_KEYS for row in rows)
    assert rows[0]['verdict'] == 'reference'
    assert all(row['memory_bytes'] > 0 for row in rows)


def test_a_merged_layer_keeps_less_for_backward() -> None:
    subject = benchmark.layer('chunk_conv', Settings(size=(64, 64), batch=2, channels=16))
    # One convolution has one output to keep, eleven have eleven.
    kept = [Trial(subject, Variant(form), SMALL).memory() for form in ('branches', 'merged')]
    assert kept[1] < kept[0]


def test_compile_adds_every_variant_and_the_reference_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[nn.Module] = []

    def compile_nothing(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, 'compile', compile_nothing)
    settings = Settings(size=(8, 8), channels=8, compile=True, schedule=QUICK)
    result = benchmark.run('layers', ['chunk_conv'], ['merged'], settings)
    rows = [row['variant'] for row in result['comparisons'][0]['rows']]
    assert rows == ['branches', 'merged', 'branches/compile', 'merged/compile']
    assert len(compiled) == 2


def test_a_compiled_layer_computes_the_same_and_its_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As it is compiled for a CPU, up to the C++ compiler.
    compile_graphs = functools.partial(torch.compile, backend='aot_eager')
    monkeypatch.setattr(torch, 'compile', compile_graphs)
    settings = Settings(size=(8, 8), channels=8)
    subject = benchmark.layer('gelu', settings)
    eager, compiled = (
        Trial(subject, Variant('merged', compiled=c), settings) for c in (False, True)
    )
    assert compiled.call is not compiled.model
    torch.testing.assert_close(eager.forward(), compiled.forward(), rtol=1e-5, atol=1e-6)
    assert compiled.memory() == eager.memory() == 2 * 8 * 8 * 8 * 4


def test_without_variants_every_form_is_measured_and_layers_in_both_memory_formats() -> None:
    for subject, expected in [
        (benchmark.train_step('repnext_m0', SMALL), ['merged', 'merged_nchw', 'save_memory']),
        (benchmark.layer('gelu', SMALL), ['merged', 'merged/channels_last']),
        (benchmark.layer('batch_norm', SMALL), ['torch/channels_last']),
    ]:
        assert [str(v) for v in benchmark.default_variants(subject)] == expected


# --- names and sizes


@pytest.mark.parametrize(
    'name, family, arch',
    [
        ('repnext_m4', RepNeXt, 'm4'),
        ('recnext_t_share_channel', RecNeXt, 't_share_channel'),
        ('inception_next_tiny', InceptionNeXt, 'tiny'),
    ],
)
def test_networks_are_named_by_family_and_arch(name: str, family: type, arch: str) -> None:
    assert backbones.look_up(name) == (family, arch)
    with torch.device('meta'):
        model = backbones.build(name, out_indices=(1,))
    assert (type(model), model.arch, len(model.out_channels)) == (family, arch, 1)


@pytest.mark.parametrize('text, size', [('512', (512, 512)), ('800x1333', (800, 1333))])
def test_a_size_is_one_number_or_two(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', '0', '12x', '1x2x3', '-5', '4.5', 'big'])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match='HEIGHTxWIDTH'):
        parse_size(text)


@pytest.mark.parametrize(
    'text', ['merged', 'merged/channels_last', 'merged/compile', 'merged/channels_last/compile']
)
def test_variants_are_written_as_they_are_read(text: str) -> None:
    assert str(Variant.parse(text, ['branches', 'merged'])) == text


@pytest.mark.parametrize('text', ['mergd', 'merged/nhwc', '', 'merged/'])
def test_unknown_variants_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'is not one of .* write FORM'):
        Variant.parse(text, ['branches', 'merged'])


# --- the tool


TOOL = script('benchmark.py')


def test_the_tool_writes_json_alone_on_stdout(tmp_path: Path) -> None:
    output = succeed(
        *('benchmark.py', 'layers', 'chunk_conv', 'gelu', '--channels', '8', '--size', '8x12'),
        *('--budget-s', '0.1', '--rounds', '2', '--profile', '--json', '-', '--threads', '1'),
        cwd=tmp_path,
    )
    result = json.loads(output)
    assert [c['subject'] for c in result['comparisons']] == ['chunk_conv', 'gelu']
    assert result['comparisons'][0]['shape'] == [2, 8, 8, 12]
    assert result['environment']['threads'] == 1
    profiles = result['comparisons'][1]['profiles']
    assert {'aten::gelu', 'aten::gelu_backward'} <= {e['operator'] for e in profiles['merged']}


def test_the_tool_shows_a_table_and_writes_a_file(tmp_path: Path) -> None:
    output = succeed_here(
        TOOL,
        *('train-step', 'inception_next_atto', '--size', '32x64', '--batch', '1'),
        *('--budget-s', '0.1', '--variants', 'merged', '--json', 'result.json', '--profile'),
        cwd=tmp_path,
    )
    assert 'inception_next_atto, training step, 1x3x32x64, float32' in output
    assert 'Noise floor' in output
    assert 'merged: time by operator' in output
    assert json.loads((tmp_path / 'result.json').read_text())['command'] == 'train-step'


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['train-step', 'repnext_m44'], "Did you mean 'repnext_m4'?"),
        (['inference', 'repnext_m0', '--size', '5l2'], "size '5l2' must be one whole number"),
        (['inference', 'repnext_m0', '--variants', 'exat'], "'exat' is not one of upstream, full"),
        (['train-step', 'repnext_m0', '--size', '32', '--batch', '1'], 'cannot compute 1x3x32x32'),
        (['layers', 'gello'], "'gello' is no layer to time"),
        (['layers', 'gelu', '--batch', '0'], 'batch=0'),
        (['layers', 'gelu', '--threads', '0'], '--threads 0 must be at least 1'),
        (['layers', 'gelu', '--rounds', '1'], 'rounds=1 must be at least 2'),
        (['layers', 'gelu', '--budget-s', '0'], 'budget_s=0.0 must be more than 0'),
        (['layers', 'gelu', '--json', 'no/folder.json'], 'its folder does not exist'),
        (['layers', 'gelu', '--device', 'cuda'], 'torch sees no GPU; use cpu'),
    ],
)
def test_wrong_inputs_are_told_in_one_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    done = run_here(TOOL, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert sentence in done.stderr


def test_usage_errors_have_their_own_exit_code(tmp_path: Path) -> None:
    done = run_here(TOOL, 'trainstep', cwd=tmp_path)
    assert done.returncode == 2
    assert 'train-step' in done.stderr

"""tools/deploy.py: what it takes, refuses, says and leaves behind."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blocking import block
from conftest import REPO, forget_runs, randomise
from PIL import Image
from tool_runs import environment, run_here, succeed

from repnext_mm import RecNeXt, RepNeXt, reparameterize
from repnext_mm.deploy.cli import deploy_main, format_table
from repnext_mm.deploy.errors import UsageError
from repnext_mm.deploy.folders import LOCK, make_folder
from repnext_mm.deploy.formats import FORMATS, TORCH_EXPORT, choose_formats
from repnext_mm.deploy.job import Job
from repnext_mm.deploy.source import NAMES, load_source
from repnext_mm.engine.errors import Terminated, signals_wait, sigterm_raises
from repnext_mm.runtimes import open_artifact

CONFIG = REPO / 'configs' / 'mask_rcnn_repnext_m0_shapes.py'
STEM = 'repnext_m0_64x64_b1_full_fp32'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training a detector with RepNeXt M0 leaves."""
    path = tmp_path_factory.mktemp('weights') / 'epoch_12.pth'
    state = {f'backbone.{k}': v for k, v in randomise(RepNeXt('m0')).state_dict().items()}
    torch.save({'meta': {}, 'state_dict': state | {'neck.weight': torch.zeros(3)}}, path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """An export of a config's backbone; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp('deploy')
    argv = [str(CONFIG), str(checkpoint), '--size', '64', '--format', 'pth,onnx']
    assert deploy_main([*argv, '--work-dir', str(path)]) == 0
    return path


def deploy(*argv: object) -> int:
    return deploy_main([str(arg) for arg in argv])


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# --- a good run


def test_what_is_written(folder: Path, checkpoint: Path) -> None:
    name = 'mask_rcnn_repnext_m0_shapes_64x64_b1_full_fp32'
    assert contents(folder) == {
        *(f'{name}.pth', f'{name}.onnx', 'golden_64x64_b1.npz', 'report.json', 'report.md')
    }
    report = json.loads((folder / 'report.json').read_text())
    assert report['schema_version'] == 2
    assert report['status'] == 'ok'
    assert report['model']['arch'] == 'm0'
    assert report['model']['weights_source'] == 'checkpoint'
    assert len(report['model']['checkpoint_sha256']) == 64
    assert report['model']['details']['out_strides'] == [4, 8, 16, 32]
    (plan,) = report['plans']
    assert plan['name'] == 'full'
    assert plan['bn_left'] == 0
    assert plan['convs_after'] < plan['convs_before']
    assert {step['exactness'] for step in plan['steps']} == {'exact'}
    assert all(stage['max_rel'] < 1e-9 for stage in plan['proof_float64'])
    assert [a['format'] for a in report['artifacts']] == ['pth', 'onnx']
    assert {row['runtime'] for row in report['parity']} == {'torch', 'onnxruntime'}
    assert report['env']['versions']['onnxruntime']
    assert report['warnings'] == []
    text = (folder / 'report.md').read_text('utf-8')
    assert '| onnx | fp32 | ok | ' in text
    assert f'{name}.onnx |' in text


def test_the_checkpoint_is_what_was_exported(folder: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    model = RepNeXt('m0').eval()
    model.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in state.items() if 'neck' not in k}
    )
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
    for path in folder.glob('mask_rcnn*'):
        with open_artifact(path) as artifact:
            for got, want in zip(artifact.run(image), expected, strict=True):
                atol = 1e-4 * float(want.std())
                torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=atol)


def test_fused_weights_are_mm_weights(folder: Path) -> None:
    (path,) = folder.glob('*.pth')
    cfg = dict(type='Pretrained', checkpoint=str(path))
    model = RepNeXt('m0', deploy=True, init_cfg=cfg).eval()
    model.init_weights()
    image = torch.randn(1, 3, 64, 64)
    with open_artifact(path) as artifact, torch.no_grad():
        for got, want in zip(artifact.run(image), model(image), strict=True):
            assert torch.equal(torch.from_numpy(got), want)


def test_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy('check', folder) == 0
    assert capsys.readouterr().out.count('ok: mask_rcnn') == 2
    copy = shutil.copytree(folder, tmp_path / 'copy')
    (onnx,) = copy.glob('*.onnx')
    golden = copy / 'golden_64x64_b1.npz'
    with np.load(golden) as arrays:
        changed = dict(arrays)
    changed['stage2'][0, 3] += 1.0
    np.savez(golden, **changed)
    assert deploy('check', copy / 'report.json') == 6
    assert re.search(r'stage2: \S+ of its std', capsys.readouterr().err)
    shutil.copy(folder / golden.name, golden)
    onnx.write_bytes(onnx.read_bytes() + b'\0')
    assert deploy('check', copy) == 6
    error = capsys.readouterr().err
    assert '1 of 2 artifacts failed' in error
    assert 'the file was changed since it was exported' in error
    onnx.unlink()
    assert deploy('check', copy) == 6
    assert 'the file is missing' in capsys.readouterr().err
    assert deploy('check', tmp_path) == 2
    assert 'report.json does not exist; give the folder' in capsys.readouterr().err


def test_a_folder_grows(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / 'copy')
    argv = (CONFIG, checkpoint, '--size', 64, '--work-dir', copy)
    assert deploy(*argv, '--format', 'torchscript') == 0
    report = json.loads((copy / 'report.json').read_text())
    assert [a['format'] for a in report['artifacts']] == ['torchscript', 'pth', 'onnx']
    assert {row['format'] for row in report['parity']} == {'torchscript', 'pth', 'onnx'}
    assert deploy('check', copy, '--trust') == 0


def test_nothing_is_replaced_unasked(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / 'copy')
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    argv = (CONFIG, checkpoint, '--size', 64, '--work-dir', copy, '--format', 'pth')
    assert deploy(*argv) == 2
    assert 'exists already; add --force to replace it.' in capsys.readouterr().err
    other = (CONFIG, '--size', 64, '--work-dir', copy, '--format', 'pt2')
    assert deploy(*other) == 2
    assert 'artifacts of another model or other weights' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert deploy(*argv, '--force') == 0
    assert json.loads((copy / 'report.json').read_text())['status'] == 'ok'


def test_json_is_all_there_is_on_stdout(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ('repnext_m0', checkpoint, '--size', 64, '--format', 'pth', '--work-dir', tmp_path)
    assert deploy(*argv, '--json') == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed == json.loads((tmp_path / 'report.json').read_text())
    assert 'ok: ' in captured.err
    forget_runs()  # as in a process of its own
    assert deploy(*argv, '--force', '--quiet') == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('', '')


def test_random_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ('repnext_m0', '--size', 64, '--format', 'pth', '--parity', 'off')
    assert deploy(*argv, '--work-dir', tmp_path) == 0
    sentence = 'random weights: fine for latency, meaningless for accuracy'
    assert f'warning: {sentence}' in capsys.readouterr().out
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['warnings'] == [sentence]
    assert report['model']['weights_source'] == 'random'
    assert [a['status'] for a in report['artifacts']] == ['unverified']
    assert f'- {sentence}' in (tmp_path / 'report.md').read_text('utf-8')


@pytest.mark.parametrize('name', ['repnext_m0', 'recnext_a0', 'inception_next_atto'])
def test_random_weights_hide_nothing(name: str) -> None:
    """Every norm and bias does something, signals keep their size, and a seed gives the same."""
    model = load_source(name, seed=3).model
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        assert norm.momentum is not None
        for value in (norm.running_mean, norm.running_var - 1, norm.weight - 1, norm.bias):
            assert float(value.detach().abs().mean()) > 1e-3
    with torch.no_grad():
        stages = model(torch.randn(1, 3, 64, 64))
        again = load_source(name, seed=3).model(torch.randn(1, 3, 64, 64))
    assert len(again) == len(stages)
    assert all(0.05 < float(stage.std()) < 50 for stage in stages)
    states = [load_source(name, seed=seed).model.state_dict() for seed in (3, 4)]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in states[0].items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.slow
def test_512_by_512(tmp_path: Path) -> None:
    output = succeed('deploy.py', 'repnext_m0', '--format', 'onnx', cwd=tmp_path)
    folder = tmp_path / 'work_dirs' / 'deploy' / 'repnext_m0'
    report = json.loads((folder / 'report.json').read_text())
    assert [a['status'] for a in report['artifacts']] == ['ok']
    assert [row['measures']['shape'] for row in report['parity'][:2]] == [
        [1, 40, 128, 128],
        [1, 80, 64, 64],
    ]
    assert all(row['passed'] for row in report['parity'])
    assert (folder / 'repnext_m0_512x512_b1_full_fp32.onnx').exists()
    assert output.splitlines()[-1] == (
        'Wrote work_dirs/deploy/repnext_m0/report.json; '
        'next: python tools/deploy.py check work_dirs/deploy/repnext_m0'
    )


# --- what a user gets wrong


@pytest.mark.parametrize(
    'argv, code, sentence',
    [
        ('repnext_m0 --format onxx', 2, "unknown format 'onxx'. Did you mean 'onnx'? Formats: pth"),
        ('repnext_m0 --format onnx,,', 2, "unknown format ''"),
        ('repnext_m9 --format pth', 3, "there is no model 'repnext_m9'. Did you mean 'repnext_m"),
        ('configs/nope.py', 3, 'there is no config configs/nope.py'),
        ('missing.pth', 3, 'missing.pth'),
        ('repnext_m0 missing.pth', 3, 'missing.pth'),
        ('repnext_m0 --size 500', 2, '--size 500: stride 32 leaves 20 px; use 480 or 512, or'),
        ('recnext_t --size 96', 2, '--size 96: stride 64 leaves 32 px; use 64 or 128'),
        ('repnext_m0 --size 512x', 2, "'512x' is not a size; give 512"),
        ('repnext_m0 --size 0', 2, "'0' is not a size"),
        ('repnext_m0 --batch 0', 2, "'0' is not a positive number"),
        ('repnext_m0 --opset 9', 2, 'invalid choice: 9 (choose from 18, 19'),
        ('repnext_m0 --ios-target 12', 2, 'invalid choice: 12 (choose from 15'),
        ('repnext_m0 --format pth --opset 18', 2, '--opset is not an option of pth; leave it out'),
        ('repnext_m0 --format onnx --dtype bf16', 2, '--dtype bf16 is not possible for onnx'),
        ('repnext_m0 --format coreml --dynamic hw', 2, '--dynamic hw is not possible for coreml'),
        ('repnext_m0 --format onnx --dtype int8', 2, '--dtype int8 needs --calib, a folder of'),
        (
            'repnext_m0 --dtype int8 --calib . --calib-images 1',
            2,
            '--calib-images 1 is too few to know the ranges of values; give 8 at least',
        ),
        ('repnext_m0 --out-indices 0,7', 3, 'out_indices=(0, 7) must be one or more increasing'),
        ('repnext_m0 --preprocess embed', 2, '--preprocess embed needs a config whose data_pre'),
        ('repnext_m0 --nms host', 2, '--nms and --output are for --scope model'),
        ('repnext_m0 --scope model', 2, '--scope model needs the config of a training and its'),
        ('repnext_m0 --plan best', 2, "invalid choice: 'best'"),
        ('repnext_m0 --parity-input no.jpg', 2, 'no.jpg cannot be read'),
        ('', 2, 'the following arguments are required'),
        ('check', 2, 'the following arguments are required: folder'),
    ],
)
def test_refusals(
    argv: str,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = deploy_main(argv.split())
    except SystemExit as stop:  # argparse
        found = stop.code
    error = capsys.readouterr().err
    assert found == code, error
    assert sentence in error
    assert 'Traceback' not in error
    assert len(error.strip().splitlines()[-1]) < 700
    assert not [path for path in tmp_path.rglob('*') if path.suffix in ('.onnx', '.pth')]


def test_checkpoints_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: object) -> str:
        out = tmp_path / 'out'
        assert deploy(*argv, '--format', 'pth', '--size', 64, '--work-dir', out) == 3
        assert not out.exists()
        return capsys.readouterr().err

    other = tmp_path / 'other.pth'
    torch.save(RecNeXt('m0').state_dict(), other)
    assert "it fits RecNeXt(arch='m0')" in refused('repnext_m0', other)

    fused = tmp_path / 'single.pth'
    model = reparameterize(randomise(RepNeXt('m0')).eval(), 'single', accept_inexact=True)
    torch.save(model.state_dict(), fused)
    error = refused('repnext_m0', fused)
    assert "already fused with plan='single', which cannot be undone to plan='full'" in error
    assert error.strip().endswith('Or pass --plan single.')

    diverged = tmp_path / 'nan.pth'
    state = RepNeXt('m0').state_dict()
    next(iter(state.values()))[0] = float('nan')
    torch.save(state, diverged)
    assert 'has NaN or infinity' in refused('repnext_m0', diverged)

    stranger = tmp_path / 'stranger.pth'
    torch.save({'fc.weight': torch.zeros(3)}, stranger)
    assert 'fits no network of this package' in refused(stranger)

    (tmp_path / 'text.pth').write_text('hello')
    assert 'is not a weight file' in refused(tmp_path / 'text.pth')

    config = tmp_path / 'resnet.py'
    config.write_text("model = dict(type='X', backbone=dict(type='ResNet', depth=50))")
    assert "is 'ResNet', which this package cannot deploy" in refused(config)


def test_a_fused_file_is_a_model(tmp_path: Path) -> None:
    """Fused less far than asked, it is fused the rest of the way."""
    path = tmp_path / 'upstream.pth'
    model = randomise(RepNeXt('m0')).eval()
    torch.save(reparameterize(model, 'upstream').state_dict(), path)
    out = tmp_path / 'out'
    assert deploy(path, '--format', 'pth', '--size', 64, '--work-dir', out) == 0
    image = torch.randn(1, 3, 64, 64)
    with open_artifact(out / f'{STEM}.pth') as artifact, torch.no_grad():
        assert artifact.metadata['plan'] == 'full'
        for got, want in zip(artifact.run(image), model(image), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
    again = tmp_path / 'again'
    assert deploy(out / f'{STEM}.pth', '--format', 'pth', '--size', 64, '--work-dir', again) == 0


def test_a_missing_package(tmp_path: Path) -> None:
    blocked = tmp_path / 'blocked'
    blocked.mkdir()
    block(blocked, 'onnxscript', 'openvino')
    path = os.pathsep.join([str(blocked), str(REPO), str(REPO / 'tests')])

    def deployed(formats: str) -> subprocess.CompletedProcess:
        tool = [sys.executable, str(REPO / 'tools' / 'deploy.py'), 'repnext_m0', '--size', '64']
        return subprocess.run(
            [*tool, '--format', formats],
            cwd=tmp_path,
            env=environment() | {'PYTHONPATH': path},
            capture_output=True,
            text=True,
        )

    done = deployed('onnx')
    assert done.returncode == 4, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        'error: --format onnx needs onnxscript>=0.6.2, not installed here; '
        "run: pip install 'onnxscript>=0.6.2'"
    )
    assert not (tmp_path / 'work_dirs').exists()


def test_a_package_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS['pt2'].packages, 'torch', 'torch>=999')
    argv = ('repnext_m0', '--size', 64, '--format', 'pt2', '--work-dir', tmp_path / 'out')
    assert deploy(*argv) == 4
    assert '--format pt2 needs torch>=999, not installed here' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_all_skips_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, row in FORMATS.items():
        if name not in ('pth',):
            packages = {**row.packages, f'absent_{name}': f'absent-{name}>=1'}
            monkeypatch.setattr(type(row), 'packages', packages)
    argv = ('repnext_m0', '--size', 64, '--format', 'all', '--work-dir', tmp_path)
    assert deploy(*argv) == 0
    assert 'skipped onnx: --format onnx needs absent-onnx>=1' in capsys.readouterr().out
    report = json.loads((tmp_path / 'report.json').read_text())
    skipped = {record['format']: record for record in report['skipped']}
    assert set(skipped) == {name for name, row in FORMATS.items() if row.in_all} - {'pth'}
    assert skipped['onnx']['fix'] == "run: pip install 'absent-onnx>=1'"


def test_strict_stops_at_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ('repnext_m0', '--size', 64, '--format', 'coreml', '--work-dir', tmp_path / 'out')
    assert deploy(*argv, '--strict') == 4
    assert 'is tested by its makers up to torch' in capsys.readouterr().err


# --- the folder, the disk and the signals


def test_folders_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').write_text('mine')
    argv = ('repnext_m0', '--size', 64, '--format', 'pth', '--work-dir', tmp_path / 'file')
    assert deploy(*argv) == 2
    assert 'cannot be written (File exists); give another folder.' in capsys.readouterr().err
    assert (tmp_path / 'file').read_text() == 'mine'


def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / 'theirs').mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    if os.geteuid():
        with pytest.raises(UsageError, match='Permission denied'):
            make_folder(tmp_path / 'theirs')
        return
    child = os.fork()  # root may write anywhere
    if not child:
        code = 1
        try:
            os.seteuid(65534)
            make_folder(tmp_path / 'theirs')
        except UsageError as error:
            code = 0 if 'cannot be written (Permission denied)' in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize('kind', ['pth', 'openvino'])
def test_no_space(kind: str, tmp_path: Path, small_files_only: Callable[[int], None]) -> None:
    small_files_only(2_000_000)
    argv = ('repnext_m0', '--size', '64', '--format', kind, '--work-dir', tmp_path / 'out')
    done = run_here(deploy_main, *argv, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('error: ')
    # What is whole may stay.
    assert contents(tmp_path / 'out') <= {'golden_64x64_b1.npz', 'report.json', 'report.md'}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)]
    if not shutil.which('mount') or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('needs the right to mount a file system')
    yield disk
    subprocess.run(['umount', str(disk)], check=True)


def test_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ('repnext_m0', '--size', 64, '--format', 'pth,torchscript', '--work-dir', small_disk)
    assert deploy(*argv) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f'error: {small_disk} has no space for the files (')
    assert error.endswith('free some space, or give another --work-dir.')
    # What was half-written is gone, so that there is room to report the failure.
    assert contents(small_disk) == {'golden_64x64_b1.npz', 'report.json', 'report.md'}
    report = json.loads((small_disk / 'report.json').read_text())
    assert [f['format'] for f in report['failures']] == ['pth', 'torchscript']


@pytest.mark.parametrize(
    'signum, code, word',
    [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')],
)
def test_interrupted(
    signum: int, code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')

    # Where tests run in the background of a script, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def half_of_it(job: Job, path: Path) -> None:
        path.write_text('half')
        assert [part for part in out.iterdir() if part.name.startswith('.partial-')]
        signal.raise_signal(signum)
        time.sleep(60)  # until Python sees it

    monkeypatch.setattr(FORMATS['onnx'], 'export', half_of_it)
    argv = ('repnext_m0', '--size', 64, '--format', 'pth,onnx', '--work-dir', out)
    try:
        done = run_here(deploy_main, *argv, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == code
    assert done.stderr.strip().endswith(word)
    assert 'Traceback' not in done.stderr
    assert contents(out) == {
        *('notes.txt', f'{STEM}.pth', 'golden_64x64_b1.npz', 'report.json', 'report.md')
    }
    # The next run goes on from there.
    monkeypatch.undo()
    assert deploy(*argv) == 0
    report = json.loads((out / 'report.json').read_text())
    assert (report['status'], len(report['artifacts'])) == ('ok', 2)
    assert deploy(*argv) == 2


def test_signals_wait_for_code_that_swallows_them() -> None:
    reached = []

    def convert() -> None:
        with signals_wait():
            try:
                signal.raise_signal(signal.SIGTERM)
                reached.append('the end')
            except BaseException:
                reached.append('swallowed')
        reached.append('too far')

    with sigterm_raises(), pytest.raises(Terminated):
        convert()
    assert reached == ['the end']


@pytest.mark.parametrize('tool', ['deploy', 'train'])
def test_interrupted_while_it_is_imported(tool: str) -> None:
    done = subprocess.Popen(
        [sys.executable, REPO / 'tools' / f'{tool}.py', 'none'],
        stderr=subprocess.PIPE,
        text=True,
        # Where tests run in the background of a script, Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(1.0)
    done.send_signal(signal.SIGINT)
    _, error = done.communicate(timeout=120)
    assert (done.returncode, error) == (130, 'interrupted\n')


def test_what_int8_refuses_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = tmp_path / 'noise'
    noise.mkdir()
    generator = np.random.default_rng(0)
    for number in range(20):
        pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(noise / f'{number}.png')
    argv = ('repnext_m0', '--size', 64, '--dtype', 'int8', '--calib', noise)
    assert deploy(*argv, '--work-dir', tmp_path / 'out') == 2
    assert 'noise or blank' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    left = tmp_path / f'.partial-{dead.pid}-abc'
    left.mkdir()
    (left / 'half.onnx').write_text('...')
    report = tmp_path / f'report.json.{dead.pid}.tmp'
    report.write_text('{')
    argv = ('repnext_m0', '--size', 64, '--format', 'pth', '--work-dir', tmp_path)
    assert deploy(*argv) == 0
    assert not left.exists()
    assert not report.exists()


def test_folder_into_which_another_run_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other is a process that holds the lock; what it is writing stays."""
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import sys, time; from repnext_mm.files import hold; lock = hold(sys.argv[1]); '
            'print("held", flush=True); time.sleep(600)',
            str(tmp_path / LOCK),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    partial = tmp_path / '.partial-abc'
    partial.mkdir()
    argv = ('repnext_m0', '--size', 64, '--format', 'pth', '--work-dir', tmp_path)
    try:
        assert deploy(*argv) == 2
        assert f'process {holder.pid}' in capsys.readouterr().err
        assert partial.exists()
    finally:
        holder.kill()
        holder.wait()
    assert deploy(*argv) == 0
    assert not partial.exists()


# --- the table of formats


def test_formats_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy('formats', '--json') == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in rows] == list(FORMATS)
    assert deploy('formats') == 0
    assert capsys.readouterr().out.strip() == '\n'.join(format_table())


def test_documentation_has_the_table() -> None:
    text = (REPO / 'docs' / 'deploy.md').read_text('utf-8')
    assert '\n'.join(format_table()) in text, 'paste what `tools/deploy.py formats` prints'


def test_extras_install_what_formats_need() -> None:
    config = configparser.ConfigParser()
    config.read(REPO / 'setup.cfg')
    extras = {
        name: set(filter(None, text.splitlines()))
        for name, text in config['options.extras_require'].items()
    }
    for row in FORMATS.values():
        packages = set(row.packages.values()) - {*TORCH_EXPORT.values()}  # torch is no extra
        if packages:
            assert packages == extras['onnx' if row.name == 'web' else row.name]
        needed = packages | {*row.int8_packages.values()}
        assert needed <= extras['deploy']
        if 'int8' in row.dtypes:
            assert needed <= extras['int8']


def test_all_is_every_format_but_the_bridge_and_the_page() -> None:
    assert [row.name for row in choose_formats('all')] == [
        name for name in FORMATS if name not in ('torchscript', 'web')
    ]
    assert [row.name for row in choose_formats('pt2,pth,pt2')] == ['pt2', 'pth']


def test_every_arch_has_a_name() -> None:
    assert {'repnext_m0', 'recnext_a0', 'recnext_t_share_channel'} <= set(NAMES)
    assert len(NAMES) == sum(len(f.arch_zoo) for f in {family for family, _ in NAMES.values()})

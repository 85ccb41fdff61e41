"""The installer: what it refuses, what it reuses, and what it says of a failure."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / 'tools' / 'install_stack.py'


@pytest.fixture(scope='module')
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location('install_stack', SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_up(venv: Path, stack: str = 'mm', **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), '--venv', str(venv), '--stack', stack]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_old_pythons_can_read_it() -> None:
    """They must reach the sentence that refuses them."""
    tree = ast.parse(SCRIPT.read_text('utf-8'), feature_version=(3, 6))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert '__future__' not in [node.module for node in imports]


def test_without_compiler(tmp_path: Path) -> None:
    run = set_up(
        tmp_path / 'venv',
        'onedl',
        CC='no-such-cc',
        REPNEXT_MM_WHEELHOUSE=str(tmp_path / 'wheelhouse'),
    )
    assert run.returncode == 1
    assert run.stderr.startswith('set-up stopped: the compiler `no-such-cc` was not found')
    assert 'apt-get install gcc g++' in run.stderr
    assert 'or use the default stack' in run.stderr
    assert not (tmp_path / 'venv').exists()


def test_when_no_compiler_is_needed(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('CC', 'no-such-cc')
    monkeypatch.setenv('REPNEXT_MM_WHEELHOUSE', str(tmp_path))
    installer.check_machine(tmp_path / 'venv', compiles=False)
    with pytest.raises(installer.SetupError, match='no-such-cc'):
        installer.check_machine(tmp_path / 'venv', compiles=True)
    kept = tmp_path / f'onedl-mmcv-{installer.compiled_version()}-of-some-torch'
    kept.mkdir()
    (kept / f'onedl_mmcv-{installer.CPYTHON}.whl').touch()
    installer.check_machine(tmp_path / 'venv', compiles=True)


def wheel_with(extension: Path, folder: Path) -> Path:
    path = folder / 'mmcv.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(extension, f'mmcv/_ext{sysconfig.get_config_var("EXT_SUFFIX")}')
        archive.writestr('mmcv/_ext.pyi', '')
    return path


def test_operators_that_do_not_load(installer: ModuleType, tmp_path: Path) -> None:
    (tmp_path / 'broken').write_bytes(b'no library')
    wheel = wheel_with(tmp_path / 'broken', tmp_path)
    assert not installer.ops_load(Path(sys.executable), wheel)


@pytest.mark.compat
def test_operators_that_load(installer: ModuleType, tmp_path: Path) -> None:
    mmcv = importlib.util.find_spec('mmcv')
    assert mmcv and mmcv.origin
    compiled = list(Path(mmcv.origin).parent.glob('_ext*.so'))
    if not compiled:
        pytest.skip('the installed mmcv has no compiled operators')
    assert installer.ops_load(Path(sys.executable), wheel_with(compiled[0], tmp_path))


def test_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    run = set_up(tmp_path / 'mine')
    assert run.returncode == 1
    assert 'is not a virtual environment, so it will not be replaced' in run.stderr
    assert (tmp_path / 'mine' / 'thesis.txt').exists()


def test_unknown_stack(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), '--venv', str(tmp_path / 'venv'), '--stack', 'mmlab']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert 'choose from mm, onedl' in run.stderr.replace("'", '')


def test_what_makes_an_environment_stale(installer: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / 'venv'
    stamp = installer.wanted_stamp('mm', venv)
    assert installer.changes(venv, stamp) == ['nothing there yet']
    venv.mkdir()
    assert installer.changes(venv, stamp) == ['an unfinished set-up']
    installer.write_stamp(venv, stamp)
    assert installer.changes(venv, stamp) == []
    assert installer.changes(venv, installer.wanted_stamp('onedl', venv)) == [
        'the pins',
        'the requirements in setup.cfg',
    ]
    assert installer.changes(venv, installer.wanted_stamp('mm', tmp_path / 'moved')) == [
        'the folder'
    ]


def test_up_to_date_environment_is_reused(installer: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / 'venv'
    venv.mkdir()
    installer.write_stamp(venv, installer.wanted_stamp('mm', venv))
    run = set_up(venv, CC='no-such-cc', REPNEXT_MM_WHEELHOUSE=str(tmp_path))
    assert run.returncode == 0
    assert run.stdout == 'venv is up to date (stack mm)\n'


def test_pins_and_requirements_are_part_of_the_stamp(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / 'venv'
    before = installer.wanted_stamp('mm', venv)
    pins = tmp_path / 'constraints.txt'
    pins.write_text(installer.CONSTRAINTS['mm'].read_text().replace('timm==', 'timm==9.'))
    monkeypatch.setitem(installer.CONSTRAINTS, 'mm', pins)
    after = installer.wanted_stamp('mm', venv)
    assert [name for name in before if before[name] != after[name]] == ['the pins']


def test_wheels_are_kept_apart(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST'):
        monkeypatch.delenv(name, raising=False)
    cpu = {'version': '2.7.0+cu126', 'cuda': '12.6', 'home': '/opt/cuda', 'caps': []}
    key = installer.wheel_key(cpu)
    assert key.startswith(
        f'onedl-mmcv-{installer.compiled_version()}-torch2.7.0+cu126-{installer.CPYTHON}-'
    )
    assert key.endswith('-cpu')
    gpu = {**cpu, 'caps': ['8.0', '9.0']}
    others = [
        installer.wheel_key({**cpu, 'version': '2.8.0+cu126'}),
        installer.wheel_key(gpu),
        installer.wheel_key({**gpu, 'cuda': '12.8'}),
    ]
    assert others[1].endswith('-cu12.6-sm8.0_9.0')
    assert len({key, *others}) == 4
    with pytest.raises(installer.SetupError, match='CUDA_VISIBLE_DEVICES= make install'):
        installer.wheel_key({**gpu, 'home': None})


def test_a_failed_step_says_why(installer: ModuleType, tmp_path: Path) -> None:
    steps = installer.Steps(1, tmp_path)
    code = "import sys; print('[3/9] c++'); print('x.cpp:1: fatal error: Python.h: No such file')"
    command = [sys.executable, '-c', f'{code}; print("ERROR: Failed to build"); sys.exit(1)']
    with pytest.raises(installer.SetupError) as caught:
        steps.run('compile', command)
    assert str(caught.value) == (
        'step 1 (compile) failed: x.cpp:1: fatal error: Python.h: No such file '
        f'(complete log: {tmp_path / "1.log"}).'
    )


@pytest.mark.parametrize(
    'log, said',
    [
        ('Collecting torch', ''),
        ('  Progress 12000000 of 530000000', 'downloading, 12 of 530 MB'),
        ('Progress 5 of 5\nInstalling collected packages: torch', 'unpacking'),
        ('  [12/77] c++ -MMD\nwarning: deprecated', 'file 12 of 77'),
    ],
)
def test_progress(installer: ModuleType, log: str, said: str) -> None:
    assert installer.progress(log) == said

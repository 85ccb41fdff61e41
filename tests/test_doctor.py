"""The doctor, on broken environments: real packages with one real fault each."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from blocking import block
from repnext_mm_cli import doctor
from repnext_mm_cli.doctor import Finding, Probe

REPO = Path(__file__).resolve().parent.parent
ONEDL = doctor.detect_stack()[0] == 'onedl'


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules come before the installed ones in every Python started from here."""
    folder = tmp_path / 'site'
    folder.mkdir()
    path = [str(folder), str(REPO), os.environ.get('PYTHONPATH', '')]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, path)))
    return folder


def copy_package(name: str, site: Path, *leave_out: str) -> Path:
    """Copy an installed package, without its sources for compilers and the named files."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    ignore = shutil.ignore_patterns('csrc', '__pycache__', *leave_out)
    return Path(shutil.copytree(Path(spec.origin).parent, site / name, ignore=ignore))


def ext_for_another_torch(package: Path) -> None:
    """Operators that need a symbol which torch lacks: torchvision's, with one renamed in place."""
    torchvision = importlib.util.find_spec('torchvision')
    assert torchvision and torchvision.origin
    (compiled,) = Path(torchvision.origin).parent.glob('_C*.so')
    content = compiled.read_bytes()
    # The second is of torchvision's builds for torch before its stable interface.
    names = (b'aoti_torch_delete_tensor_object', b'_ZN3c106detail14torchCheckFail')
    symbol = next(name for name in names if name in content)
    target = package / f'_ext{sysconfig.get_config_var("EXT_SUFFIX")}'
    target.write_bytes(content.replace(symbol, symbol.replace(b'torch', b'other')))


def examine(*packages: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.diagnose(packages)}


@pytest.mark.slow
@pytest.mark.compat
def test_says_that_this_environment_is_sound() -> None:
    command = [sys.executable, '-m', 'repnext_mm_cli', 'doctor']
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'FAIL' not in run.stdout
    assert run.stdout.rstrip().endswith('All of it works together.')
    operators = 'with its compiled operators' if ONEDL else 'with the operators of torchvision'
    assert operators in run.stdout
    assert re.search(rf'stack +{"onedl" if ONEDL else "mm"}$', run.stdout, re.M)


def test_starts_where_nothing_is_installed(site: Path) -> None:
    block(site, 'torch', 'torchvision', 'timm', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
    command = [sys.executable, '-m', 'repnext_mm_cli', 'doctor']
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert run.returncode == 1
    assert run.stderr == ''
    assert run.stdout.count('is not installed.') == 4
    assert 'waits for torch.' in run.stdout
    assert run.stdout.rstrip().endswith('9 of 12 checks failed.')


@pytest.mark.compat
def test_mmcv_without_compiled_operators(site: Path) -> None:
    """Those of torchvision serve, in mmdet and mmseg too."""
    copy_package('mmcv', site, '_ext*')
    found = examine('torch', 'mmcv', 'mmdet', 'mmseg')
    assert [finding.problem for finding in found.values() if finding.problem] == []
    assert 'operators of torchvision' in found['mmcv'].note


def test_mmcv_for_another_torch(site: Path) -> None:
    ext_for_another_torch(copy_package('mmcv', site, '_ext*'))
    found = examine('torch', 'mmcv')['mmcv']
    assert 'compiled operators do not load' in found.problem
    assert 'undefined symbol: ' in found.problem
    assert 'pip install mmcv-lite==2.1.0' in found.problem


def test_mmcv_that_crashes(site: Path) -> None:
    package = copy_package('mmcv', site, '_ext*')
    (package / '_ext.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n')
    found = examine('mmcv')['mmcv']
    assert 'compiled operators crash (SIGSEGV)' in found.problem
    assert found.fix == doctor.fix('mmcv')


def test_half_removed_mmcv(site: Path) -> None:
    (copy_package('mmcv', site) / 'ops' / '__init__.py').unlink()
    found = examine('torch', 'mmcv')
    assert 'removed or installed only in part' in found['mmcv'].problem
    assert 'pip install mmcv-lite==2.1.0' in found['mmcv'].problem


@pytest.mark.skipif(ONEDL, reason="onedl-mmdetection does not restrict mmcv's version")
def test_mmcv_too_new_for_mmdet(site: Path) -> None:
    package = copy_package('mmcv', site)
    version = package / 'version.py'
    version.write_text(version.read_text().replace("'2.1.0'", "'2.2.0'"))
    found = examine('mmcv', 'mmdet', 'mmseg')
    assert found['mmcv'].problem == ''
    assert found['mmcv'].version == '2.2.0'
    for name in ('mmdet', 'mmseg'):
        assert f'{name} refuses the installed mmcv 2.2.0' in found[name].problem
        assert found[name].fix == doctor.fix('mmcv')


def test_torchvision_for_another_torch(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_package('torchvision', site, '_C*')
    monkeypatch.setattr(sys, 'prefix', str(site))
    found = examine('torch', 'torchvision', 'timm')
    assert 'was built for another torch than the 2.' in found['torchvision'].problem
    minor = int(found['torch'].version.split('.')[1])
    assert found['torchvision'].fix.endswith(f"'torchvision==0.{minor + 15}.*'")
    assert found['timm'].problem == 'waits for torchvision.'


@pytest.mark.parametrize('module', ['ftfy', 'regex'])
def test_mmseg_needs_what_it_does_not_name(site: Path, module: str) -> None:
    block(site, module)
    found = examine('mmseg')['mmseg']
    assert f'mmseg needs {module}' in found.problem
    assert found.fix == doctor.fix('text')


def test_opencv_without_its_system_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))  # not made by `make install`
    error = 'ImportError: libGL.so.1: cannot open shared object file: No such file or directory'
    found = doctor.judge('cv2', {'cv2': Probe({}, error)}, [])
    assert 'the system library libGL' in found.problem
    assert found.fix == doctor.fix('headless')
    assert 'opencv-python-headless' in found.fix


def test_compiled_operators_without_the_gpu() -> None:
    facts = {'version': '2.1.0', 'kind': 'compiled', 'problem': '', 'advice': '', 'text': 'theirs'}
    probes = {
        'torch': Probe({'version': '2.11.0', 'gpu': 'A GPU'}, ''),
        'mmcv': Probe({**facts, 'cuda': 'not available'}, ''),
    }
    assert 'compiled for the CPU alone' in doctor.judge('mmcv', probes, []).problem
    probes['mmcv'] = Probe({**facts, 'cuda': '13.0'}, '')
    assert doctor.judge('mmcv', probes, []) == Finding('mmcv', '2.1.0', 'theirs')


def plant(site: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution beside the installed ones."""
    info = site / f'{name.replace("-", "_")}-2.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.0.0\n')
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, 'prefix', str(site))


@pytest.mark.compat
def test_both_stacks_at_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = 'mmcv-lite' if ONEDL else 'onedl-mmcv'
    plant(site, foreign, monkeypatch)
    found = doctor.check_stack()
    assert 'mmcv-lite' in found.problem
    assert 'onedl-mmcv' in found.problem
    uninstall, *_, rest = found.fix.split(' && ')
    assert {'mmcv-lite', 'onedl-mmcv'} <= set(shlex.split(uninstall))
    assert ('onedl-mmdetection' if ONEDL else 'mmdet') in rest


def test_lite_and_compiled_mmcv_at_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(site, 'mmcv', monkeypatch)
    assert 'mmcv' in doctor.check_stack().problem.split()


def test_two_opencvs(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_opencv().problem == ''
    plant(site, 'opencv-contrib-python', monkeypatch)
    found = doctor.check_opencv()
    assert 'overwrite each other' in found.problem
    uninstall, install = found.fix.split(' && ')
    assert 'opencv-contrib-python' in shlex.split(uninstall)
    assert shlex.split(install)[-1] == doctor.STACKS['mm']['cv2']


def test_unsupported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'version_info', (3, 14, 0, 'final', 0))
    found = doctor.check_python()
    assert 'not among 3.10 to 3.13' in found.problem
    assert 'PYTHON=python3.11' in found.fix


def test_command_outside_a_managed_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    *_, last = doctor.fix('mmcv').split(' && ')
    words = shlex.split(last)
    if ONEDL:
        assert words[:2] == ['MMCV_WITH_OPS=1', sys.executable]
        assert {'--no-cache-dir', '--no-build-isolation', '--no-binary'} < set(words)
    assert words[-1] == doctor.STACKS['onedl' if ONEDL else 'mm']['mmcv']


def test_command_inside_a_managed_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = ' STACK=onedl' if ONEDL else ''
    monkeypatch.setattr(sys, 'prefix', str(REPO / ('.venv-onedl' if ONEDL else '.venv')))
    monkeypatch.chdir(REPO)
    assert doctor.fix('mmcv') == f'make reinstall{stack}'
    monkeypatch.chdir(tmp_path)
    assert doctor.fix('mmcv') == f'make -C {REPO} reinstall{stack}'
    (tmp_path / 'repnext_mm-install.json').write_text('{}')
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    assert doctor.fix('mmcv') == f'make -C {REPO} reinstall{stack} VENV={tmp_path}'


def test_screen_shows_problem_and_command() -> None:
    text = doctor.render(
        [Finding('torch', '2.11.0'), Finding('mmcv', '2.1.0', '', 'is unwell.', 'fix it')]
    )
    assert '   ok  torch        2.11.0\n' in text
    assert ' FAIL  mmcv         2.1.0\n       is unwell.\n       fix: fix it\n' in text
    assert text.endswith('1 of 2 checks failed.')

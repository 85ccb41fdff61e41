"""What `pip install` gives: the command `repnext-mm` with its configs, away from any checkout."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import tool_runs
from conftest import REPO

from repnext_mm import __version__

PIP = [sys.executable, '-m', 'pip', '--quiet']
OFFLINE = ['--no-index', '--no-deps', '--no-build-isolation', '--disable-pip-version-check']


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must end well, and that sees no checkout."""
    done = start(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def start(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    elsewhere = [
        path
        for path in os.environ.get('PYTHONPATH', '').split(os.pathsep)
        if path and not Path(path).resolve().is_relative_to(REPO)
    ]
    env = tool_runs.environment() | {'PYTHONPATH': os.pathsep.join(elsewhere)}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, as in a fresh clone."""
    if not (REPO / '.git').exists():
        pytest.skip('needs a git checkout')
    listed = subprocess.run(
        ['git', 'ls-files'], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    folder = tmp_path_factory.mktemp('clone')
    for name in listed.splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    return folder


def build(source: Path, target: Path) -> Path:
    """The wheel of a source tree, which is left as it was."""
    tree = shutil.copytree(source, target / 'tree')
    run(*PIP, 'wheel', *OFFLINE, '--wheel-dir', target, tree, cwd=target)
    (wheel,) = target.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp('wheel'))


def environment(folder: Path, *install: str | Path) -> Path:
    """A new virtual environment that also sees this one's packages; returns its programs."""
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=folder)
    # Not --system-site-packages, which means the Python that a virtual environment was made from.
    # An editable install in there is not followed from here.
    Path(site.strip(), 'outer.pth').write_text(sysconfig.get_path('purelib'))
    pip = [*PIP, '--python', python, 'install', *OFFLINE, '--ignore-installed']
    run(*pip, *install, cwd=folder)
    return folder / 'bin'


@pytest.fixture(scope='module')
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp('venv'), wheel)


# --- what is in it


def test_the_wheel_holds_the_packages_and_the_configs_alone(source: Path, wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    wanted = {
        str(path.relative_to(folder))
        for folder, package in ((source, 'repnext_mm'), (source / 'tools', 'repnext_mm_cli'))
        for path in (folder / package).rglob('*')
        if path.is_file()
    }
    of_mm = [*(source / 'configs').rglob('*'), source / 'model-index.yml']
    wanted |= {f'repnext_mm/.mim/{p.relative_to(source)}' for p in of_mm if p.is_file()}
    assert held == wanted


def test_a_wheel_of_the_sdist_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / 'tree')
    code = 'from setuptools import build_meta; print(build_meta.build_sdist("dist"))'
    run(sys.executable, '-c', code, cwd=tree)
    (sdist,) = (tree / 'dist').glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / 'sdist', filter='data')
    (unpacked,) = (tmp_path / 'sdist').iterdir()
    again = build(unpacked, tmp_path / 'again')
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_metadata(programs: Path) -> None:
    (site,) = programs.parent.glob('lib/python*/site-packages')
    (info,) = metadata.distributions(name='repnext_mm', path=[str(site)])
    assert info.version == __version__
    assert info.metadata['License-Expression'] or info.metadata['License'] == 'Apache-2.0'


def test_an_editable_install_uses_the_configs_of_the_checkout(source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / 'tree')
    bin_ = environment(tmp_path / 'venv', '--editable', tree)
    code = 'from repnext_mm.configs import FOLDER; print(FOLDER)'
    assert run(bin_ / 'python', '-c', code, cwd=tmp_path).strip() == str(tree / 'configs')
    assert __version__ in run(bin_ / 'repnext-mm', '--version', cwd=tmp_path)


# --- what it does in an empty folder


def test_the_command_is_there(programs: Path, tmp_path: Path) -> None:
    assert run(programs / 'repnext-mm', '--version', cwd=tmp_path) == f'repnext-mm {__version__}\n'
    assert 'completion' in run(programs / 'repnext-mm', '--help', cwd=tmp_path)
    where = run(
        programs / 'python', '-c', 'import repnext_mm as r; print(r.__file__)', cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(programs.parent)


@pytest.mark.slow
@pytest.mark.compat
def test_trains_by_name_then_runs_the_command_it_names(programs: Path, tmp_path: Path) -> None:
    data = tool_runs.tiny_shapes(tmp_path / 'data')
    settings = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    settings += ['default_hooks.checkpoint.interval=2']
    output = run(
        *(programs / 'repnext-mm', 'train', 'semantic_fpn_repnext_m0_shapes'),
        *tool_runs.options('seg', data, *settings),
        cwd=tmp_path,
    )
    program, *arguments = shlex.split(output.splitlines()[-1].split('; next: ')[1])
    assert program == 'repnext-mm'
    assert arguments[0] == 'test'
    output = run(programs / program, *arguments, cwd=tmp_path)
    assert 'next: repnext-mm test ' in output.splitlines()[-1]


def test_typos_get_one_sentence(programs: Path, tmp_path: Path) -> None:
    for arguments, code, sentence in (
        (['trian'], 2, "no subcommand 'trian'; did you mean train?"),
        (['train', 'mask_rcnn_repnext_m4_cocoo'], 1, 'did you mean mask_rcnn_repnext_m4_coco?'),
        (['train', 'configs/mask_rcnn_repnext_m4_coco.py'], 1, 'no data at data/coco'),
    ):
        done = start(programs / 'repnext-mm', *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert sentence in done.stderr
        assert 'Traceback' not in done.stderr


def test_models_are_listed_as_they_are_typed(programs: Path, tmp_path: Path) -> None:
    output = run(programs / 'repnext-mm', 'models', 'repnext_m4', cwd=tmp_path)
    assert '│ mask_rcnn_repnext_m4_coco ' in output
    assert '42.9' in output
    assert str(programs.parent) in output.splitlines()[-1]

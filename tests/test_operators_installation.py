"""Which operators `mmcv.ops` gets, and what a bad installation says."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repnext_mm import operators
from repnext_mm.operators import cli, finder, installation

REPO = Path(__file__).resolve().parent.parent
FOREIGN = """
def get_compiler_version(): return 'GCC 12.2'
def get_compiling_cuda_version(): return '12.6'
"""


class Site:
    """A site-packages folder with an mmcv of a few lines: the only mmcv that Python finds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mmcv = folder / 'mmcv'

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the first finder; a folder without __init__.py would come after the real mmcv."""
        if name != 'mmcv':
            return None
        return importlib.machinery.PathFinder.find_spec(name, [str(self.folder)])

    def install(self, distribution: str = 'mmcv-lite', version: str = '2.1.0') -> Site:
        (self.mmcv / 'ops').mkdir(parents=True, exist_ok=True)
        (self.mmcv / '__init__.py').write_text('')
        (self.mmcv / 'version.py').write_text(f"__version__ = '{version}'\n")
        (self.mmcv / 'ops' / '__init__.py').write_text('from mmcv import _ext\n')
        info = self.folder / f'{distribution.replace("-", "_")}-{version}.dist-info'
        info.mkdir(exist_ok=True)
        (info / 'METADATA').write_text(f'Name: {distribution}\nVersion: {version}\n')
        return self


def forget(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Have the packages imported anew, and the present ones put back after the test."""
    for name in list(sys.modules):
        if any(name == package or name.startswith(f'{package}.') for package in packages):
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    forget(monkeypatch, 'mmcv')
    site = Site(tmp_path)
    monkeypatch.setattr(sys, 'meta_path', [site, *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    yield site
    for name in [name for name in sys.modules if name.split('.')[0] == 'mmcv']:
        del sys.modules[name]


def sentence(text: str, *parts: str) -> None:
    """One line that ends with a full stop and contains the parts."""
    assert '\n' not in text.strip()
    assert text.strip().endswith('.')
    for part in parts:
        assert part in text, text


def imports_ours() -> bool:
    """Whether `mmcv.ops` imports, and with our operators."""
    importlib.import_module('mmcv.ops')
    return sys.modules['mmcv._ext'].nms is operators.nms


# ---- activation


def test_the_finder_is_last_and_alone() -> None:
    operators.activate()
    operators.activate()
    ours = [entry for entry in sys.meta_path if isinstance(entry, finder._Finder)]
    assert len(ours) == 1
    names = ('mmcv', 'mmcv.runner', 'mmcv._extra', 'mmcvx', '_ext', 'torch._ext')
    assert not any(ours[0].find_spec(name) for name in names)
    appended = object()
    sys.meta_path.append(appended)
    try:
        operators.activate()
        assert sys.meta_path[-1] is appended
    finally:
        sys.meta_path.remove(appended)


def test_activation_imports_nothing() -> None:
    """repnext_mm.operators without the rest of repnext_mm: neither torch nor anything of mm."""
    code = (
        'import sys, types\n'
        'package = types.ModuleType("repnext_mm")\n'
        f'package.__path__ = [{str(REPO / "repnext_mm")!r}]\n'
        'sys.modules["repnext_mm"] = package\n'
        'before = set(sys.modules)\n'
        'from repnext_mm import operators\n'
        'operators.activate()\n'
        'print(*sorted(set(sys.modules) - before))\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert {'repnext_mm.operators', 'repnext_mm.operators.finder'} <= loaded
    assert all(
        name.split('.')[0] in sys.stdlib_module_names or name.startswith('repnext_mm.')
        for name in loaded
    )
    assert 'importlib.metadata' not in loaded  # 40 ms


def test_mmcv_lite_gets_ours(site: Site) -> None:
    site.install()
    assert imports_ours()
    found = operators.describe()
    assert found.kind == 'torchvision'
    sentence(found.text, 'mmcv-lite 2.1.0', 'torchvision 0.', 'CUDA', 'torch 2.')
    assert not found.problem
    ext = importlib.import_module('mmcv._ext')
    assert set(operators.ext.OPERATORS) <= set(vars(ext))


def test_a_module_that_is_there_wins(site: Site) -> None:
    site.install('mmcv')
    (site.mmcv / '_ext.py').write_text(FOREIGN)
    assert not hasattr(importlib.import_module('mmcv._ext'), 'nms')
    found = operators.describe()
    assert found.kind == 'compiled'
    sentence(found.text, 'mmcv 2.1.0 with its compiled operators (GCC 12.2, CUDA 12.6)')
    assert not found.problem


@pytest.mark.compat
def test_compiled_operators_win() -> None:
    found = installation.Mmcv.find()
    if not found or not found.compiled():
        pytest.skip('the installed mmcv has no compiled operators')
    ext = importlib.import_module('mmcv._ext')
    assert ext.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    assert operators.describe().kind == 'compiled'


def test_other_operators_name_the_ways_to_a_compiled_mmcv(site: Site) -> None:
    site.install()
    ext = importlib.import_module('mmcv._ext')
    assert hasattr(ext, 'nms_rotated')  # mmcv looks all of them up on import
    with pytest.raises(RuntimeError) as raised:
        ext.nms_rotated(1, labels=2)
    ways = ('MMCV_WITH_OPS=1 pip install', 'download.openmmlab.com')
    sentence(str(raised.value), "'nms_rotated'", *ways)
    assert not hasattr(ext, '__wrapped__')


def test_operators_by_name() -> None:
    assert operators.nms is operators.ext.nms
    with pytest.raises(AttributeError, match='has no attribute'):
        operators.nms_rotated  # noqa: B018
    with pytest.raises(AttributeError, match='has no attribute'):
        operators._torch  # noqa: B018


# ---- bad installations


def refuses(problem_parts: tuple[str, ...], module: str = 'mmcv.ops') -> None:
    """Both the import of mmcv.ops and describe() say the same."""
    with pytest.raises(ImportError) as raised:
        importlib.import_module(module)
    sentence(str(raised.value), *problem_parts)
    found = operators.describe()
    assert found.kind == 'none'
    sentence(found.problem, *problem_parts)


@pytest.mark.parametrize('kept', ['_ext.py', 'ops/__pycache__/nms.cpython-311.pyc', 'version.py'])
def test_half_removed_mmcv(site: Site, kept: str) -> None:
    file = site.mmcv / kept
    file.parent.mkdir(parents=True)
    file.write_text('')
    # An empty folder imports as a package.
    module = 'mmcv.ops.nms' if 'ops/' in kept else 'mmcv.ops'
    parts = (str(site.mmcv), '__init__.py', 'pip uninstall -y', 'pip install mmcv-lite==2.1.0')
    refuses(parts, module)


def test_mmcv_without_its_operators_folder(site: Site) -> None:
    site.install()
    shutil.rmtree(site.mmcv / 'ops')
    refuses(('ops/__init__.py missing', 'pip install mmcv-lite==2.1.0'))


def test_mmcv_1(site: Site) -> None:
    site.install('mmcv', '1.7.2')
    refuses(('mmcv 1.7.2', 'pip uninstall -y mmcv`', 'pip install mmcv-lite==2.1.0'))


def test_two_stacks(site: Site) -> None:
    site.install('mmcv-lite').install('onedl-mmcv', '2.3.6')
    refuses(('mmcv-lite and onedl-mmcv', 'pip uninstall -y mmcv-lite onedl-mmcv`'))


def test_two_stacks_one_of_them_compiled(site: Site) -> None:
    """What is compiled works, and the next uninstall breaks it."""
    site.install('mmcv-lite').install('mmcv')
    (site.mmcv / '_ext.py').write_text(FOREIGN)
    assert operators.describe().kind == 'compiled'
    sentence(operators.describe().problem, 'mmcv and mmcv-lite are both installed')


def test_mmcv_without_operators_that_is_not_lite(site: Site) -> None:
    site.install('mmcv')
    assert imports_ours()
    found = operators.describe()
    assert found.kind == 'torchvision'
    assert found.problem == ''
    sentence(found.advice, 'pip uninstall -y mmcv && pip install mmcv-lite==2.1.0')


def test_compiled_operators_that_do_not_load(site: Site) -> None:
    site.install('mmcv')
    (site.mmcv / f'_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}').write_bytes(b'not a library')
    with pytest.raises(ImportError) as raised:  # Python's own, as nothing is put in its place
        importlib.import_module('mmcv.ops')
    fixes = ('MMCV_WITH_OPS=1', 'pip uninstall -y mmcv`', 'pip install mmcv-lite==2.1.0')
    sentence(operators.explain(raised.value) or '', *fixes)
    found = operators.describe()
    assert found.kind == 'none'
    sentence(found.problem, *fixes)
    assert operators.explain(ImportError('other', name='mmcv.ops')) is None
    assert operators.explain(ValueError('other')) is None


def test_compiled_operators_of_another_python(site: Site) -> None:
    """Python does not find the file, and still it is not silently replaced."""
    site.install('mmcv')
    (site.mmcv / '_ext.cpython-27-nowhere.so').write_bytes(b'')
    refuses(('_ext.cpython-27-nowhere.so', 'MMCV_WITH_OPS=1', 'pip install mmcv-lite==2.1.0'))


def test_no_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.Mmcv, 'find', lambda: None)
    found = operators.describe()
    assert found.kind == 'none'
    sentence(found.problem, 'pip install mmcv-lite==2.1.0')


@pytest.mark.parametrize(
    'torchvision, message',
    [
        (None, 'torchvision is not installed'),
        (
            "raise RuntimeError('operator torchvision::nms does not exist\\nTraceback')",
            'operator torchvision::nms does not exist',
        ),
        ('from . import extension', 'its operators are missing'),
    ],
)
def test_torchvision_that_does_not_work(
    site: Site, monkeypatch: pytest.MonkeyPatch, torchvision: str | None, message: str
) -> None:
    import torch

    site.install()
    forget(monkeypatch, 'torchvision', 'repnext_mm.operators.ext')
    monkeypatch.setattr(torch, '__version__', '2.11.0+cpu')
    if torchvision is None:
        monkeypatch.setitem(sys.modules, 'torchvision', None)
    else:
        (site.folder / 'torchvision').mkdir()
        (site.folder / 'torchvision' / '__init__.py').write_text(torchvision)
        (site.folder / 'torchvision' / 'extension.py').write_text('def _has_ops(): return False')
    try:
        refuses((message, '2.11.0' if torchvision else 'torchvision', 'torchvision==0.26.*'))
    finally:
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]


# ---- repnext-mm operators


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    importlib.invalidate_caches()
    found = installation.Mmcv.find()
    assert found is None or isinstance(sys.meta_path[0], Site)  # never this Python's own mmcv
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_install_and_remove(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install()
    file = site.mmcv / '_ext.py'
    before = sorted(site.folder.rglob('*'))
    assert run(capsys, '--install')[0] == 0
    assert file.read_text() == installation.ONE_LINE
    assert installation.ONE_LINE.count('\n') == 1
    assert sorted(site.folder.rglob('*')) == sorted([*before, file])  # no temporary file
    code, out, _ = run(capsys, '--install')
    assert (code, 'already' in out) == (0, True)
    importlib.import_module('mmcv.ops')
    ext = sys.modules['mmcv._ext']
    assert ext.__file__ == str(file)
    assert ext.nms is operators.nms
    with pytest.raises(RuntimeError, match='nms_rotated'):
        ext.nms_rotated()
    code, out, err = run(capsys)
    assert (code, err) == (0, '')
    sentence(out, 'mmcv-lite 2.1.0 with the operators of torchvision')
    assert run(capsys, '--remove')[0] == 0
    assert not file.exists()
    assert not list(site.mmcv.rglob('_ext*'))
    code, out, _ = run(capsys, '--remove')
    assert (code, 'nothing to remove' in out) == (0, True)
    assert site.mmcv.is_dir()


def test_remove_after_mmcv_was_uninstalled(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """pip leaves our file, with which an empty mmcv still imports."""
    site.mmcv.mkdir()
    (site.mmcv / '_ext.py').write_text(installation.ONE_LINE)
    assert run(capsys, '--remove')[0] == 0
    assert not site.mmcv.exists()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence on stderr, with exit code 1 and nothing on stdout."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, '')
    assert err.startswith('error: ')
    sentence(err)
    return err


@pytest.mark.parametrize('text', [FOREIGN, '', installation.ONE_LINE + '\n'])
def test_a_foreign_file_stays(site: Site, capsys: pytest.CaptureFixture[str], text: str) -> None:
    site.install()
    file = site.mmcv / '_ext.py'
    file.write_text(text)
    for option in ('--install', '--remove'):
        assert str(file) in refused(capsys, option)
        assert file.read_text() == text


@pytest.mark.parametrize('suffix', ['.cpython-311-x86_64-linux-gnu.so', '.cp313-win_amd64.pyd'])
def test_compiled_operators_stay(
    site: Site, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    site.install('mmcv')
    (site.mmcv / f'_ext{suffix}').write_bytes(b'')
    assert 'never replaced' in refused(capsys, '--install')
    assert not (site.mmcv / '_ext.py').exists()


def test_bad_installations_are_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.install('mmcv', '1.7.2')
    assert 'mmcv 1.7.2' in refused(capsys, '--install')
    site.install('mmcv-lite')
    assert 'both installed' in refused(capsys, '--install')
    (site.mmcv / '__init__.py').unlink()
    assert 'only in part' in refused(capsys, '--install')
    assert 'only in part' in refused(capsys)
    assert not (site.mmcv / '_ext.py').exists()


def test_no_mmcv_to_install_into(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installation.Mmcv, 'find', lambda: None)
    for argv in (['--install'], ['--remove'], []):
        assert 'pip install mmcv-lite==2.1.0' in refused(capsys, *argv)


def test_a_folder_that_cannot_be_written(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Permissions do not stop root, so the system calls are made to fail."""
    site.install()

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, 'Permission denied')

    for module, name in ((Path, 'write_text'), (os, 'replace')):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, denied)
            error = refused(capsys, '--install')
        assert 'Permission denied' in error
        assert 'virtual environment' in error
        assert {path.name for path in site.mmcv.iterdir()} == {'__init__.py', 'version.py', 'ops'}
    assert run(capsys, '--install')[0] == 0
    monkeypatch.setattr(Path, 'unlink', denied)
    assert 'cannot remove' in refused(capsys, '--remove')


def test_installed_into_the_real_mmcv(tmp_path: Path) -> None:
    """mm's own entry points, in a Python that imports repnext_mm nowhere itself."""
    pytest.importorskip('mmdet', reason='mmdet is not installed')
    found = installation.Mmcv.find()
    assert found
    ignored = shutil.ignore_patterns('_ext*', 'csrc', '__pycache__')
    shutil.copytree(found.folder, tmp_path / 'mmcv', ignore=ignored)
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(REPO)])}

    def python(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, '-c', code]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    # Before and after: mmcv.ops does not import, and then mmdet does.
    install = (
        'import importlib, sys\n'
        'try: importlib.import_module("mmcv.ops")\n'
        'except ModuleNotFoundError as error: assert error.name == "mmcv._ext"\n'
        'else: sys.exit("mmcv has operators already")\n'
        'from repnext_mm.operators.cli import main\n'
        'sys.exit(main(["--install"]))\n'
    )
    result = python(install)
    assert result.returncode == 0, result.stderr
    tool = 'import mmdet.apis, mmcv._ext; print(mmcv._ext.__file__, mmcv._ext.nms.__module__)'
    result = python(tool)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == [
        str(tmp_path / 'mmcv/_ext.py'),
        'repnext_mm.operators.boxes',
    ]

"""What a user installs: versions, requirements and pins, package data, and the citation."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from blocking import block
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repnext_mm_cli import doctor

from repnext_mm import __version__

REPO = Path(__file__).resolve().parent.parent
#: For which Pythons each stack's file has exact versions.
STACKS = {
    'mm': ('constraints.txt', ('3.10', '3.11', '3.12', '3.13')),
    'onedl': ('constraints-onedl.txt', ('3.11',)),
}
CASES = [(stack, python) for stack, (_, pythons) in STACKS.items() for python in pythons]
PACKAGES = (REPO / 'repnext_mm', REPO / 'tools' / 'repnext_mm_cli')
# Torch pins these itself, exactly and per platform.
TORCH_CUDA = re.compile(r'nvidia-|cuda-toolkit$')


def git(*arguments: str) -> str:
    if not (REPO / '.git').exists():
        pytest.skip('needs a git checkout')
    return subprocess.run(
        ['git', *arguments], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope='module')
def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(REPO / 'setup.cfg', encoding='utf-8')
    return config


@pytest.fixture(scope='module')
def citation() -> dict:
    return yaml.safe_load((REPO / 'CITATION.cff').read_text('utf-8'))


def requirements(text: str) -> list[Requirement]:
    lines = (line.split('#')[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def pins(stack: str, python: str) -> dict[str, Requirement]:
    """The exact versions of one stack for one Python, by name."""
    lines = requirements((REPO / STACKS[stack][0]).read_text('utf-8'))
    environment = {'python_version': python, 'python_full_version': f'{python}.1'}
    kept = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    found = {canonicalize_name(line.name): line for line in kept}
    assert len(found) == len(kept), 'a package has two lines for one Python'
    return found


def declared(setup_cfg: configparser.ConfigParser) -> Iterator[tuple[str, Requirement]]:
    """Each requirement with the part of setup.cfg that names it."""
    for requirement in requirements(setup_cfg['options']['install_requires']):
        yield 'install_requires', requirement
    for extra, text in setup_cfg['options.extras_require'].items():
        for requirement in requirements(text):
            yield extra, requirement


def test_versions_agree(setup_cfg: configparser.ConfigParser, citation: dict) -> None:
    changelog = (REPO / 'CHANGELOG.md').read_text('utf-8')
    newest = re.search(r'^## \W*v?(\d+\.\d+\.\d+)', changelog, re.M)
    assert newest, 'CHANGELOG.md has no heading such as `## 0.1.0`'
    assert newest[1] == __version__
    assert citation['version'] == __version__
    assert setup_cfg['metadata']['version'] == 'attr: repnext_mm.version.__version__'


def test_citation_is_complete(citation: dict) -> None:
    assert citation['cff-version'] == '1.2.0'
    assert set(citation) >= {'message', 'title', 'authors', 'license', 'type', 'references'}
    papers = {paper['identifiers'][0]['value']: paper for paper in citation['references']}
    assert set(papers) == {'arXiv:2406.16004', 'arXiv:2412.19628', 'arXiv:2303.16900'}
    for number, paper in papers.items():
        assert paper['url'].endswith(number.removeprefix('arXiv:'))
        assert paper['title']
        assert paper['type'] == 'article'
        assert all(author['family-names'] for author in paper['authors'])


def test_neither_stack_is_required(setup_cfg: configparser.ConfigParser) -> None:
    of_stacks = {
        stack: {doctor.project(specs[module]) for module in doctor.OPENMMLAB}
        for stack, specs in doctor.STACKS.items()
    }
    for part, requirement in declared(setup_cfg):
        if part in ('install_requires', 'dev'):
            assert requirement.name not in {*doctor.MMCV, *of_stacks['mm'], *of_stacks['onedl']}
    for stack, names in of_stacks.items():
        named = {r.name for r in requirements(setup_cfg['options.extras_require'][stack])}
        assert names <= named


@pytest.mark.parametrize('stack, python', CASES)
def test_every_requirement_is_pinned(
    stack: str, python: str, setup_cfg: configparser.ConfigParser
) -> None:
    pinned = pins(stack, python)
    for part, requirement in declared(setup_cfg):
        if part in STACKS and part != stack:
            continue
        if requirement.marker and not requirement.marker.evaluate({'python_version': python}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f'{name} ({part}) has no line for {stack} and {python}'
        (pin,) = pinned[name].specifier
        assert requirement.specifier.contains(pin.version), f'{pin} is outside {requirement}'


@pytest.mark.parametrize('stack, python', CASES)
def test_pins_are_exact(stack: str, python: str) -> None:
    for line in pins(stack, python).values():
        (specifier,) = line.specifier
        assert specifier.operator == '=='
        assert '*' not in specifier.version


def test_the_declared_minimum_is_tested(setup_cfg: configparser.ConfigParser) -> None:
    oldest, newest = pins('onedl', '3.11'), pins('mm', '3.11')
    declared_minimum = {
        r.name: specifier.version
        for _, r in declared(setup_cfg)
        for specifier in r.specifier
        if specifier.operator == '>='
    }
    for name, pinned in (('torch', oldest), ('timm', oldest), ('mmengine', newest)):
        (pin,) = pinned[name].specifier
        assert Version(pin.version) == Version(declared_minimum[name]), name


def test_doctor_recommends_the_pins() -> None:
    for stack, specs in doctor.STACKS.items():
        for python in STACKS[stack][1]:
            pinned = {f'{line.name}{line.specifier}' for line in pins(stack, python).values()}
            assert set(specs.values()) <= pinned


@pytest.mark.compat
def test_nothing_unpinned_is_installed() -> None:
    if not (Path(sys.prefix) / 'repnext_mm-install.json').exists():
        pytest.skip('this environment was not made by `make install`')
    pinned = pins(doctor.detect_stack()[0], '{}.{}'.format(*sys.version_info[:2]))
    # Not all of sys.path: setuptools, once imported, adds the packages that it carries.
    for distribution in metadata.distributions(path=[sysconfig.get_path('purelib')]):
        name = canonicalize_name(distribution.metadata['Name'])
        if name != 'repnext-mm' and not TORCH_CUDA.match(name):
            assert name in pinned, f'{name} {distribution.version} is not in constraints.txt'
            assert pinned[name].specifier.contains(distribution.version)


def imported_modules(folder: Path) -> dict[str, Path]:
    """Top-level modules that the Python files below a folder import, each with one that does."""
    found = {}
    for path in folder.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            found.update({name.split('.')[0]: path for name in names})
    return found


def test_every_import_is_declared(setup_cfg: configparser.ConfigParser) -> None:
    named = {canonicalize_name(r.name) for _, r in declared(setup_cfg)}
    providers = metadata.packages_distributions()
    imported = [imported_modules(package) for package in PACKAGES]
    assert all(imported), 'a package is not where it was'
    own = {package.name for package in PACKAGES}
    for module, path in (item for found in imported for item in found.items()):
        if module in sys.stdlib_module_names or module in own:
            continue
        assert {canonicalize_name(d) for d in providers.get(module, [])} & named, (
            f'{path.relative_to(REPO)} imports {module}, which setup.cfg does not name'
        )


@pytest.mark.compat
def test_backbones_and_fusion_need_no_mm_packages(tmp_path: Path) -> None:
    block(tmp_path, 'mmcv', 'mmdet', 'mmseg')
    code = """
import torch, repnext_mm
for module in ('mmcv', 'mmdet', 'mmseg'):
    try:
        __import__(module)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f'{module} is importable: the test tests nothing')
model = repnext_mm.RepNeXt('m0').eval()
fused = repnext_mm.reparameterize(model)
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    for ours, theirs in zip(fused(image), model(image), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
print([tuple(level.shape) for level in ours.unsqueeze(0)])
"""
    path = [str(tmp_path), str(REPO), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path))}
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == '[(1, 320, 2, 2)]'


@pytest.mark.parametrize(
    'pattern',
    [
        pytest.param(r'(^|[^A-Za-z0-9_.$}])/(home|root|Users|mnt|work|tmp)/[A-Za-z]', id='paths'),
        pytest.param(r'(index-url|find-links)[ =]|//[a-z.]*py(pi|thonhosted)\.', id='registries'),
    ],
)
def test_nothing_names_the_machine_it_was_written_on(pattern: str) -> None:
    found = []
    for name in git('ls-files').splitlines():
        path = REPO / name
        if path.is_file() and path != Path(__file__).resolve():
            text = path.read_text('utf-8', errors='ignore')
            lines = enumerate(text.splitlines(), 1)
            found += [f'{name}:{n}: {line}' for n, line in lines if re.search(pattern, line)]
    assert found == []

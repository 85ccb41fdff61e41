"""What `import repnext_mm` does: registers everything, and imports next to nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

import repnext_mm
from repnext_mm import lazy

#: What an import must not bring; a network, a run or an export does.
LATER = (
    *('timm', 'torchvision', 'cv2', 'mmcv', 'mmdet', 'mmseg', 'matplotlib', 'onnx', 'openvino'),
    *('mmengine.model', 'mmengine.optim', 'mmengine.runner', 'mmengine.hooks', 'mmengine.dataset'),
    *(
        f'repnext_mm.{name}'
        for name in ('backbones', 'layers', 'engine', 'deploy', 'measure', 'runtimes')
    ),
)


#: Runs programs, each in a process of its own that has imported torch alone.
FORKS = """
import json, os, sys, torch
for program in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        exec(program)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f'failed: {program}')
"""


def run(*programs: str) -> list[str]:
    """What each of the programs prints in one line."""
    path = [str(REPO), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path))}
    command = [sys.executable, '-W', 'ignore', '-c', FORKS, json.dumps(programs)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.compat
def test_the_import_brings_neither_timm_nor_mmengines_models() -> None:
    # Torch itself may bring some: they are not ours to count.
    code = 'import sys, json; before = set(sys.modules); import repnext_mm; '
    code += 'print(json.dumps(sorted(set(sys.modules) - before)))'
    brought = set(json.loads(run(code)[0]))
    assert 'mmengine.registry' in brought
    assert brought.isdisjoint(LATER)


@pytest.mark.compat
def test_a_repnext_needs_no_timm() -> None:
    code = """
import sys, repnext_mm
repnext_mm.RepNeXt('m0')
print('timm' in sys.modules, 'torchvision' in sys.modules)
"""
    assert run(code) == ['False False']


@pytest.mark.compat
def test_a_config_finds_it_after_the_import_alone() -> None:
    named = (
        ('MODELS', dict(type='RepNeXt', arch='m0'), 'backbones.repnext'),
        ('MODELS', dict(type='repnext_mm.RepNeXt', arch='m0'), 'backbones.repnext'),
        ('MODELS', dict(type='RecNeXt', arch='m0'), 'backbones.recnext'),
        ('MODELS', dict(type='InceptionNeXt', arch='atto'), 'backbones.inception_next'),
        ('HOOKS', dict(type='AtomicCheckpointHook', interval=1), 'engine.atomic_checkpoint'),
        ('HOOKS', dict(type='CompileBackbone', mode='max-autotune'), 'engine.compile'),
    )
    code = """
from mmengine.registry import {registry}, Registry
import repnext_mm
child = Registry('child', parent={registry}, scope='child', locations=['child'])
child._imported = True
config = {config!r}
built = [{registry}.build(dict(config)), child.build(dict(config))]
assert type(built[0]) is type(built[1])
name = config['type'].split('.')[-1]
assert type(built[0]) is {registry}.get(name)
print(type(built[0]).__module__, name == type(built[0]).__name__)
"""
    programs = [code.format(registry=registry, config=config) for registry, config, _ in named]
    assert run(*programs) == [f'repnext_mm.{module} True' for *_, module in named]


@pytest.mark.compat
def test_what_else_a_config_may_name() -> None:
    code = """
import repnext_mm, torch
from torch.nn.parallel import DistributedDataParallel
from mmengine.fileio import get_file_backend
from mmengine.model import is_model_wrapper
from mmengine.registry import MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS
# A runner asks this of a wrapper before it builds one, and this of a model.
assert issubclass(MODEL_WRAPPERS.get('CPUDistributedDataParallel'), DistributedDataParallel)
assert not is_model_wrapper(torch.nn.Linear(1, 1))
wrapper = OPTIM_WRAPPERS.build(dict(
    type='PortableAmpOptimWrapper', dtype='bfloat16',
    optimizer=torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1)))
assert type(wrapper).__module__ == 'repnext_mm.engine.amp'
try:
    MODELS.build(dict(type='ExportedBackbone', artifact='absent.onnx'))
except Exception as error:
    assert 'absent.onnx' in str(error), error
get_file_backend(backend_args=dict(backend='atomic_local'))
names = [entry[1] for entry in torch.serialization.get_safe_globals() if type(entry) is tuple]
print('mmengine.logging.history_buffer.HistoryBuffer' in names)
"""
    assert run(code)[-1] == 'True'


def test_a_file_finds_its_family_though_no_network_was_built() -> None:
    code = """
import repnext_mm
from repnext_mm.network import families
print(sorted(family.__name__ for family in families()))
"""
    assert run(code) == ["['InceptionNeXt', 'RecNeXt', 'RepNeXt']"]


def test_every_export_is_there() -> None:
    packages = ('repnext_mm', *(f'repnext_mm.{n}' for n in ('backbones', 'checkpoints', 'engine')))
    code = """
import importlib
package = importlib.import_module({package!r})
print([name for name in package.__all__ if not hasattr(package, name)])
"""
    assert run(*(code.format(package=package) for package in packages)) == ['[]'] * 4


def test_exports_are_the_classes_themselves(tmp_path: Path) -> None:
    from repnext_mm.backbones.repnext import RepNeXt

    assert repnext_mm.RepNeXt is RepNeXt
    assert pickle.loads(pickle.dumps(repnext_mm.RepNeXt)) is RepNeXt
    assert isinstance(repnext_mm.RepNeXt('m0'), RepNeXt)
    assert callable(repnext_mm.optimize)
    with pytest.raises(AttributeError, match="'repnext_mm' has no attribute 'Repnext'"):
        repnext_mm.Repnext  # noqa: B018
    with pytest.raises(AttributeError, match="'a' has no attribute 'b'"):
        lazy.lazy_attributes('a', {})('b')

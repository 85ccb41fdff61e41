"""Shared fixtures: the real data, and models in a state that hides no mistake."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import random
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

REPO = Path(__file__).resolve().parent.parent
#: Published results, keys and outputs of the published code, and snapshots of ours.
DATA = REPO / 'tests' / 'data'

# The same examples in every run, however slow the machine is; nothing is kept for the next run.
settings.register_profile(
    'same', derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile('same')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--shuffle',
        type=int,
        metavar='SEED',
        help='run files, and the tests of each, in any order',
    )
    parser.addoption(
        '--update-snapshots', action='store_true', help='record what tests/test_snapshots.py sees'
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption('--shuffle')
    if seed is None:
        return
    shuffle = random.Random(seed).shuffle
    files = [[*tests] for _, tests in itertools.groupby(items, key=lambda item: item.path)]
    for group in (files, *files):
        shuffle(group)
    items[:] = itertools.chain.from_iterable(files)


def forget_runs() -> None:
    """Drop what mmengine keeps of runs by name, as a new process has none of it.

    Names hold the second of the start, so that quick runs would share it; a visualizer's is
    always the same.
    """
    for kind in (MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


@pytest.fixture(autouse=True)
def _no_runs() -> None:
    forget_runs()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - mm's transforms draw from it
    torch.manual_seed(0)


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[str]]:
    """Lines that went to MMEngine's current logger."""
    file = tmp_path / 'mmengine.log'
    MMLogger.get_instance(uuid.uuid4().hex, log_file=str(file))
    return lambda: file.read_text().splitlines()


@pytest.fixture(scope='session')
def data_root() -> Path:
    """Folder with `coco/` and `ade/`, the real sample images."""
    value = os.environ.get('REPNEXT_MM_DATA')
    if not value:
        pytest.skip('REPNEXT_MM_DATA is not set; point it at the folder with coco/ and ade/')
    root = Path(value).resolve()
    assert root.is_dir(), f'REPNEXT_MM_DATA={value} is not a folder'
    return root


@pytest.fixture(scope='session')
def formula() -> ModuleType:
    """The module that makes the fixtures' weights and inputs."""
    path = DATA / 'parity' / 'formula.py'
    spec = importlib.util.spec_from_file_location('formula', path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def published() -> dict:
    """Published results; none of them was measured here."""
    return json.loads((DATA / 'published' / 'results.json').read_text())


@pytest.fixture(scope='session', autouse=True)
def _inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that torch compiled for one instruction set computes NaN when another one reuses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path_factory.mktemp('inductor')))
        yield


@functools.cache
def inductor_problem() -> str | None:
    """Why torch cannot generate code for this CPU here, if it cannot."""
    try:
        torch.compile(torch.nn.GELU())(torch.ones(8, 8))
    except Exception as error:
        return f'torch cannot generate C++ here: {" ".join(str(error).split())[:100]}'
    finally:
        torch._dynamo.reset()
    return None


@pytest.fixture
def inductor() -> None:
    """Skips where torch's inductor lacks a C++ compiler, or kernels for an instruction set."""
    if problem := inductor_problem():
        pytest.skip(problem)


@pytest.fixture
def small_files_only() -> Iterator[Callable[[int], None]]:
    """Call it with a size, and the system refuses larger files, as a full disk would."""
    resource = pytest.importorskip('resource', reason='this system sets no limits to processes')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise biases and every norm's statistics and affine parameters, in place.

    Defaults (zero biases, identity norms) hide mistakes of folding.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            if getattr(module, 'bias', None) is not None:
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
    return model

"""Images of other shapes, types and strides: computed rightly or refused, in every runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from conftest import inductor_problem
from networks import tiny
from torch import Tensor

from repnext_mm import reparameterize
from repnext_mm.deploy.job import Job
from repnext_mm.runtimes import Artifact, ArtifactError, open_artifact

pytest.importorskip('onnxruntime', reason='needs the extra deploy: onnxruntime')
pytest.importorskip('openvino', reason='needs the extra deploy: openvino')

SIZE = (32, 64)
FILES = ('a.onnx', 'a_openvino', 'a.pt2', 'a.torchscript', 'a.pth', 'a.aoti.pt2')


def job(network: str = 'repnext_m', dynamic: str = 'none', **metadata: Any) -> Job:
    backbone = reparameterize(tiny(network, out_indices=(0, 1)).eval())
    record = dict(
        family=type(backbone).__name__,
        arch=dict(backbone.settings),
        plan='full',
        out_indices=backbone.out_indices,
        size=SIZE,
        batch=1,
        dynamic=dynamic,
        least_side=backbone.least_side,
        dtype='fp32',
    )
    return exports.job(backbone, SIZE, record | metadata, dynamic=dynamic)


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of an exported network; each is exported once."""
    folder = tmp_path_factory.mktemp('artifacts')

    def write(name: str) -> Path:
        if name == 'a.aoti.pt2' and (problem := inductor_problem()):
            pytest.skip(problem)
        if not (folder / name).exists():
            exports.write(job(), folder / name)
        return folder / name

    return write


def assert_computed(artifact: Artifact, images: Any, plain: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        expected = job().target.model(plain)
    for found, wanted in zip(artifact.run(images), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    'name',
    # The last is compiled for half a minute.
    [pytest.param(n, marks=pytest.mark.slow) if n == 'a.aoti.pt2' else n for n in FILES],
)
def test_strides_types_and_shapes(name: str, written: Callable[[str], Path]) -> None:
    plain = torch.randn(1, 3, *SIZE)
    wide = plain.repeat_interleave(2, dim=3)
    with open_artifact(written(name), threads=1, trust=True) as artifact:
        for same in (
            plain.contiguous(memory_format=torch.channels_last),
            wide[..., ::2],
            plain.flip(1).flip(1),
            plain.double(),
            np.asfortranarray(plain.numpy()),
            plain.numpy()[..., ::-1][..., ::-1],
        ):
            assert_computed(artifact, same, plain, 1e-4)
        assert_computed(artifact, plain.half(), plain.half().float(), 1e-4)
        assert_computed(artifact, plain.bfloat16(), plain.bfloat16().float(), 1e-4)
        for other in (torch.uint8, torch.int64, torch.bool, torch.complex64):
            dtype = str(other).removeprefix('torch.')
            with pytest.raises(ArtifactError, match=f'float32, not {dtype}'):
                artifact.run(plain.to(other))
        shapes = [(1, 1, *SIZE), (3, *SIZE), (1, 3, *SIZE, 1), (0, 3, *SIZE)]
        if name != 'a.pth':
            shapes += [(2, 3, *SIZE), (1, 3, 64, 64), (1, 3, 31, 64), (1, 3, 64, 32)]
        for shape in shapes:
            with pytest.raises(ArtifactError) as refused:
                artifact.run(torch.zeros(shape))
            assert f'not {shape}' in str(refused.value)
            assert f'(1, 3, {SIZE[0]}, {SIZE[1]})' in str(refused.value) or name == 'a.pth'


def test_smaller_than_the_network_can_compute(tmp_path: Path) -> None:
    exports.write(job('inception_next', 'hw'), tmp_path / 'a.onnx')
    with open_artifact(tmp_path / 'a.onnx', threads=1, trust=True) as artifact:
        assert artifact.run(torch.zeros(1, 3, 8, 9))[1].shape[2:] == (1, 1)
        with pytest.raises(ArtifactError, match=r'at least 8 pixels .*not \(1, 3, 7, 64\)'):
            artifact.run(torch.zeros(1, 3, 7, 64))


def test_images_as_loaded_may_be_bytes(tmp_path: Path) -> None:
    exports.write(job(preprocess={'mean': [0, 0, 0]}), tmp_path / 'a.onnx')
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    with open_artifact(tmp_path / 'a.onnx', threads=1, trust=True) as artifact:
        assert_computed(artifact, images, images.float(), 1e-3)
        with pytest.raises(ArtifactError, match='float32 or uint8, not int64'):
            artifact.run(images.long())


@pytest.mark.slow
def test_packages_that_do_not_say_what_they_were_compiled_for(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    """The package itself checks nothing, and says so."""
    with open_artifact(written('a.aoti.pt2'), trust=True) as artifact:
        assert 'AOTI_RUNTIME_CHECK_INPUTS=1' in artifact.metadata['unchecked']
        silent = artifact.module(torch.zeros(1, 3, 64, 64))
        assert [tuple(stage.shape[2:]) for stage in silent] == [(8, 16), (4, 8)]
    nameless = job()
    nameless.metadata.clear()
    exports.write(nameless, tmp_path / 'b.aoti.pt2')
    with pytest.raises(ArtifactError, match=r'b\.aoti\.pt2 does not say for which images'):
        open_artifact(tmp_path / 'b.aoti.pt2', trust=True)


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc of Linux')
def test_openvino_does_not_keep_something_of_every_size(tmp_path: Path) -> None:
    exports.write(job(dynamic='hw'), tmp_path / 'a_openvino')

    def resident() -> float:
        return (
            int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
        )

    with open_artifact(tmp_path / 'a_openvino', threads=1, trust=True) as artifact:
        artifact.run(torch.zeros(1, 3, 96, 256))
        grown = []
        for start in (0, 100):
            before = resident()
            for i in range(start, start + 100):
                artifact.run(torch.zeros(1, 3, 32 + i % 16 * 4, 33 + i))
            grown.append(resident() - before)
    # In MB; it kept about one per size of this small network, and the first filled the cache.
    assert grown[1] < 30, grown

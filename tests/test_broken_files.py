"""Files that are damaged, hostile or no weights: one sentence, nothing runs, nothing changes."""

from __future__ import annotations

import argparse
import functools
import gzip
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from weight_files import (
    HTML,
    Evil,
    Tree,
    assert_holds,
    fused_state,
    network,
    refuse,
    save_bare,
    save_evil,
    save_mm2,
    save_safetensors,
    save_timm,
    save_torchscript,
    state_of,
)

from repnext_mm import RepNeXt
from repnext_mm.checkpoints import (
    CheckpointError,
    load_pretrained,
    read_run,
    read_weights,
)


def save_plain_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps({'model': Evil(path.with_name('ran'))}, protocol=4))
    return path


def save_whole_model(path: Path) -> Path:
    torch.save(network(), path)
    return path


def save_cut(path: Path, legacy: bool = False, keep: float = 0.6) -> Path:
    save_bare(path, legacy=legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def save_cut_safetensors(path: Path) -> Path:
    save_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def save_cut_archive(path: Path) -> Path:
    save_torchscript(path, fused_state())
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def save_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 8457344\n'


def save_tar(path: Path) -> Path:
    with tarfile.open(path, 'w') as tar:
        tar.add(save_bare(path.with_name('inner.pth')), 'inner.pth')
    return path


def save_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(save_bare(path.with_name('inner.pth')), 'weights/inner.pth')
    return path


def save_quantised(path: Path) -> Path:
    state = state_of()
    state['stem.stem.0.conv.weight'] = state['stem.stem.0.conv.weight'].to(torch.int8)
    torch.save(state, path)
    return path


def save_sparse(path: Path) -> Path:
    state = state_of()
    state['stem.stem.0.conv.weight'] = state['stem.stem.0.conv.weight'].to_sparse()
    torch.save(state, path)
    return path


BROKEN: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    'runs code': ('a.pth', save_evil, ('posix.system', 'run code', 'state_dict()')),
    'runs code, legacy': (
        'a.pth',
        functools.partial(save_evil, legacy=True),
        ('posix.system', 'run code'),
    ),
    'runs code, plain pickle': ('a.pkl', save_plain_pickle, ('damaged or not a weight file',)),
    'whole model': ('a.pth', save_whole_model, ('RepNeXt', 'run code', 'state_dict()')),
    'cut short': ('a.pth', save_cut, ('cut short', 'fetch it again')),
    'cut short, legacy': ('a.pth', functools.partial(save_cut, legacy=True), ('cut short',)),
    'cut shorter, legacy': (
        'a.pth',
        functools.partial(save_cut, legacy=True, keep=0.001),
        ('cut short',),
    ),
    'cut short, safetensors': ('a.safetensors', save_cut_safetensors, ('cut short',)),
    'cut short, TorchScript': ('a.pt', save_cut_archive, ('cut short',)),
    'empty': ('a.pth', functools.partial(save_bytes, data=b''), ('is empty',)),
    'web page': ('a.pth', functools.partial(save_bytes, data=HTML), ('web page',)),
    'LFS pointer': ('a.pth', functools.partial(save_bytes, data=LFS), ('git lfs pull',)),
    'text': (
        'a.pth',
        functools.partial(save_bytes, data=b'{"message": "Not Found"}'),
        ('not a weight file',),
    ),
    'gzip': (
        'a.pth',
        functools.partial(save_bytes, data=gzip.compress(b'weights')),
        ('not a weight file',),
    ),
    'tar': ('a.pth.tar', save_tar, ('tar archive', 'unpack')),
    'zip': ('a.pth', save_zip, ('zip archive', 'unpack')),
    'no weights': (
        'a.pth',
        lambda path: torch.save({'epoch': 1, 'lr': 0.1}, path),
        ('no weights', "'epoch', 'lr'", "'state_dict'"),
    ),
    'a tensor': ('a.pth', lambda path: torch.save(torch.zeros(1), path), ('it is a Tensor',)),
    'quantised': ('a.pth', save_quantised, ('stem.stem.0.conv.weight', 'int8')),
    'sparse': ('a.pth', save_sparse, ('stem.stem.0.conv.weight', 'sparse')),
    'missing': ('a.pth', lambda path: None, ('there is no file',)),
    'a folder': ('a.pth', Path.mkdir, ('is a folder',)),
}


@pytest.mark.parametrize('filename, save, fragments', BROKEN.values(), ids=BROKEN)
def test_broken_file(
    filename: str, save: Callable[[Path], object], fragments: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / filename
    save(path)
    refuse(path, filename, *fragments)
    assert not (tmp_path / 'ran').exists()


def test_evil_files_are_evil(tmp_path: Path) -> None:
    """The files above do run code where nothing protects from it."""
    for save in (save_evil, functools.partial(save_evil, legacy=True)):
        torch.load(save(tmp_path / 'a.pth'), weights_only=False)
        assert (tmp_path / 'ran').exists()
        (tmp_path / 'ran').unlink()
    pickle.loads(save_plain_pickle(tmp_path / 'a.pkl').read_bytes())
    assert (tmp_path / 'ran').exists()


def test_code_in_an_archive_does_not_run(tmp_path: Path) -> None:
    """torch.jit.load would run `__setstate__`; this one creates a file."""
    marker = tmp_path / 'ran'

    class Hostile(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, x: Tensor) -> Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path = state[0]
            # Used, or the compiler would drop the call.
            self.training = torch.from_file(self.path, shared=True, size=8).numel() > 0

    tree = Tree.of(fused_state())
    tree.add_module('hostile', Hostile(str(marker)))
    path = tmp_path / 'hostile.pt'
    torch.jit.script(tree).save(str(path))
    model = RepNeXt('m0', deploy='upstream')
    load_pretrained(model, path)
    assert_holds(model, fused_state())
    assert not marker.exists()
    torch.jit.load(str(path))
    assert marker.exists(), 'the file was not hostile, so that this test showed nothing'


def test_hostile_pickle_in_an_archive_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / 'ran'
    good = save_torchscript(tmp_path / 'good.pt', fused_state())
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as target:
        for name in source.namelist():
            evil = name.endswith('/data.pkl')
            target.writestr(name, pickle.dumps(Evil(marker), 2) if evil else source.read(name))
    refuse(tmp_path / 'bad.pt', 'without any tensor', model=RepNeXt('m0', deploy='upstream'))
    assert not marker.exists()


def test_reading_allows_nothing_for_others(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    path = save_timm(tmp_path / 'a.pth.tar', with_ema=False)
    read_weights(path)
    assert set(torch.serialization.get_safe_globals()) == before
    # What the user allowed stays allowed.
    entry = (argparse.Namespace, 'argparse.Namespace')
    with torch.serialization.safe_globals([entry]):
        read_weights(path)
        assert entry in torch.serialization.get_safe_globals()


def test_a_run_needs_a_torch_checkpoint(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / 'a.pt', fused_state())
    with pytest.raises(CheckpointError, match='TorchScript archive, which a run cannot start'):
        read_run(path)
    # What MMEngine itself would refuse, our own reader's wider allow-list must not let through.
    with pytest.raises(CheckpointError, match=r'argparse\.Namespace'):
        read_run(save_timm(tmp_path / 'b.pth.tar', with_ema=False))
    assert read_run(save_mm2(tmp_path / 'c.pth')).path == str(tmp_path / 'c.pth')

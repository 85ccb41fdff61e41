"""Files that ask for too much, are code, or lie about themselves; errors that are bugs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weight_files import save_bare

from repnext_mm.checkpoints import CheckpointError, read_weights
from repnext_mm.deploy.cli import deploy_main
from repnext_mm.deploy.parity import Golden
from repnext_mm.deploy.report import JSON_NAME
from repnext_mm.engine.errors import UserError, run_tool
from repnext_mm.files import parse_json, read_json
from repnext_mm.runtimes import ArtifactError, open_artifact
from repnext_mm.text import printable

#: Bytes that a file of some hundred bytes asks for.
LARGE = 1 << 34
#: Seconds in which a hostile file must be refused.
SECONDS = 2.0


def call(function: Any, *args: Any) -> Any:
    class Call:
        def __reduce__(self) -> Any:
            return function, args

    return Call()


def save_pickle(path: Path, content: Any) -> Path:
    """A file that `torch.load` takes for one of `torch.save`."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', pickle.dumps(content, 2))
        archive.writestr('a/version', '3\n')
        archive.writestr('a/byteorder', 'little')
    return path


# --- files that ask for too much


@pytest.mark.compat
@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux bounds the memory of a process')
@pytest.mark.parametrize(
    'ask',
    [
        lambda: call(bytearray, LARGE),
        lambda: call(torch.storage.UntypedStorage, LARGE),
        lambda: call(pickle.loads(b'cnumpy.core.multiarray\n_reconstruct\n.'), np.ndarray,
                     (LARGE,), b'b'),
        lambda: call(torch.FloatStorage, LARGE),
    ],
    ids=['bytearray', 'storage', 'array', 'typed storage'],
)  # fmt: skip
def test_small_file_that_asks_for_gigabytes(ask: Callable[[], Any], tmp_path: Path) -> None:
    path = save_pickle(tmp_path / 'bomb.pth', {'state_dict': {'a': ask()}})
    assert path.stat().st_size < 600
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=path.name):
        read_weights(path)
    assert time.monotonic() - start < SECONDS


@pytest.mark.compat
def test_large_files_are_not_refused(tmp_path: Path) -> None:
    torch.save({'state_dict': {'a': torch.ones(40 << 20)}}, tmp_path / 'large.pth')  # 160 MB
    assert read_weights(tmp_path / 'large.pth').tensors['a'].sum() == 40 << 20


@pytest.mark.parametrize('suffix', ['.pth', '.onnx', '.pt2', '.xml'])
def test_pipes_are_not_waited_for(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'pipe{suffix}'
    os.mkfifo(path)
    with pytest.raises((ArtifactError, CheckpointError), match=path.name):
        open_artifact(path)
    with pytest.raises(CheckpointError, match=path.name):
        read_weights(path)


@pytest.mark.parametrize(
    'text, words',
    [
        ('[' * 100_000, 'nested'),
        ('{"a": NaN}', 'NaN'),
        ('{"a": -Infinity}', 'Infinity'),
        ('9' * 5000, 'digits'),
        ('{', 'Expecting'),
        ('\x00', 'Expecting'),
    ],
)
def test_json_that_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / JSON_NAME)
    assert deploy_main(['check', str(tmp_path)]) == 2


def test_arrays_that_claim_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / 'golden.npz'
    header = str({'descr': '<f8', 'fortran_order': False, 'shape': (1 << 31,)}).encode()
    header += b' ' * (117 - len(header)) + b'\n'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('image.npy', b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little')
                         + header)  # fmt: skip
    with pytest.raises(ValueError, match='claims 17179869184 bytes'):
        Golden.load(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        block = np.lib.format.magic(1, 0)
        for number in range(3):
            with archive.open(f'{number}.npy', 'w', force_zip64=True) as file:
                file.write(block + len(header).to_bytes(2, 'little'))
                shape = str({'descr': '|u1', 'fortran_order': False, 'shape': (900 << 20,)})
                file.write(shape.encode().ljust(len(header) - 1) + b'\n')
                for _ in range(900):
                    file.write(bytes(1 << 20))
    assert path.stat().st_size < 4 << 20
    start = time.monotonic()
    with pytest.raises(ValueError, match='at most'):
        Golden.load(path)
    assert time.monotonic() - start < SECONDS


# --- files that are code


class Endless(torch.nn.Module):
    """Never ends, from its first forward on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while True:
            x = x + 1
        return x


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('exported')
    argv = ['repnext_m0', '--size', '64', '--format', 'pth,torchscript', '--quiet']
    assert deploy_main([*argv, '--work-dir', str(folder)]) == 0
    return folder


@pytest.fixture
def own(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / 'own'))


def test_program_is_run_on_trust_only(tmp_path: Path) -> None:
    path = tmp_path / 'endless.torchscript'
    torch.jit.script(Endless()).save(path)
    assert path.stat().st_size < 4000
    with pytest.raises(ArtifactError, match='--trust'):
        open_artifact(path)
    open_artifact(path, trust=True).close()  # opening it is as far as we go


def test_check_needs_trust_for_code(own: Path, capsys: pytest.CaptureFixture) -> None:
    assert deploy_main(['check', str(own)]) == 6
    err = capsys.readouterr().err
    assert '1 of 2 artifacts failed' in err
    assert '--trust' in err
    assert deploy_main(['check', str(own), '--trust']) == 0


def test_explaining_needs_trust_for_code(own: Path, capsys: pytest.CaptureFixture) -> None:
    path = next(own.glob('*.torchscript'))
    assert deploy_main(['explain', str(path)]) != 0
    assert '--trust' in capsys.readouterr().err
    assert deploy_main(['explain', str(path), '--trust', '--quiet']) == 0


# --- reports that lie


def change_report(folder: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    path = folder / JSON_NAME
    content = json.loads(path.read_text())
    content['artifacts'] = [a for a in content['artifacts'] if a['format'] == 'pth']
    change(content['artifacts'][0])
    path.write_text(json.dumps(content))
    return content['artifacts'][0]


def test_tolerance_is_not_that_of_the_report(own: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights, hash and tolerance were changed together."""
    import hashlib

    weights = next(own.glob('*.pth'))
    content = torch.load(weights, weights_only=True)
    for value in content['state_dict'].values():
        value *= 1.5
    torch.save(content, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    change_report(own, lambda a: a.update(sha256=digest, tolerance={'max_rel': 1e9}))
    assert deploy_main(['check', str(own)]) == 6
    assert 'of its std' in capsys.readouterr().err


@pytest.mark.parametrize('field', ['path', 'golden'])
def test_nothing_outside_of_the_folder_is_read(
    field: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inside = own / change_report(own, lambda a: None)[field]
    outside = tmp_path / inside.name
    shutil.move(inside, outside)
    for value in (str(outside), f'../{inside.name}'):
        change_report(own, lambda a, value=value: a.update({field: value}))
        assert deploy_main(['check', str(own)]) == 6
        assert 'not in this folder' in capsys.readouterr().err
    change_report(own, lambda a: a.update({field: inside.name}))
    inside.symlink_to(outside)
    assert deploy_main(['check', str(own)]) == 6
    assert 'not in this folder' in capsys.readouterr().err


@pytest.mark.parametrize(
    'change, value',
    [
        ({'path': 3}, 'path=3'),
        ({'format': 'exe'}, "format='exe'"),
        ({'dtype': 'fp4'}, "dtype='fp4'"),
        ({'golden': None}, 'golden=None'),
    ],
)
def test_report_with_other_fields(
    change: dict[str, Any], value: str, own: Path, capsys: pytest.CaptureFixture
) -> None:
    change_report(own, lambda a: a.update(change))
    assert deploy_main(['check', str(own)]) == 2
    assert value in capsys.readouterr().err


# --- what is said


def test_characters_that_a_terminal_obeys() -> None:
    assert printable('a\x1b[31mb\x07\u202ec\n\td é中') == 'a\\x1b[31mb\\x07\\u202ec\n\td é中'


def test_no_such_character_reaches_the_terminal(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change_report(own, lambda a: a.update(path='x\x1b]0;title\x07.pth'))
    assert deploy_main(['check', str(own)]) == 6
    odd = tmp_path / 'x\x1b[2J.pth'
    odd.write_bytes(b'no weights')
    assert deploy_main(['repnext_m0', str(odd), '--size', '64']) != 0
    out = capsys.readouterr()
    assert '\x1b' not in out.out + out.err
    assert '\\x1b[2J.pth' in out.err


def broken_tool(kind: str) -> Callable[[], None]:
    def tool() -> None:
        if kind == 'ours':
            printable(None)  # type: ignore[arg-type]
        elif kind == 'theirs':
            torch.nn.Linear(2, 3)(torch.zeros(5))
        elif kind == 'own':
            torch.zeros(2) @ torch.zeros(3)
        raise UserError('a file is missing; restore it.')

    return tool


@pytest.mark.parametrize(
    'kind, words',
    [
        ('ours', 'a bug of repnext_mm'),
        ('theirs', 'an error in torch that nobody expected'),
        ('own', 'test_hostile.py, line'),
        ('user', None),
    ],
)
def test_bugs_look_like_bugs(
    kind: str, words: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv('REPNEXT_MM_TRACEBACK', raising=False)
    monkeypatch.delenv('RANK', raising=False)
    assert run_tool(broken_tool(kind)) == 1
    err = capsys.readouterr().err
    assert ('Traceback (most recent call last)' in err) == (words is not None)
    if words:
        assert words in err.splitlines()[-1]
        cure = 'correct it there' if kind == 'own' else 'repnext-mm doctor'
        assert cure in err.splitlines()[-1]
    else:
        assert err == 'error: a file is missing; restore it.\n'


@pytest.mark.parametrize('traceback', ['', '1'])
def test_advice_to_load_unsafely_is_not_quoted(traceback: str, tmp_path: Path) -> None:
    path = save_pickle(tmp_path / 'w.pth', {'state_dict': {'a': call(print, 'ran')}})
    with zipfile.ZipFile(tmp_path / 'v.pth', 'w') as archive:
        archive.writestr('a/data.pkl', b'\x80\x02}q\x00(X\x01\x00\x00\x00ac__main__\nX\n.')
        archive.writestr('a/version', '3\n')
    save_bare(tmp_path / 'u.pth')
    (tmp_path / 'u.pth').write_bytes((tmp_path / 'u.pth').read_bytes()[:900])
    code = 'import sys; from repnext_mm.deploy.cli import deploy_main as main; '
    code += 'sys.exit(main(sys.argv[1:]))'
    for name in (path.name, 'v.pth', 'u.pth'):
        done = subprocess.run(
            [sys.executable, '-c', code, 'repnext_m0', str(tmp_path / name), '--size', '64'],
            capture_output=True,
            text=True,
            env={**os.environ, 'REPNEXT_MM_TRACEBACK': traceback},
        )
        assert done.returncode != 0
        assert name in done.stderr
        assert 'weights_only' not in done.stdout + done.stderr
        assert 'ran' not in done.stdout

"""ONNX Runtime for browsers: fetched once from the npm registry, checked, and put beside a page."""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from ..checkpoints.fetching import transfer
from .errors import DependencyError, UsageError
from .folders import place

NAME, VERSION = 'onnxruntime-web', '1.30.0'
#: What the registry says of this version, as it stands in lock files of npm.
INTEGRITY = (
    'sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1Sig'
    'qR4CXAfKYQ=='
)
REGISTRY = 'https://registry.npmjs.org'
#: What of the package a page needs: the script and the machine code for CPUs.
FILES = ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm')
RUNTIME, PAGE = 'runtime', 'page.js'
LICENSE = f'{NAME} {VERSION}, MIT license, https://github.com/microsoft/onnxruntime\n'


def fetch_runtime(folder: Path) -> Path:
    """Put the runtime into the folder of a page; returns where. Done again, it changes nothing.

    `npm_config_registry` in the environment names another registry, as for npm.

    Args:
        folder: What `--format web` wrote.

    Raises:
        UsageError: That is not such a folder.
        DependencyError: The package could not be fetched, or is not the one of this version.
    """
    if not (folder / PAGE).is_file():
        raise UsageError(f'{folder} has no {PAGE}; give a folder that --format web wrote.')
    target = folder / RUNTIME
    if all((target / name).is_file() for name in FILES):
        return target
    registry = os.environ.get('npm_config_registry', REGISTRY).rstrip('/')  # noqa: SIM112
    url = f'{registry}/{NAME}/-/{NAME}-{VERSION}.tgz'
    with tempfile.TemporaryDirectory(dir=folder, prefix='.partial-') as scratch:
        archive, written = Path(scratch, 'package.tgz'), Path(scratch, RUNTIME)
        try:
            transfer(url, archive)
        except (OSError, URLError, HTTPException) as error:
            reason = str(getattr(error, 'reason', error))
            raise DependencyError(
                f'{url} could not be fetched ({reason}); fetch {NAME} {VERSION} by other means and '
                f'put {" and ".join(FILES)} of its folder dist into {target}.'
            ) from error
        _require_integrity(archive, url)
        written.mkdir()
        with tarfile.open(archive) as package:
            for name in FILES:
                member = package.extractfile(f'package/dist/{name}')
                assert member is not None, 'the digest is right'
                (written / name).write_bytes(member.read())
        (written / 'LICENSE.txt').write_text(LICENSE)
        place(written, target)
    return target


def _require_integrity(archive: Path, url: str) -> None:
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if f'sha512-{found}' != INTEGRITY:
        raise DependencyError(
            f'what {url} sent has the digest sha512-{found[:16]}..., expected {INTEGRITY[:23]}...: '
            'it was damaged or changed, and is not kept.'
        )

"""From what a user wrote (a published name, a URL, a path) to a file on this machine."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, url2pathname

import torch

from ..files import FolderBusy, hold, let_go, write_text
from ..text import closest
from .errors import CheckpointError
from .published import HUB, PUBLISHED, find_published, names_for, strip_suffix
from .reading import File, check_crc, read_weights

#: A server that sends nothing for so long is given up, at the connection and on the way.
STALL_SECONDS = 30.0


def fetch(checkpoint: str | os.PathLike[str]) -> File:
    """The file that `checkpoint` names, downloaded if need be, and read.

    Downloads are kept in torch.hub's folder (`TORCH_HOME` moves it), under the file's own name
    if it is a published one, else with a hash of the URL before it. `HF_ENDPOINT` names a mirror
    of the Hugging Face hub, as for its own library.

    Raises:
        CheckpointError: There is no such name or file, or it could not be fetched completely.
    """
    text = str(checkpoint)
    published = find_published(text)
    if published:
        return _download(text, published.url, published.filename)
    path = text
    scheme = re.match(r'([a-z][a-z0-9+.-]+)://', text, re.IGNORECASE)
    if scheme:
        url = urlsplit(text)
        if url.scheme in ('http', 'https'):
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            filename = f'{digest}-{Path(unquote(url.path)).name or "weights"}'
            return _download(text, text, filename)
        if url.scheme != 'file':
            raise CheckpointError(
                f'checkpoint={text!r} begins with {url.scheme}://, which cannot be fetched; give '
                'a published name, an http, https or file URL, or a path.'
            )
        path = url2pathname(url.path)
    found = Path(path).expanduser()
    if found.is_file():
        return File.read(found, text)
    raise CheckpointError(_not_found(path, found))


def _not_found(text: str, path: Path) -> str:
    if path.is_dir():
        return f'checkpoint={text!r} is a folder; give a weight file in it.'
    name = strip_suffix(path.name)
    if name != path.name or len(path.parts) > 1:
        hint = f'; checkpoint={name!r} downloads it' if name in PUBLISHED else ''
        beside = sorted(path.parent.glob('*.pth'), key=lambda p: p.stat().st_mtime)
        if beside and not hint:  # a run keeps its last checkpoints only
            hint = f'; the newest in its folder is {beside[-1].name}'
        return f'there is no file {str(path.absolute())!r}{hint}.'
    likely = PUBLISHED[closest(text.lower(), PUBLISHED, cutoff=0) or '']
    return (
        f'checkpoint={text!r} is neither a published name nor a file; '
        f'did you mean {likely.name!r}? '
        f'{likely.family} {likely.arch} has {", ".join(names_for(likely.family, likely.arch))}; '
        '"python -m repnext_mm.checkpoints --list" lists all.'
    )


def _download(label: str, url: str, filename: str) -> File:
    """The cached copy of `url`; fetched, checked completely, and only then put in place."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    target = folder / filename
    if url.startswith(f'{HUB}/'):
        url = os.environ.get('HF_ENDPOINT', HUB).rstrip('/') + url.removeprefix(HUB)
    if target.exists():
        return _cached(target, label, url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process of a distributed run fetches, the others wait and find the file.
        with _turn(folder / f'.{filename}.lock', target):
            if target.exists():
                return _cached(target, label, url)
            prefix = f'.download-{filename}-'
            for left in folder.glob(f'{glob.escape(prefix)}*'):
                shutil.rmtree(left, ignore_errors=True)  # its process is dead: the lock is ours
            with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as temporary:
                arrived = Path(temporary, filename)
                digest = transfer(url, arrived)
                file = File.read(arrived, f'what {url} sent')
                _require_digest(file, digest or published_digest(url), f'what {url} sent', url)
                check_crc(file)
                read_weights(file)
                write_text(_record(target), f'{file.sha256}  {filename}\n')
                arrived.replace(target)
                return replace(file, path=target, label=label)
    except HTTPError as err:
        reason = f'the server answered {err.code} {err.reason}'
    except TimeoutError:
        reason = f'nothing came for {STALL_SECONDS:.0f} s'
    except (URLError, HTTPException, OSError) as err:
        reason = str(getattr(err, 'reason', err))
        if isinstance(getattr(err, 'reason', None), TimeoutError):
            reason = f'no connection within {STALL_SECONDS:.0f} s'
    raise CheckpointError(
        f'{url} could not be fetched ({reason}); fetch it by other means, and give its path or '
        f'put it at {target}.'
    )


@contextmanager
def _turn(path: Path, target: Path) -> Iterator[None]:
    """This process's turn to fetch a file; it says so where it has to wait for another's."""
    try:
        lock = hold(path)
    except FolderBusy as busy:
        print(f'Waiting for {target}, which {busy.owner} fetches', file=sys.stderr, flush=True)
        lock = hold(path, timeout=-1)
    try:
        yield
    finally:
        let_go(lock)


# --- digests


def published_digest(url: str) -> str | None:
    """The SHA-256, or the beginning of it, that a URL carries in its file name.

    As torch.hub's file names do: `resnet50-0676ba61.pth`.
    """
    name = Path(unquote(urlsplit(url).path)).name
    found = re.search(r'-([0-9a-f]{8,64})\.[a-z.]+$', name)
    return found[1] if found else None


def _record(target: Path) -> Path:
    """Where the SHA-256 of a cached file is kept."""
    return target.with_name(f'{target.name}.sha256')


def _cached(target: Path, label: str, url: str) -> File:
    """A file of the cache, if it is still what was fetched.

    The first use of a file whose digest nobody publishes records it; later uses compare.
    """
    file = File.read(target, label)
    record = _record(target)
    known = published_digest(url)
    if record.is_file():
        known = next(iter(record.read_text('utf-8').split()), known)
    _require_digest(file, known, f'the cached file {target}', url)
    if not record.is_file():
        with suppress(OSError):  # a cache that others share need not be ours to write
            write_text(record, f'{file.sha256}  {target.name}\n')
    return file


def _require_digest(file: File, known: str | None, what: str, url: str) -> None:
    if known and not file.sha256.startswith(known):
        fix = (
            f'delete {file.path}, and with it {_record(file.path).name}, to fetch it again'
            if what.startswith('the cached')
            else 'it is not kept; fetch it by other means'
        )
        raise CheckpointError(
            f'{what} has the SHA-256 {file.sha256[:16]}..., expected {known[:16]}... for {url}: it '
            f'was damaged or changed; {fix}.'
        )


# --- the transfer


class _StayOnHTTP(HTTPRedirectHandler):
    """Follows redirects to http and https, never from https to http; keeps a digest on the way."""

    digest: str | None = None

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ('http', 'https') or (req.type == 'https' and scheme == 'http'):
            raise URLError(f'it redirects from {req.type} to {scheme}, which is not followed')
        self.digest = self.digest or _linked(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _linked(headers: Any) -> str | None:
    """The SHA-256 that the hub tells of a large file, on the way to where it is."""
    value = str(headers.get('X-Linked-ETag') or '').strip('"')
    return value if re.fullmatch(r'[0-9a-f]{64}', value) else None


def transfer(url: str, target: Path) -> str | None:
    """Fetch `url` to `target`; returns its SHA-256 if the server tells it.

    Raises:
        OSError: No connection, or nothing came for `STALL_SECONDS`, or less than announced.
    """
    terminal = sys.stderr.isatty()
    if not terminal:  # a bar would be unreadable in a file
        print(f'Downloading {url}', file=sys.stderr, flush=True)
    request = Request(url, headers={'User-Agent': 'repnext_mm'})
    redirects = _StayOnHTTP()
    with (
        build_opener(redirects).open(request, timeout=STALL_SECONDS) as answer,
        open(target, 'wb') as file,
    ):
        announced = answer.headers.get('Content-Length')
        total = int(announced) if announced and announced.isdecimal() else None
        received = 0
        with _bar(terminal, total) as advance:
            while block := answer.read(1 << 16):
                file.write(block)
                received += len(block)
                advance(len(block))
        if total is not None and received < total:
            raise URLError(f'{received} of {total} bytes came')
        return redirects.digest or _linked(answer.headers)


@contextmanager
def _bar(shown: bool, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task('', total=total)
        yield lambda count: progress.advance(task, count)

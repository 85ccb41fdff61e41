"""From what a user wrote (a published name, a URL, a path) to a file on this machine."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import torch
from filelock import FileLock

from ..text import closest
from .errors import CheckpointError
from .published import HUB, PUBLISHED, find_published, names_for, strip_suffix
from .reading import File, check_crc, read_weights


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
        return File.read(target, label)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process of a distributed run fetches, the others wait and find the file.
        with FileLock(folder / f'.{filename}.lock'):
            if target.exists():
                return File.read(target, label)
            with tempfile.TemporaryDirectory(prefix='.download-', dir=folder) as temporary:
                arrived = Path(temporary, filename)
                # A bar in a terminal; in a file, where it would be unreadable, one line.
                if not (terminal := sys.stderr.isatty()):
                    print(f'Downloading {url} to {target}', file=sys.stderr, flush=True)
                torch.hub.download_url_to_file(url, str(arrived), progress=terminal)
                file = File.read(arrived, f'what {url} sent')
                check_crc(file)
                read_weights(file)
                arrived.replace(target)
                return replace(file, path=target, label=label)
    except HTTPError as err:
        reason = f'the server answered {err.code} {err.reason}'
    except (URLError, HTTPException, OSError) as err:
        reason = str(getattr(err, 'reason', err))
    raise CheckpointError(
        f'{url} could not be fetched ({reason}); fetch it by other means, and give its path or '
        f'put it at {target}.'
    )

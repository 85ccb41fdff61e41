"""Reading weight files of every kind safely: what they are, and the tensors in them."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..files import require_regular
from .errors import CheckpointError
from .safe_globals import SafeGlobal
from .torchscript import archive_root, read_torchscript

#: Memory that reading any file may take beside what its size explains.
SPARE = 2 << 30

Kind = Literal['torch checkpoint', 'TorchScript archive', 'safetensors file']

#: Keys under which training scripts keep the weights, first match wins. timm writes averaged (EMA)
#: weights beside the raw ones and evaluates both, which `state_dict_ema` wins as a rule. The
#: published scripts, which are DeiT's, evaluate and publish `model` and never `model_ema`.
#: mmengine has put the averaged ones under `state_dict` when it saves, so its `ema_state_dict`
#: comes last.
CONTAINERS = ('state_dict_ema', 'state_dict', 'model', 'model_ema', 'ema_state_dict')

# Objects with attributes only, which training scripts put beside the weights. Allowed while our
# own reader is at work, not for every torch.load of the process.
_EXTRA_GLOBALS: tuple[SafeGlobal, ...] = ((argparse.Namespace, 'argparse.Namespace'),)


@dataclass(frozen=True)
class File:
    """A weight file in memory. It is read once; all that is asked of it later is in `data`.

    Args:
        path: Where it is.
        label: What messages call it.
        data: Its bytes.
        sha256: Of those.
    """

    path: Path
    label: str
    data: bytes = field(repr=False)
    sha256: str

    @classmethod
    def read(cls, path: str | os.PathLike[str], label: str | None = None) -> File:
        """Read a file; messages call it by its path unless `label` is given."""
        try:
            data = require_regular(Path(path)).read_bytes()
        except ValueError as err:
            raise CheckpointError(f'{str(err).rstrip(".")}; give a weight file.') from err
        return cls(Path(path), label or str(path), data, hashlib.sha256(data).hexdigest())

    def open(self) -> io.BytesIO:
        """The bytes, to read from their beginning."""
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, where in it they were, and the SHA-256 of the file.

    `meta` is what a training run says of itself in its checkpoint, and `others` are further places
    in the file that contain weights.
    """

    label: str
    kind: Kind
    container: str
    tensors: dict[str, Tensor]
    sha256: str
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        under = f' under {self.container!r}' if self.container else ''
        also = f', not those under {" or ".join(map(repr, self.others))}' if self.others else ''
        return f'{self.kind}, {len(self.tensors)} tensors{under}{also}'


def read_weights(
    file: File | Path, label: str | None = None, container: str | None = None
) -> Weights:
    """The tensors of a weight file; nothing in the file is executed.

    Args:
        file: The file, or its path.
        label: What to call it in messages; its path unless given.
        container: The key of a torch checkpoint to read, such as 'model_ema'; None for the first
            of `CONTAINERS` that it has.

    Raises:
        CheckpointError: It is not a weight file, is damaged, or contains more than data.
    """
    file = file if isinstance(file, File) else File.read(file, label)
    kind = file_kind(file)
    if kind == 'torch checkpoint':
        content = read_checkpoint(file, _EXTRA_GLOBALS)
        name, tensors = _find_tensors(content, file.label, container)
        meta = content.get('meta') if isinstance(content, dict) else None
        meta = meta if isinstance(meta, dict) else {}
        others = _containers(content) if name else {}
        rest = tuple(other for other in others if other != name)
        return Weights(file.label, kind, name, tensors, file.sha256, meta, rest)
    if container is not None:
        raise CheckpointError(
            f'{file.label} is a {kind}, which has no container={container!r}; leave it out.'
        )
    reader = read_torchscript if kind == 'TorchScript archive' else _read_safetensors
    with _damage_named(file.label), bounded_memory(len(file.data)):
        tensors = reader(file.open())
    if not tensors:
        raise CheckpointError(f'{file.label} is a {kind} without any tensor to load.')
    return Weights(file.label, kind, '', tensors, file.sha256)


def read_checkpoint(file: File, extra_globals: Sequence[SafeGlobal] = ()) -> Any:
    """The complete content of a file that `torch.save` wrote, by torch's safe loading.

    Raises:
        CheckpointError: The file is damaged, or contains more than data.
    """
    missing = [g for g in extra_globals if g not in torch.serialization.get_safe_globals()]
    with _damage_named(file.label):
        try:
            with torch.serialization.safe_globals(missing), bounded_memory(len(file.data)):
                return torch.load(file.open(), map_location='cpu', weights_only=True)
        except CheckpointError as err:  # from our stand-in for getattr
            raise CheckpointError(f'{file.label} was not loaded: {err}') from err
        except pickle.UnpicklingError as err:
            objects = _refused_objects(file, str(err))
            if not objects:
                raise
            raise CheckpointError(
                f'{file.label} was not loaded, because it holds Python objects beside tensors '
                f'({", ".join(objects)}), and loading those can run code; ask for, or save, a '
                'plain state dict: torch.save(model.state_dict(), ...).'
            ) from err


def check_crc(file: File) -> None:
    """Compare a zip archive's bytes with the checksums in it; other files pass.

    Raises:
        CheckpointError: They differ.
    """
    if zipfile.is_zipfile(file.open()):
        with _damage_named(file.label), zipfile.ZipFile(file.open()) as archive:
            bad = archive.testzip()
        if bad:
            raise CheckpointError(_damaged(file.label, f'the checksum of {bad} is wrong'))


def file_kind(file: File) -> Kind:
    """Which kind of weight file this is, by its content.

    Raises:
        CheckpointError: It is none, and what it is instead.
    """
    head = file.data[:512]
    # First, as the length that such a file begins with may look like any other file's mark.
    if _is_safetensors(head, len(file.data)):
        return 'safetensors file'
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n')[:64].lower()
    if not head:
        reason = 'is empty; delete it and fetch it again.'
    elif text.startswith(b'version https://git-lfs'):
        reason = 'is a Git LFS pointer, not the weights it points to; run "git lfs pull" there.'
    elif text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head', b'<body')):
        reason = 'is a web page, not weights; delete it and fetch the file itself.'
    elif head.startswith(b'PK'):
        return _zip_kind(file)
    elif head.startswith(b'\x80'):
        return 'torch checkpoint'
    elif tarfile.is_tarfile(file.open()):
        reason = 'is a tar archive; unpack it and give a weight file in it.'
    else:
        reason = (
            f'is not a weight file (it begins with {head[:12]!r}); '
            'torch checkpoints, TorchScript archives and safetensors can be read.'
        )
    raise CheckpointError(f'{file.label} {reason}')


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes with the length of what follows, which is JSON, within `size` bytes."""
    return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8


def _zip_kind(file: File) -> Kind:
    if not zipfile.is_zipfile(file.open()):
        raise CheckpointError(_damaged(file.label, 'the end of the archive is missing'))
    with zipfile.ZipFile(file.open()) as archive:
        names = set(archive.namelist())
        root = archive_root(archive) if names else ''
    if f'{root}/data.pkl' not in names:
        raise CheckpointError(
            f'{file.label} is a zip archive but not one that torch.save wrote; '
            'unpack it and give a weight file in it.'
        )
    scripted = f'{root}/constants.pkl' in names
    return 'TorchScript archive' if scripted else 'torch checkpoint'


def _read_safetensors(file: io.BytesIO) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(file.getvalue())


def _find_tensors(
    content: Any, label: str, container: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The name of the container in a checkpoint ('' for a bare state dict), and its tensors."""
    if container is not None:
        chosen = _containers(content, (container,))
        if not chosen:
            there = ', '.join(map(repr, _containers(content))) or 'none'
            raise CheckpointError(
                f'{label} contains no weights under container={container!r}; it has {there}.'
            )
        return container, chosen[container]
    for name, tensors in _containers(content).items():
        return name, tensors
    if isinstance(content, Mapping):
        if tensors := _tensors_in(content):
            return '', tensors
        found = f'its keys are {", ".join(map(repr, list(content)[:8])) or "none"}'
    else:
        found = f'it is a {type(content).__name__}'
    raise CheckpointError(
        f'{label} holds no weights: {found}, where a state dict, bare or under '
        f'{", ".join(map(repr, CONTAINERS))}, was expected.'
    )


def _containers(content: Any, names: Sequence[str] = CONTAINERS) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint under each of `names` that has any."""
    if not isinstance(content, Mapping):
        return {}
    found = {name: _tensors_in(content.get(name)) for name in names}
    return {name: tensors for name, tensors in found.items() if tensors}


def _tensors_in(values: Any) -> dict[str, Tensor]:
    if not isinstance(values, Mapping):
        return {}
    return {str(k): v for k, v in values.items() if isinstance(v, Tensor)}


def _refused_objects(file: File, message: str) -> list[str]:
    """Names of the Python objects for which torch refused a file, if it was for that."""
    find: Callable[[Any], list[str]] = torch.serialization.get_unsafe_globals_in_checkpoint
    try:
        names = find(file.open())
    except Exception:  # older formats cannot be listed; the first name is in the message
        names = []
    return sorted(names) or re.findall(r'GLOBAL (\S+) (?:was not|whose module)', message)[:1]


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """In this context, this process gets little more memory than a file of `size` bytes explains.

    A few hundred bytes can ask for gigabytes. What asks for more fails with a MemoryError, or with
    torch's RuntimeError. Only Linux can tell how much the process has.
    """
    if sys.platform != 'linux':
        yield
        return
    import resource

    pages = int(Path('/proc/self/statm').read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + 8 * size + SPARE
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _damage_named(label: str) -> Iterator[None]:
    """Turn whatever a parser makes of broken bytes into one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as err:
        reason = str(err).strip().partition('\n')[0] or type(err).__name__
        if isinstance(err, MemoryError) or "can't allocate memory" in str(err):
            reason = 'it asks for more memory than its size explains'
        elif 'eights only load failed' in reason or 'weights_only' in reason:
            found = re.search(r'WeightsUnpickler error: (.+)', str(err))
            reason = found[1] if found else 'its pickle is not that of weights'
        raise CheckpointError(_damaged(label, reason)) from err


def _damaged(label: str, reason: str) -> str:
    return (
        f'{label} is cut short, damaged or not a weight file ({reason.rstrip(".")}); '
        'delete it and fetch it again.'
    )

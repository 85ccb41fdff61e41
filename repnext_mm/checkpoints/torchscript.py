"""The tensors of a TorchScript archive, without its code.

`torch.jit.load` compiles the code in the archive and runs its `__setstate__` methods, which can
write files. An archive is a zip of a pickle and the tensors' bytes, so that the tensors can be
had without it: here every class that the pickle names becomes an inert record.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

#: Types of storage that an archive may name.
DTYPES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}


class _Record:
    """Stand-in for a module of the archive: keeps its attributes, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.attributes: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; looks up no name in any module."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f'{root}/data.pkl')))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}
        # Methods and a class of this instance, so that a pickle which sets attributes on what it
        # was given changes nothing that outlives the load.
        self.record = type('Record', (_Record,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return self.rebuild_tensor
        # Typed lists (`build_intlist`) and tagged values (`restore_type_tag`): the value itself.
        if module == 'torch.jit._pickle':
            return self.first_argument
        if module == 'torch' and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        return self.record

    def persistent_load(self, pid: Any) -> Tensor:
        """The flat tensor behind ('storage', type, key, device, number of values)."""
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f'{self.root}/data/{key}'))
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self.storages[key]

    def rebuild_tensor(
        self, flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return flat.as_strided(size, stride, offset)  # raises beyond the bounds of `flat`

    def first_argument(self, value: Any, *_: Any) -> Any:
        return value


def archive_root(archive: zipfile.ZipFile) -> str:
    """Name of the one folder in a torch archive."""
    return archive.namelist()[0].split('/', 1)[0]


def read_torchscript(file: IO[bytes]) -> dict[str, Tensor]:
    """Every tensor in the archive by its attribute path, as `state_dict()` would name it."""
    with zipfile.ZipFile(file) as archive:
        module = _TensorUnpickler(archive, archive_root(archive)).load()
    return dict(_tensors(module, '', ()))


def _tensors(value: Any, name: str, parents: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Record) and isinstance(value.attributes, dict):
        if id(value) in parents:
            raise ValueError('the archive contains itself')
        for key, child in value.attributes.items():
            path = f'{name}.{key}' if name else str(key)
            yield from _tensors(child, path, (*parents, id(value)))

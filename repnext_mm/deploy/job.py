"""What to export and how; every format is written from one job."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..runtimes import EXTRAS, MOST_SIDE, unpadded
from .targets import INPUT, Target

#: What torch.onnx writes and ONNX Runtime reads; below 18 it converts, and that fails for some.
OPSETS = (18, 19, 20, 21, 22, 23)
#: The first in which GELU is one operator, which ONNX Runtime computes a sixth faster.
OPSET = 20
#: At least so large is the image that an open height and width are traced with.
TRACED_SIDE = 320
IOS_TARGETS = (15, 16, 17, 18, 26)
#: What an artifact computes in, by the name on the command line.
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


@dataclass
class Job:
    """What to export and how.

    Args:
        target: In float32, in eval mode, on the CPU.
        size: Height and width of the images.
        batch: Number of images.
        dynamic: 'none', 'batch', 'hw' for open height and width, or 'batch-hw' for all.
        divisor: What an open height and width are divisible by.
        dtype: A name in `DTYPES`.
        metadata: Written into the artifact as JSON.
        opset: ONNX operator set.
        ios_target: Oldest iOS that must run a Core ML model.
        device: What AOTInductor compiles for, 'cpu' or 'cuda'.
        settings: The content of model.json, for formats that contain it.
    """

    target: Target
    size: tuple[int, int]
    metadata: dict[str, Any]
    batch: int = 1
    dynamic: str = 'none'
    divisor: int = 1
    dtype: str = 'fp32'
    opset: int = OPSET
    ios_target: int = IOS_TARGETS[0]
    device: str = 'cpu'
    settings: dict[str, Any] = field(default_factory=dict)
    _programs: dict[tuple[str, str], ExportedProgram] = field(default_factory=dict, repr=False)
    _onnx: dict[tuple[str, int], bytes] = field(default_factory=dict, repr=False)

    def of(self, target: Target, **changes: Any) -> Job:
        """The same job of another target, which nothing is traced of yet."""
        return replace(self, target=target, _programs={}, _onnx={}, **changes)

    def for_format(self, name: str) -> Job:
        """This job with the target as a format takes it."""
        target = self.target.for_format(name)
        if target is self.target:
            return self
        job = self.of(target)
        job.metadata = job.metadata | {'inputs': job.input_names}
        return job

    def module(self, dtype: str | None = None) -> Target:
        """The target in the dtype of the job or the one asked for."""
        chosen = DTYPES[dtype or self.dtype]
        return (self.target if chosen == torch.float32 else self.target.reduced(chosen)).eval()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, *self.size

    @property
    def input_names(self) -> list[str]:
        return [INPUT, *self.target.extras]

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with."""
        # A batch of one would become a constant where the batch is to stay open.
        batch = max(self.batch, 2) if 'batch' in self.dynamic else self.batch
        # Nor may a feature map of one or two pixels be, where height and width are.
        least = TRACED_SIDE if 'hw' in self.dynamic else 1
        height, width = (-(-max(side, least) // self.divisor) * self.divisor for side in self.size)
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(batch, 3, height, width, generator=generator)
        if self.target.preprocess is not None:
            image = self.target.preprocess.undo(image)
        inputs = unpadded(self.input_names, image.numpy())
        return tuple(torch.from_numpy(value) for value in inputs.values())

    def open_dims(self) -> list[tuple[int, ...]]:
        """For each input, its dimensions that stay open."""
        batch = (0,) if 'batch' in self.dynamic else ()
        image = (*batch, *((2, 3) if 'hw' in self.dynamic else ()))
        return [image, *(batch if EXTRAS[name][1] else () for name in self.target.extras)]

    def _dim(self, dim: int) -> Any:
        """How torch.export is told that a dimension is open."""
        if self.divisor == 1 or dim < 2:
            return Dim.DYNAMIC
        name = ('height', 'width')[dim - 2]
        return self.divisor * Dim(f'{name}_by_{self.divisor}', max=MOST_SIDE // self.divisor)

    def program(self, dtype: str | None = None, device: str = 'cpu') -> ExportedProgram:
        """The exported program that most formats are made from; traced once for all of them."""
        key = dtype or self.dtype, device
        if key in self._programs:
            return self._programs[key]
        module = self.module(dtype).without_swap().to(device)
        example = tuple(value.to(device) for value in self.example)
        dims = tuple({dim: self._dim(dim) for dim in dims} for dims in self.open_dims())
        with torch.no_grad():
            program = torch.export.export(
                module, example, dynamic_shapes=dims if any(dims) else None
            )
        # What was lowered once cannot be lowered again where sizes depend on what is found.
        if not self.target.lowers_once:
            self._programs[key] = program
        return program

    def onnx(self, dtype: str | None = None, opset: int | None = None) -> bytes:
        """The program as ONNX, one protocol buffer with its weights inside."""
        key = dtype or self.dtype, opset or self.opset
        if key not in self._onnx:
            program = torch.onnx.export(
                self.program(dtype),
                dynamo=True,
                opset_version=key[1],
                input_names=self.input_names,
                output_names=[*self.target.output_names],
                custom_translation_table=self.target.translations or None,
                external_data=False,
                optimize=True,
                verify=False,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
            if self.target.task != 'backbone':
                name_parts(model.graph.node)
            self._onnx[key] = model.SerializeToString()
        return self._onnx[key]

    @property
    def metadata_text(self) -> str:
        return json.dumps(self.metadata)


#: What part of a model a node belongs to, by where it was traced; the first that fits.
PARTS = (
    ('model.backbone', 'backbone'),
    ('model.neck', 'neck'),
    ('model.decode_head', 'head'),
    ('dense.head', 'head'),
    ('stages.mask_', 'masks'),
    ('stages.pooling', 'RoIAlign'),
    ('stages.heads', 'box head'),
    ('dense', 'selection'),
    ('stages', 'selection'),
)
#: All names of parts, the longest first, since one ends with another.
PART_NAMES = sorted({'images', 'NMS', *(part for _, part in PARTS)}, key=len, reverse=True)
#: Parts that are no layers of the network.
AFTER_NETWORK = ('images', 'selection', 'RoIAlign', 'NMS')
#: Between the part and the rest of a node's name.
IN_PART = '::'


def name_parts(nodes: Iterable[Any]) -> None:
    """Put before the name of each ONNX node what part of the model it is, for `explain`."""
    part = outside = 'images'
    for node in nodes:
        scopes = {entry.key: entry.value for entry in node.metadata_props}
        text = scopes.get('pkg.torch.onnx.name_scopes')
        if text is not None:
            names = ast.literal_eval(text)
            parts = (p for start, p in PARTS if any(name.startswith(start) for name in names))
            part = next(parts, outside)
            if part not in AFTER_NETWORK:
                outside = 'selection'  # what the target computes itself, once there are features
        own = 'NMS' if node.op_type == 'NonMaxSuppression' else part
        node.name = f'{own}{IN_PART}{node.name}'


@contextmanager
def in_memory(path: Path) -> Iterator[BytesIO]:
    """A buffer that is written to `path` when it is complete.

    torch's own writer ends the process, from a destructor, when a disk is full.
    """
    buffer = BytesIO()
    yield buffer
    path.write_bytes(buffer.getbuffer())

"""One function per format: each writes the same fused backbone to a path.

Where a format can be reached from `torch.export`, all use the same exported program, so that no
two of them can differ in what they describe.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.torch_version import TorchVersion

from ..backbones.recnext import LinearAttention
from ..engine.quiet import muffled
from ..runtimes import METADATA_KEY
from .errors import DependencyError

INPUT = 'image'
#: What torch.onnx writes and ONNX Runtime reads; below 18 it converts, and that fails for some.
OPSETS = (18, 19, 20, 21, 22, 23)
#: At least so large is the image that an open height and width are traced with.
TRACED_SIDE = 320
IOS_TARGETS = (15, 16, 17, 18, 26)
#: In the metadata of AOTInductor packages, which torch runs on whatever they are given.
UNCHECKED = (
    'The code reads its input as contiguous float32 images of the shape that size, batch and '
    'dynamic say, and checks none of this unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the environment.'
)
#: What an artifact computes in, by the name on the command line.
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


@dataclass(frozen=True)
class Preprocess:
    """What a data preprocessor does to an image with values from 0 to 255.

    Args:
        mean: Per channel, in the order after `swap`.
        std: As `mean`.
        swap: Whether red and blue change places first.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    swap: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Preprocess | None:
        """That of a config's `data_preprocessor`, None where it does not normalise."""
        if not settings or settings.get('mean') is None or settings.get('std') is None:
            return None
        swap = settings.get('bgr_to_rgb') or settings.get('rgb_to_bgr')
        return cls(tuple(settings['mean']), tuple(settings['std']), bool(swap))

    def apply(self, image: Tensor) -> Tensor:
        """`(N, 3, H, W)` as loaded to what the backbone requires."""
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((image.flip(1) if self.swap else image) - mean) / std

    def undo(self, image: Tensor) -> Tensor:
        """The image that `apply` makes `image` of."""
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        raw = image * std + mean
        return raw.flip(1) if self.swap else raw


class Deployed(nn.Module):
    """A backbone as every artifact presents it: `image (N, 3, H, W)` float32 to float32 stages.

    Args:
        backbone: The backbone, already in the dtype to compute in.
        dtype: That dtype where it is not the image's: images and outputs are converted.
        preprocess: Applied first, where the artifact requires images as they were loaded.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dtype: torch.dtype | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dtype = dtype
        self.preprocess = preprocess

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.preprocess is not None:
            image = self.preprocess.apply(image)
        if self.dtype is None:
            return self.backbone(image)
        return tuple(stage.float() for stage in self.backbone(image.to(self.dtype)))


@dataclass
class Job:
    """What to export and how; every exporter uses one.

    Args:
        model: Fused backbone in float32, in eval mode, on the CPU.
        size: Height and width of the images.
        batch: Number of images.
        dynamic: 'none', 'batch', or 'hw' for open height and width.
        dtype: A name in `DTYPES`.
        metadata: Written into the artifact as JSON.
        opset: ONNX operator set.
        ios_target: Oldest iOS that must run a Core ML model.
        device: What AOTInductor compiles for, 'cpu' or 'cuda'.
        preprocess: Built into the artifact.
    """

    model: nn.Module
    size: tuple[int, int]
    output_names: tuple[str, ...]
    metadata: dict[str, Any]
    batch: int = 1
    dynamic: str = 'none'
    dtype: str = 'fp32'
    opset: int = OPSETS[0]
    ios_target: int = IOS_TARGETS[0]
    device: str = 'cpu'
    preprocess: Preprocess | None = None
    _programs: dict[tuple[str, str], ExportedProgram] = field(default_factory=dict, repr=False)

    def deployed(self, dtype: str | None = None) -> Deployed:
        """The module that is traced, in the dtype of the job or the one asked for."""
        chosen = DTYPES[dtype or self.dtype]
        if chosen == torch.float32:
            return Deployed(self.model, None, self.preprocess).eval()
        return Deployed(copy.deepcopy(self.model).to(chosen), chosen, self.preprocess).eval()

    def with_preprocess(self, model: nn.Module) -> Deployed:
        """Another form of the network, on the same images."""
        return Deployed(model, None, self.preprocess).eval()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, *self.size

    @property
    def example(self) -> Tensor:
        """An image batch to trace with."""
        # A batch of one would become a constant where the batch is to stay open.
        batch = max(self.batch, 2) if self.dynamic == 'batch' else self.batch
        # Nor may a map of one or two pixels be, where height and width are.
        least = TRACED_SIDE if self.dynamic == 'hw' else 1
        height, width = (max(side, least) for side in self.size)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, height, width, generator=generator)

    def program(self, dtype: str | None = None, device: str = 'cpu') -> ExportedProgram:
        """The exported program that most formats are made from; traced once for all of them."""
        key = dtype or self.dtype, device
        if key not in self._programs:
            open_dims = {'none': (), 'batch': (0,), 'hw': (2, 3)}[self.dynamic]
            dims = dict.fromkeys(open_dims, Dim.DYNAMIC)
            module, example = self.deployed(dtype).to(device), self.example.to(device)
            with torch.no_grad():
                self._programs[key] = torch.export.export(
                    module, (example,), dynamic_shapes=(dims,) if dims else None
                )
        return self._programs[key]

    @property
    def metadata_text(self) -> str:
        return json.dumps(self.metadata)


def export_pth(job: Job, path: Path) -> None:
    """The fused state dict, for this package's own backbone with `deploy=`."""
    state = job.deployed().backbone.state_dict()
    content = {'state_dict': state, 'meta': {METADATA_KEY: job.metadata_text}}
    with in_memory(path) as buffer:
        torch.save(content, buffer)


def export_pt2(job: Job, path: Path) -> None:
    """An exported program, PyTorch's neutral format."""
    with in_memory(path) as buffer:
        torch.export.save(job.program(), buffer, extra_files={METADATA_KEY: job.metadata_text})


def export_aoti(job: Job, path: Path) -> None:
    """A library compiled by AOTInductor for the processor at hand."""
    from torch import _inductor

    metadata = json.dumps(job.metadata | {'unchecked': UNCHECKED})
    with in_memory(path) as buffer:
        _inductor.aoti_compile_and_package(
            job.program(device=job.device),
            package_path=buffer,
            inductor_configs={'aot_inductor.metadata': {METADATA_KEY: metadata}},
        )


def export_onnx(job: Job, path: Path) -> None:
    """One ONNX file with its weights inside."""
    program = torch.onnx.export(
        job.program(),
        dynamo=True,
        opset_version=job.opset,
        input_names=[INPUT],
        output_names=[*job.output_names],
        external_data=False,
        optimize=True,
        verify=False,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = job.metadata_text
    program.save(str(path), external_data=False)


def export_openvino(job: Job, path: Path) -> None:
    """An OpenVINO IR: the folder `path` with `model.xml` and `model.bin`."""
    import openvino

    # What OpenVINO computes in is chosen when it runs; a file in fp16 is half as large.
    program = job.program('fp32')
    sides = {'none': job.shape, 'batch': (-1, *job.shape[1:]), 'hw': (job.batch, 3, -1, -1)}
    model = openvino.convert_model(program, input=[openvino.PartialShape(sides[job.dynamic])])
    model.inputs[0].get_tensor().set_names({INPUT})
    for output, name in zip(model.outputs, job.output_names, strict=True):
        output.get_tensor().set_names({name})
    model.set_rt_info(job.metadata_text, METADATA_KEY)
    path.mkdir()
    openvino.save_model(model, path / 'model.xml', compress_to_fp16=job.dtype == 'fp16')


def export_torchscript(job: Job, path: Path) -> None:
    """A traced module, the bridge to tools that read nothing newer."""
    module = torch.jit.freeze(trace(job))
    with in_memory(path) as buffer:
        torch.jit.save(module, buffer, _extra_files={METADATA_KEY: job.metadata_text})


def trace(job: Job, dtype: str | None = None) -> torch.jit.ScriptModule:
    """The traced module, in the dtype of the job or the one asked for."""
    with torch.no_grad():
        return torch.jit.trace(job.deployed(dtype), job.example, check_trace=False).eval()


def check_coreml() -> list[str]:
    """What to be warned of before a conversion.

    Raises:
        DependencyError: coremltools came without the library that writes weights.
    """
    with muffled():
        import coremltools
        from coremltools import _deps
    try:
        from coremltools.libmilstoragepython import _BlobStorageWriter  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f'coremltools {coremltools.__version__} came without its native library here, as pip '
            'installs it where there is no wheel for this Python; use Python 3.10 to 3.13 on '
            'Linux or macOS.'
        ) from error
    tested = getattr(_deps, '_TORCH_MAX_VERSION', None)
    if tested and TorchVersion(torch.__version__.split('+')[0]) > TorchVersion(tested):
        return [
            f'coremltools {coremltools.__version__} is tested by its makers up to torch {tested}, '
            f'and this is torch {torch.__version__}'
        ]
    return []


def export_coreml(job: Job, path: Path) -> None:
    """A Core ML program (`.mlpackage`) with float32 inputs and outputs."""
    import coremltools

    # Keeps linear attention in float32, as PyTorch does: in half precision its sums lose too much.
    half = coremltools.transform.FP16ComputePrecision(op_selector=_takes_float16)
    model = coremltools.convert(
        trace(job, 'fp32'),
        inputs=[coremltools.TensorType(INPUT, shape=job.shape, dtype=np.float32)],
        outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in job.output_names],
        convert_to='mlprogram',
        compute_precision=half if job.dtype == 'fp16' else coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target[f'iOS{job.ios_target}'],
        skip_model_load=True,
    )
    model.short_description = '{family} {arch}, fused with plan {plan}'.format(**job.metadata)
    model.version = job.metadata['version']
    model.user_defined_metadata[METADATA_KEY] = job.metadata_text
    model.save(str(path))


def _takes_float16(op: Any) -> bool:
    from coremltools.converters.mil.mil.scope import ScopeSource

    inside = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_TYPE, [])
    return LinearAttention.__name__ not in inside or nn.Conv2d.__name__ in inside


@contextmanager
def in_memory(path: Path) -> Iterator[BytesIO]:
    """A buffer that is written to `path` when it is complete.

    torch's own writer ends the process, from a destructor, when a disk is full.
    """
    buffer = BytesIO()
    yield buffer
    path.write_bytes(buffer.getbuffer())

"""Running an exported backbone in the runtime that its file is made for, all through one class."""

from __future__ import annotations

import inspect
import json
import platform
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import CheckpointError, File, read_checkpoint
from .openvino_core import openvino_core

#: The key under which every artifact carries its metadata, as one JSON string.
METADATA_KEY = 'repnext_mm'

#: Names of inference precisions, by the names of numbers in metadata, runtimes and torch.
PRECISIONS = {
    'fp32': 'f32',
    'float32': 'f32',
    'tensor(float)': 'f32',
    'fp16': 'f16',
    'float16': 'f16',
    'tensor(float16)': 'f16',
    'bf16': 'bf16',
    'bfloat16': 'bf16',
    'int8': 'int8',
}


class ArtifactError(ValueError):
    """An artifact cannot be opened or run; the message is one sentence."""


class Artifact(ABC):
    """An exported backbone, opened and ready to run; also a context manager.

    Attributes:
        path: The file.
        input_shape: `(N, 3, H, W)`; None where any number is taken.
        output_names: One per output.
        metadata: What the exporter wrote into the file; empty for another tool's file.
        precision: What it really computes in: 'f32', 'bf16', 'f16' or 'int8'.
    """

    #: Name of the runtime, and of the package that it comes in.
    runtime: ClassVar[str]
    package: ClassVar[str] = 'torch'

    def __init__(self, path: Path) -> None:
        self.path = path
        self.input_shape: tuple[int | None, ...] = (None, 3, None, None)
        self.output_names: tuple[str, ...] = ()
        self.metadata: dict[str, Any] = {}
        self.precision = 'f32'

    @abstractmethod
    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        """Open the file and fill the attributes; may raise what the runtime raises."""

    @abstractmethod
    def infer(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """The outputs for a checked batch, as the runtime gives them."""

    def run(self, images: np.ndarray | Tensor) -> list[np.ndarray]:
        """`(N, 3, H, W)` float32, normalised, to one float32 `(N, C_i, H_i, W_i)` per output.

        Raises:
            ArtifactError: The file does not take this shape, or its runtime fails on it.
        """
        batch = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        if not self.takes(batch.shape):
            raise ArtifactError(
                f'{self.path} takes images of shape {shown_shape(self.input_shape)}, '
                f'not {shown_shape(batch.shape)}.'
            )
        try:
            outputs = self.infer(np.ascontiguousarray(batch, dtype=np.float32))
        except Exception as error:
            raise ArtifactError(
                f'{self.path} failed in {self.runtime} on images of shape '
                f'{shown_shape(batch.shape)}: {reason(error)}.'
            ) from error
        return [np.asarray(output, dtype=np.float32) for output in outputs]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether images of this shape can be run."""
        return len(shape) == len(self.input_shape) and all(
            own in (None, given) for own, given in zip(self.input_shape, shape)
        )

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's memory and threads; the artifact cannot be run any more."""

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_artifact(
    path: str | Path,
    *,
    threads: int | None = None,
    precision: str | None = None,
    providers: Sequence[str] | None = None,
) -> Artifact:
    """Open an exported backbone.

    ONNX, OpenVINO, TorchScript and fused `.pth` files hold data alone. An AOTInductor package is
    machine code: open only those that you made. Parts of a `.pt2` that need Python's pickle are
    refused.

    Args:
        path: An `.onnx` file, an OpenVINO `.xml` file or the folder with it, a `.pt2` file
            (exported program or AOTInductor package), a `.torchscript` or a fused `.pth` file.
        threads: Number of threads to compute on; the runtime chooses when None. In PyTorch's
            formats it is set for the whole process.
        precision: What OpenVINO computes in: 'f32' (when None), 'bf16' or 'f16'. The other
            runtimes compute in what the file says.
        providers: ONNX Runtime's execution providers; the CPU's when None.

    Raises:
        ArtifactError: There is no such file, its runtime is not installed or refuses it, or it is
            not a backbone: one image `(N, 3, H, W)` in, feature maps out.
    """
    file = _find(Path(path))
    artifact = _kind(file)(file)
    if precision is not None and not isinstance(artifact, OpenVINOArtifact):
        raise ArtifactError(
            f'precision={precision!r} is a setting of OpenVINO; {file} computes in what it was '
            'exported in.'
        )
    if providers is not None and not isinstance(artifact, ONNXArtifact):
        raise ArtifactError(
            f'providers={list(providers)} is a setting of ONNX Runtime, not of {file}.'
        )
    try:
        artifact.load(threads, precision, providers)
    except ArtifactError:
        raise
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except Exception as error:
        raise ArtifactError(
            f'{file} cannot be opened in {artifact.runtime}: {reason(error)}.'
        ) from error
    _check_interface(artifact)
    return artifact


# --- one class per runtime


class ONNXArtifact(Artifact):
    """An ONNX model in ONNX Runtime."""

    runtime = 'onnxruntime'
    package = 'onnxruntime'

    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        ort = _import(self)
        providers = list(providers or ['CPUExecutionProvider'])
        available = ort.get_available_providers()
        if unknown := [p for p in providers if p not in available]:
            raise ArtifactError(
                f'onnxruntime {ort.__version__} has no {", ".join(unknown)} here; it has '
                f'{", ".join(available)}.'
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Idle workers that spin take the cores from PyTorch, which runs the rest of a detector.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        # Its own retry prints to stdout, with the same providers.
        self.session = ort.InferenceSession(
            self.path, options, providers=providers, enable_fallback=False
        )
        inputs = self.session.get_inputs()
        _check_inputs(self, [i.name for i in inputs])
        self.input_shape = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)
        self.output_names = tuple(output.name for output in self.session.get_outputs())
        self.metadata = _metadata(self, self.session.get_modelmeta().custom_metadata_map)
        self.input_name = inputs[0].name
        self.input_type = {'tensor(float)': np.float32, 'tensor(float16)': np.float16}.get(
            inputs[0].type
        )
        if self.input_type is None:
            raise ArtifactError(
                f'{self.path} takes {inputs[0].type}, and images are tensor(float).'
            )
        stated = PRECISIONS.get(self.metadata.get('dtype', inputs[0].type), 'f32')
        # Its CPU kernels for x86 have no float16: it converts to float32 and back around each.
        on_x86 = providers == ['CPUExecutionProvider'] and platform.machine() in ('x86_64', 'AMD64')
        self.precision = 'f32' if stated == 'f16' and on_x86 else stated

    def infer(self, images: np.ndarray) -> Sequence[np.ndarray]:
        images = images.astype(self.input_type, copy=False)
        return self.session.run(None, {self.input_name: images})

    def close(self) -> None:
        del self.session


class OpenVINOArtifact(Artifact):
    """An OpenVINO IR on the CPU."""

    runtime = 'openvino'
    package = 'openvino'

    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        _import(self)
        precision = precision or 'f32'
        if precision not in ('f32', 'bf16', 'f16'):
            raise ArtifactError(
                f'precision={precision!r} is not allowed; OpenVINO computes in f32, bf16 or f16.'
            )
        # Left alone, it takes bfloat16 where the CPU has it.
        options: dict[str, Any] = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': precision,
        }
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        core = openvino_core()
        model = core.read_model(self.path)
        _check_inputs(self, [i.any_name if i.names else str(n) for n, i in enumerate(model.inputs)])
        self.input_shape = tuple(
            None if d.is_dynamic else d.get_length() for d in model.inputs[0].partial_shape
        )
        self.output_names = tuple(
            o.any_name if o.names else f'output{n}' for n, o in enumerate(model.outputs)
        )
        self.metadata = _metadata(
            self,
            {METADATA_KEY: model.get_rt_info(METADATA_KEY).value}
            if model.has_rt_info(METADATA_KEY)
            else {},
        )
        self.input_type = model.inputs[0].element_type.to_dtype()
        quantised = any(op.get_type_name() == 'FakeQuantize' for op in model.get_ops())
        compiled = core.compile_model(model, 'CPU', options)
        really = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
        self.precision = 'int8' if quantised else PRECISIONS.get(really, really)
        self.request = compiled.create_infer_request()

    def infer(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results = self.request.infer({0: images.astype(self.input_type, copy=False)})
        return list(results.values())

    def close(self) -> None:
        del self.request


class TorchArtifact(Artifact):
    """A file that PyTorch runs."""

    module: Callable[..., Any]
    device = 'cpu'
    #: Whether the file is made for images of one shape.
    has_shape: ClassVar[bool] = True

    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.load_module()
        # None of these formats can be asked for the shape that it was made for.
        dynamic, size = self.metadata.get('dynamic', 'none'), self.metadata.get('size')
        if self.has_shape and size:
            batch = None if 'batch' in dynamic else self.metadata.get('batch', 1)
            self.input_shape = (batch, 3, *((None, None) if 'hw' in dynamic else size))
        stages = self.metadata.get('out_indices', range(4))
        self.output_names = tuple(f'stage{i}' for i in stages)
        self.precision = PRECISIONS.get(self.metadata.get('dtype', ''), 'f32')

    @abstractmethod
    def load_module(self) -> None:
        """Set `module` and `metadata`, and `device` where it is not the CPU."""

    @torch.inference_mode()
    def infer(self, images: np.ndarray) -> Sequence[np.ndarray]:
        outputs = self.module(torch.from_numpy(images).to(self.device))
        return [output.float().cpu().contiguous().numpy() for output in outputs]

    def close(self) -> None:
        del self.module


class ExportedProgramArtifact(TorchArtifact):
    """What `torch.export.save` wrote."""

    runtime = 'torch.export'

    def load_module(self) -> None:
        _refuse_pickles(self.path)
        extra = {METADATA_KEY: ''}
        program = torch.export.load(self.path, extra_files=extra)
        # Its guards say more than which sizes fit: that maps which tracing saw with more than one
        # pixel never have just one, though the operations take either. Older torch makes none.
        has_guards = 'check_guards' in inspect.signature(program.module).parameters
        self.module = program.module(**({'check_guards': False} if has_guards else {}))
        self.metadata = _metadata(self, extra)


class AOTInductorArtifact(TorchArtifact):
    """Machine code that AOTInductor compiled for one kind of processor."""

    runtime = 'aotinductor'

    def load_module(self) -> None:
        from torch._inductor import aoti_load_package

        package = aoti_load_package(self.path)
        properties = package.get_metadata()
        self.device = properties['AOTI_DEVICE_KEY']
        self.module = package
        self.metadata = _metadata(self, properties)


class TorchScriptArtifact(TorchArtifact):
    """A traced or scripted module."""

    runtime = 'torchscript'

    def load_module(self) -> None:
        extra: dict[str, Any] = {METADATA_KEY: ''}
        self.module = torch.jit.load(self.path, map_location='cpu', _extra_files=extra).eval()
        self.metadata = _metadata(self, extra)


class FusedArtifact(TorchArtifact):
    """The weights of a fused backbone, run by this package's modules."""

    runtime = 'torch'
    has_shape = False

    def load_module(self) -> None:
        from .. import backbones

        checkpoint = read_checkpoint(File.read(self.path))
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        self.metadata = _metadata(self, meta or {})
        if not self.metadata:
            raise ArtifactError(
                f'{self.path} does not say what network it holds; give a .pth file that '
                'tools/deploy.py wrote.'
            )
        family = getattr(backbones, self.metadata['family'])
        model = family(
            self.metadata['arch'],
            out_indices=self.metadata['out_indices'],
            deploy=self.metadata['plan'],
        )
        state = checkpoint['state_dict']
        model.load_state_dict(state)
        dtype = next(t.dtype for t in state.values() if t.is_floating_point())
        if self.metadata.get('layout') == 'channels_last':
            model.to(memory_format=torch.channels_last)
        model.to(dtype).eval()
        self.module = lambda images: model(images.to(dtype))


KINDS: dict[str, type[Artifact]] = {
    '.onnx': ONNXArtifact,
    '.xml': OpenVINOArtifact,
    '.torchscript': TorchScriptArtifact,
    '.pth': FusedArtifact,
}


# --- what they share


def _find(path: Path) -> Path:
    """The file to open; in a folder that OpenVINO's files lie in, the `.xml` of them."""
    if path.is_dir() and path.suffix != '.mlpackage':
        found = sorted(path.glob('*.xml'))
        if len(found) != 1:
            raise ArtifactError(f'{path} is a folder with {len(found)} .xml files; name the file.')
        return found[0]
    if not path.exists():
        raise ArtifactError(f'there is no file {path}; tools/deploy.py writes such files.')
    return path


def _kind(path: Path) -> type[Artifact]:
    if path.suffix in KINDS:
        return KINDS[path.suffix]
    if path.suffix == '.pt2':
        return AOTInductorArtifact if _is_compiled(path) else ExportedProgramArtifact
    if path.suffix == '.mlpackage':
        raise ArtifactError(f'{path} is a Core ML package, which runs on macOS only.')
    raise ArtifactError(
        f'{path} has no ending that tells its format; there are {", ".join(KINDS)} and .pt2.'
    )


def _is_compiled(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f'{path} is cut short, damaged or not a .pt2 archive; export it again.')
    with zipfile.ZipFile(path) as archive:
        return any('/data/aotinductor/' in name for name in archive.namelist())


def _refuse_pickles(path: Path) -> None:
    """Refuse an exported program of which `torch.export.load` would unpickle parts."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            part = name.partition('/')[2]
            pickled = part.startswith('data/constants/custom_obj') or part == ''
            if re.fullmatch(r'data/(weights|constants)/\w+_config\.json', part):
                config = json.loads(archive.read(name))['config']
                pickled = any(entry['use_pickle'] for entry in config.values())
            elif part.startswith('data/sample_inputs/'):
                with archive.open(name) as file:
                    torch.load(file, weights_only=True)
            if pickled:
                raise ArtifactError(
                    f'{path} was not opened, because {name} is a Python pickle and loading it can '
                    'run code; export the network anew.'
                )


def _import(artifact: Artifact) -> ModuleType:
    try:
        return import_module(artifact.package)
    except ImportError as error:
        raise ArtifactError(
            f'{artifact.path} needs {artifact.package}, which cannot be imported ({error}): '
            f'pip install {artifact.package}.'
        ) from error


def _metadata(artifact: Artifact, properties: dict[str, Any]) -> dict[str, Any]:
    text = properties.get(METADATA_KEY)
    try:
        metadata = json.loads(text) if text else {}
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ArtifactError(f'{artifact.path} has damaged metadata {text!r:.60}; export it again.')
    return metadata


def _check_inputs(artifact: Artifact, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise ArtifactError(
            f'{artifact.path} takes {len(names)} inputs ({", ".join(names)}), and a backbone takes '
            'one, the image.'
        )


def _check_interface(artifact: Artifact) -> None:
    shape = artifact.input_shape
    if len(shape) != 4 or shape[1] not in (None, 3):
        artifact.close()
        raise ArtifactError(
            f'{artifact.path} takes {shown_shape(shape)}, and a backbone takes images (N, 3, H, W).'
        )


def shown_shape(shape: Sequence[int | None]) -> str:
    """A shape as text, with `?` for any number."""
    return f'({", ".join("?" if d is None else str(d) for d in shape)})'


def reason(error: BaseException) -> str:
    """What a runtime's error says, without codes, places in its source, and line breaks."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not re.match(r"Exception from|Check '", line)]
    text = re.sub(r'^\[ONNXRuntimeError\] : \d+ : \w+ : ', '', ' '.join(kept))
    return (text or type(error).__name__)[:300].rstrip(' .')

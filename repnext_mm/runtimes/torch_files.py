"""Files that PyTorch runs: exported programs, AOTInductor packages, TorchScript, fused weights."""

from __future__ import annotations

import inspect
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision  # noqa: F401  (its operators in files of detectors)

from .. import backbones
from ..checkpoints import File, read_checkpoint
from ..operators import suppression  # noqa: F401  (the operator in files of detectors)
from .artifact import (
    METADATA_KEY,
    PRECISIONS,
    Artifact,
    ArtifactError,
    check_inputs,
    read_metadata,
)
from .programs import load_program


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
        stages = [f'stage{i}' for i in self.metadata.get('out_indices', range(4))]
        self.output_names = tuple(self.metadata.get('outputs', stages))
        check_inputs(self, self.metadata.get('inputs', ['image']))
        self.precision = PRECISIONS.get(self.metadata.get('dtype', ''), 'f32')

    @abstractmethod
    def load_module(self) -> None:
        """Set `module` and `metadata`, and `device` where it is not the CPU."""

    @torch.inference_mode()
    def infer(self, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        outputs = self.module(*(torch.from_numpy(array).to(self.device) for array in inputs))
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return [_as_array(output) for output in outputs]

    def close(self) -> None:
        del self.module


class ExportedProgramArtifact(TorchArtifact):
    """What `torch.export.save` wrote."""

    runtime = 'torch.export'

    def load_module(self) -> None:
        extra = {METADATA_KEY: ''}
        program = load_program(self.path, extra)
        # Its guards say more than which sizes fit: that maps which tracing saw with more than one
        # pixel never have just one, though the operations accept either. Older torch makes none.
        has_guards = 'check_guards' in inspect.signature(program.module).parameters
        self.module = program.module(**({'check_guards': False} if has_guards else {}))
        self.metadata = read_metadata(self, extra)


class AOTInductorArtifact(TorchArtifact):
    """Machine code that AOTInductor compiled for one kind of processor.

    It checks nothing of its input: what it was compiled for is known from its metadata alone.
    """

    runtime = 'aotinductor'
    program = 'machine code'

    def load_module(self) -> None:
        from torch._inductor import aoti_load_package

        package = aoti_load_package(self.path)
        properties = package.get_metadata()
        self.device = properties['AOTI_DEVICE_KEY']
        self.module = package
        self.metadata = read_metadata(self, properties)
        if 'size' not in self.metadata:
            raise ArtifactError(
                f'{self.path} does not say for which images it was compiled, and computes garbage '
                'for others; give a package that repnext-mm deploy wrote.'
            )


class TorchScriptArtifact(TorchArtifact):
    """A traced or scripted module."""

    runtime = 'torchscript'
    program = 'a TorchScript program'

    def load_module(self) -> None:
        extra: dict[str, Any] = {METADATA_KEY: ''}
        self.module = torch.jit.load(self.path, map_location='cpu', _extra_files=extra).eval()
        self.metadata = read_metadata(self, extra)


class FusedArtifact(TorchArtifact):
    """The weights of a fused backbone, run by this package's modules."""

    runtime = 'torch'
    has_shape = False

    def load_module(self) -> None:
        checkpoint = read_checkpoint(File.read(self.path))
        meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
        self.metadata = read_metadata(self, meta or {})
        if not self.metadata:
            raise ArtifactError(
                f'{self.path} does not say what network it holds; give a .pth file that '
                'tools/deploy.py wrote.'
            )
        if self.metadata.get('scope') == 'model':
            raise ArtifactError(
                f'{self.path} holds a complete model, which mm itself runs: repnext-mm test with '
                'the config beside it.'
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


def _as_array(output: torch.Tensor) -> np.ndarray:
    output = output.cpu().contiguous()
    return (output.float() if output.is_floating_point() else output).numpy()


def is_compiled(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f'{path} is cut short, damaged or not a .pt2 archive; export it again.')
    with zipfile.ZipFile(path) as archive:
        return any('/data/aotinductor/' in name for name in archive.namelist())

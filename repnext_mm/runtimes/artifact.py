"""What all runtimes share: an exported backbone, opened and ready to run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..files import parse_json

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
        input_shape: `(N, 3, H, W)`; None where any number is accepted.
        output_names: One per output.
        metadata: What the exporter wrote into the file; empty for another tool's file.
        precision: What it really computes in: 'f32', 'bf16', 'f16' or 'int8'.
    """

    #: Name of the runtime, and of the package that it comes in.
    runtime: ClassVar[str]
    package: ClassVar[str] = 'torch'
    #: What the file is if running it runs code of its own; None for data.
    program: ClassVar[str | None] = None

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
        """The outputs for a checked batch, as the runtime returns them."""

    def run(self, images: np.ndarray | Tensor) -> list[np.ndarray]:
        """`(N, 3, H, W)` float32, normalised, to one float32 `(N, C_i, H_i, W_i)` per output.

        Images of other floating types and of any strides are converted first. Not every runtime
        checks what it is given: machine code of AOTInductor computes garbage, or crashes.

        Raises:
            ArtifactError: The file does not accept this shape or type, or its runtime fails.
        """
        batch = self._checked(images)
        try:
            outputs = self.infer(batch)
        except Exception as error:
            raise ArtifactError(
                f'{self.path} failed in {self.runtime} on images of shape '
                f'{shown_shape(batch.shape)}: {reason(error)}.'
            ) from error
        return [np.asarray(output, dtype=np.float32) for output in outputs]

    def _checked(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Images as every runtime takes them: of an accepted shape, float32 and contiguous."""
        if isinstance(images, Tensor):
            images = images.detach().cpu()
            # NumPy has no bfloat16.
            images = (images.float() if images.is_floating_point() else images).numpy()
        images = np.asarray(images)
        if not self.takes(images.shape):
            raise ArtifactError(
                f'{self.path} requires images of shape {self.shown_input()}, '
                f'not {shown_shape(images.shape)}.'
            )
        raw = bool(self.metadata.get('preprocess'))
        if not (np.issubdtype(images.dtype, np.floating) or (raw and images.dtype == np.uint8)):
            raise ArtifactError(
                f'{self.path} requires {"images as loaded" if raw else "normalised images"} in '
                f'float32{" or uint8" if raw else ""}, not {images.dtype}.'
            )
        return np.ascontiguousarray(images, dtype=np.float32)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether images of this shape can be run."""
        return (
            len(shape) == len(self.input_shape)
            and all(own in (None, given) for own, given in zip(self.input_shape, shape))
            and shape[0] > 0
            and min(shape[2:]) >= self.least_side
        )

    @property
    def least_side(self) -> int:
        """The smallest height and width that the network can compute."""
        return self.metadata.get('least_side', 1)

    def shown_input(self) -> str:
        """The shapes that can be run, as text."""
        least = f', of at least {self.least_side} pixels each way' if self.least_side > 1 else ''
        return f'{shown_shape(self.input_shape)}{least}'

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's memory and threads; the artifact cannot be run any more."""

    def __deepcopy__(self, memo: dict) -> Artifact:
        """Itself: copies of a model, as of an average of its weights, share what is open."""
        return self

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def import_runtime(artifact: Artifact) -> ModuleType:
    try:
        return import_module(artifact.package)
    except ImportError as error:
        raise ArtifactError(
            f'{artifact.path} needs {artifact.package}, which cannot be imported ({error}): '
            f'pip install {artifact.package}.'
        ) from error


def read_metadata(artifact: Artifact, properties: dict[str, Any]) -> dict[str, Any]:
    text = properties.get(METADATA_KEY)
    try:
        metadata = parse_json(text) if text else {}
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ArtifactError(f'{artifact.path} has damaged metadata {text!r:.60}; export it again.')
    return metadata


def check_inputs(artifact: Artifact, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise ArtifactError(
            f'{artifact.path} requires {len(names)} inputs ({", ".join(names)}), and a backbone '
            'has one, the image.'
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

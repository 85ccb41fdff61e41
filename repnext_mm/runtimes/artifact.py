"""What all runtimes share: an exported model, opened and ready to run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


#: Inputs beside the image: the type of their numbers, and whether they have a row per image.
EXTRAS = {'image_size': (np.float32, True), 'out_size': (np.int64, False)}
#: Sides that `out_size` may ask for.
LEAST_SIDE, MOST_SIDE = 2, 16384


class ArtifactError(ValueError):
    """An artifact cannot be opened or run; the message is one sentence."""


class Artifact(ABC):
    """An exported model, opened and ready to run; also a context manager.

    Attributes:
        path: The file.
        input_shape: `(N, 3, H, W)`; None where any number is accepted.
        input_names: The image first, then `image_size (N, 2)` or `out_size (2,)` if there are such.
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
        self.input_names: tuple[str, ...] = ('image',)
        self.output_names: tuple[str, ...] = ()
        self.metadata: dict[str, Any] = {}
        self.precision = 'f32'

    @abstractmethod
    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        """Open the file and fill the attributes; may raise what the runtime raises."""

    @abstractmethod
    def infer(self, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs for checked inputs, in the order of `input_names`."""

    @property
    def task(self) -> str:
        """What it is for: 'backbone', 'classification', 'segmentation' or 'detection'."""
        return str(self.metadata.get('task', 'backbone'))

    def run(self, images: np.ndarray | Tensor) -> list[np.ndarray]:
        """`(N, 3, H, W)` float32, normalised, to one `(N, C_i, H_i, W_i)` float32 per output.

        For files with one input; see `run_named`.
        """
        return list(self.run_named({self.input_names[0]: images}).values())

    def run_named(self, inputs: Mapping[str, np.ndarray | Tensor]) -> dict[str, np.ndarray]:
        """Inputs by name to outputs by name, float32 or the integers that they are.

        Images of other floating types and of any strides are converted first. Not every runtime
        checks what it is given: machine code of AOTInductor computes garbage, or crashes.

        Raises:
            ArtifactError: An input is missing, or of a shape or type that is not accepted, or the
                runtime fails.
        """
        if missing := [name for name in self.input_names if name not in inputs]:
            raise ArtifactError(
                f'{self.path} requires {", ".join(self.input_names)}, and {", ".join(missing)} '
                f'is missing; {_MEANINGS.get(missing[0], "give it by its name")}.'
            )
        if unknown := [name for name in inputs if name not in self.input_names]:
            raise ArtifactError(
                f'{self.path} has no input {unknown[0]!r}; it has {", ".join(self.input_names)}.'
            )
        images = self._checked(inputs[self.input_names[0]])
        others = [self._extra(name, inputs[name], images) for name in self.input_names[1:]]
        try:
            outputs = self.infer([images, *others])
        except Exception as error:
            raise ArtifactError(
                f'{self.path} failed in {self.runtime} on images of shape '
                f'{shown_shape(images.shape)}: {reason(error)}.'
            ) from error
        return {
            name: np.asarray(output, None if _is_whole(output) else np.float32)
            for name, output in zip(self.output_names, outputs, strict=True)
        }

    def _extra(self, name: str, given: np.ndarray | Tensor, images: np.ndarray) -> np.ndarray:
        """An input beside the images, as the runtime takes it."""
        kind, per_image = EXTRAS[name]
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        shape = (len(images), 2) if per_image else (2,)
        most = images.shape[2:] if per_image else (MOST_SIDE, MOST_SIDE)
        least = 1 if per_image else LEAST_SIDE
        if (
            values.shape != shape
            or values.dtype.kind not in 'iuf'
            or not ((values >= least) & (values <= most)).all()
        ):
            raise ArtifactError(
                f'{self.path} requires {name} of shape {shown_shape(shape)}, numbers from {least} '
                f'to {shown_shape(most)}, not {" ".join(str(values.tolist()).split())[:60]} '
                f'({values.dtype}); {_MEANINGS[name]}.'
            )
        return np.ascontiguousarray(values, kind)

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

    def example(self, shape: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Inputs of noise, of the file's own size where `shape` is None, without padding."""
        size = self.metadata.get('size') or (512, 512)
        default = (self.metadata.get('batch', 1), 3, *size)
        full = shape or [own or other for own, other in zip(self.input_shape, default)]
        image = np.random.default_rng(0).standard_normal(tuple(full), dtype=np.float32)
        if self.metadata.get('preprocess'):
            image = (image * 50 + 120).clip(0, 255)
        return unpadded(self.input_names, image)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether images of this shape can be run."""
        return (
            len(shape) == len(self.input_shape)
            and all(own in (None, given) for own, given in zip(self.input_shape, shape))
            and shape[0] > 0
            and min(shape[2:]) >= self.least_side
            and not any(side % self.divisor for side in shape[2:])
        )

    @property
    def least_side(self) -> int:
        """The smallest height and width that the network can compute."""
        return self.metadata.get('least_side', 1)

    @property
    def divisor(self) -> int:
        """What an open height and width must be divisible by."""
        return self.metadata.get('divisor') or 1

    def shown_input(self) -> str:
        """The shapes that can be run, as text."""
        least = f', of at least {self.least_side} pixels each way' if self.least_side > 1 else ''
        divisible = f', divisible by {self.divisor}' if self.divisor > 1 else ''
        return f'{shown_shape(self.input_shape)}{least}{divisible}'

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


def unpadded(names: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """Every input of a file, the images `(N, 3, H, W)` first, where none is padded or resized."""
    values = {names[0]: images}
    for name in names[1:]:
        kind, per_image = EXTRAS[name]
        side = np.array(images.shape[2:], kind)
        values[name] = np.repeat(side[None], len(images), 0) if per_image else side
    return values


def check_inputs(artifact: Artifact, names: Sequence[str]) -> None:
    """Note the names of a file's inputs, the image first.

    Raises:
        ArtifactError: It has others than an exported model has.
    """
    images = [name for name in names if name not in EXTRAS]
    if len(images) != 1 or names[0] != images[0]:
        raise ArtifactError(
            f'{artifact.path} requires {len(names)} inputs ({", ".join(names)}), and an exported '
            f'model has an image, then maybe {" or ".join(EXTRAS)}.'
        )
    artifact.input_names = tuple(names)


#: What an input is, for whoever forgot it.
_MEANINGS = {
    'image_size': 'it is the height and width of each image without padding',
    'out_size': 'it is the height and width of the original image',
}


def _is_whole(output: np.ndarray) -> bool:
    """Whether an output is labels or classes."""
    return np.asarray(output).dtype.kind in 'iub'


def shown_shape(shape: Sequence[int | None]) -> str:
    """A shape as text, with `?` for any number."""
    return f'({", ".join("?" if d is None else str(d) for d in shape)})'


def reason(error: BaseException) -> str:
    """What a runtime's error says, without codes, places in its source, and line breaks."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not re.match(r"Exception from|Check '", line)]
    text = re.sub(r'^\[ONNXRuntimeError\] : \d+ : \w+ : ', '', ' '.join(kept))
    return (text or type(error).__name__)[:300].rstrip(' .')

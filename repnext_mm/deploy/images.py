"""The images that an export compares and calibrates on, as its artifacts take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..reparam.verify import noise
from ..runtimes import unpadded
from .calibration import IMAGENET, RAW, calibration_images, cover
from .job import Job
from .parity import other_shapes
from .prepare import Prepared
from .quantize import HELD_OUT
from .targets import IMAGE_SIZE, INPUT, OUT_SIZE, Preprocess

#: The stride of the shapes that a complete model is compared on besides its own.
COMPLETE_STRIDE = 32


def compared_on(prepared: Prepared, job: Job) -> list[dict[str, Tensor]]:
    """Inputs to compare on: as exported, of other shapes, and blank for a complete model."""
    stride = COMPLETE_STRIDE if prepared.complete else prepared.target.step
    shapes = [job.shape, *other_shapes(job.shape, job.dynamic, stride, job.divisor)]
    images = [_image(prepared, job, shape) for shape in shapes]
    # int8 is calibrated for no blank image, whose logits would have to be right.
    calibrated = job.dtype == 'int8' and prepared.target.task == 'classification'
    images += [torch.zeros(job.shape)] if prepared.complete and not calibrated else []
    found = []
    for number, image in enumerate(images):
        arrays = unpadded([INPUT, *prepared.target.extras], image.numpy())
        inputs = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if IMAGE_SIZE in inputs and number == 1:  # padded on the right and below
            height, width = image.shape[2:]
            inputs[IMAGE_SIZE] -= torch.tensor([height // 5, width // 7])
            _clear(image, inputs[IMAGE_SIZE])
        elif OUT_SIZE in inputs and number:
            inputs[OUT_SIZE] = inputs[OUT_SIZE] * 5 // 4 + 3
        found.append(inputs)
    return found


def calibrated_on(prepared: Prepared, size: tuple[int, int]) -> Sequence[np.ndarray]:
    """Images as an artifact of this size takes them; the first `HELD_OUT` are for comparing."""
    options, source = prepared.options, prepared.source
    assert options.calib is not None, 'refused before'
    return calibration_images(
        options.calib,
        size,
        RAW if prepared.preprocess else Preprocess.of(source.preprocessor),
        limit=options.calib_images + HELD_OUT,
        loader=source.loader,
    )


def _image(prepared: Prepared, job: Job, shape: tuple[int, int, int, int]) -> Tensor:
    preprocess = prepared.preprocess
    if job.dtype == 'int8':
        picture = torch.from_numpy(calibrated_on(prepared, shape[2:])[0])
    elif prepared.picture is not None:
        # What is done to an image as loaded, before it is given to an artifact.
        applied = RAW if preprocess else Preprocess.of(prepared.source.preprocessor) or IMAGENET
        picture = applied.apply(cover(prepared.picture[None], shape[2:]))
    else:
        image = noise(shape, prepared.options.seed)
        picture = preprocess.undo(image) if preprocess else image
    if prepared.complete and preprocess:  # as images are loaded
        picture = picture.round().clamp(0, 255)
    return picture.expand(shape).contiguous()


def _clear(image: Tensor, sizes: Tensor) -> None:
    """Write zeros outside of the sizes, in place."""
    for own, (height, width) in zip(image, sizes.int().tolist()):
        own[:, height:], own[:, :, width:] = 0, 0

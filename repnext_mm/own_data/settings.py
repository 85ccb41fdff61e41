"""What follows from the data: image size, batch, learning rate, length; each with its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from .. import backbones
from ..datasets.folders import Example
from ..measure.memory import saved_bytes
from .heads import HEADS

#: Sides of images, in steps that every pyramid divides.
STEP, LEAST, MOST, MOST_ON_CPU = 64, 320, 1280, 640
#: The side that a quarter of the objects may fall below: three cells of the finest level of a
#: dense head.
SMALL = 24
#: A recipe of 12 epochs is for COCO's images; fewer images are seen more often, each by the cube
#: root of how much fewer they are.
COCO_EPOCHS, COCO_IMAGES, MOST_EPOCHS = 12, 117266, 100
#: Steps that a run has at least, in no more than so many epochs.
LEAST_STEPS, EPOCHS_FOR_THEM = 600, 300
#: Epochs from random weights, to those from pretrained ones.
FROM_SCRATCH = 1.5
BASE_BATCH, LEAST_BATCH, MOST_BATCH, MOST_BATCH_ON_CPU = 16, 4, 16, 8
#: Memory of a whole model in training, to what its backbone keeps for backward.
WHOLE = 3.0
#: Part of the free memory that is planned with.
USABLE = 0.6
#: Evaluations of a run, and those without a better one after which it stops.
EVALUATIONS, PATIENCE = 25, 8


@dataclass(frozen=True)
class Setting:
    """A value, and why it is that."""

    value: int | float
    reason: str


@dataclass(frozen=True)
class Settings:
    """What a run is set to."""

    size: Setting
    batch: Setting
    epochs: Setting
    lr: Setting
    warmup: Setting
    val_interval: Setting


def choose(
    head: str,
    network: str,
    train: Sequence[Example],
    from_scratch: bool,
    size: int | None = None,
    batch: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
) -> Settings:
    """Settings for a run; those that are given are kept.

    Args:
        head: One of `HEADS`.
        network: Name of the backbone.
        train: Examples to train with.
        from_scratch: No pretrained weights are loaded.
        size: Side of the images in pixels.
        batch: Images per step.
        epochs: Length of the run.
        lr: Learning rate.
    """
    given = 'as given'
    images = len(train)
    sized = Setting(size, given) if size else image_size(head, train)
    batched = Setting(batch, given) if batch else batch_size(network, int(sized.value), images)
    steps = math.ceil(images / int(batched.value))
    length = Setting(epochs, given) if epochs else run_length(images, steps, from_scratch)
    base = learning_rate(head, int(batched.value), from_scratch)
    rated = base if lr is None else Setting(lr, given)
    steps *= int(length.value)
    warmup = max(1, min(1000, round(0.05 * steps)))
    return Settings(
        sized,
        batched,
        length,
        rated,
        Setting(warmup, f'a twentieth of {steps} iterations, 1000 at most'),
        Setting(
            max(1, int(length.value) // EVALUATIONS), f'about {EVALUATIONS} evaluations in the run'
        ),
    )


def image_size(head: str, train: Sequence[Example]) -> Setting:
    """The side within which images are resized."""
    if head == 'classifier':
        return Setting(224, 'as the published classifiers')
    sides = [max(e.height, e.width) for e in train if e.height]
    side = median(sides) if sides else 640
    most = MOST if torch.cuda.is_available() else MOST_ON_CPU
    if HEADS[head].scope == 'mmseg':
        short = median([min(e.height, e.width) for e in train])
        value = min(max(_step(short), 256), 512)
        return Setting(value, f'crops; half of the images have a short side below {short:g}')
    # Objects as parts of the long side, which is what a resized image has `size` pixels of.
    parts = [
        math.sqrt(max(item.box[2] * item.box[3], 0)) / max(e.height, e.width)
        for e in train
        for item in e.objects
    ]
    if not parts:
        return Setting(min(_step(side), most), 'as the images')
    quarter = quantiles(parts, n=4)[0] if len(parts) > 1 else parts[0]
    wanted = SMALL / quarter if quarter > 0 else most
    # More than a quarter beyond what the images have is blur.
    limit = min(most, _step(side * 1.25))
    value = int(min(max(_step(wanted), LEAST), limit))
    reason = f'a quarter of the objects are below {quarter * value:.0f} pixels at it'
    if value == most == MOST_ON_CPU and wanted > value:
        reason += f', and a CPU computes no more than {most}'
    return Setting(value, reason)


def _step(value: float) -> int:
    return max(STEP, math.ceil(value / STEP) * STEP)


def batch_size(network: str, size: int, images: int) -> Setting:
    """Images per step: as many as memory allows, up to a quarter of the images."""
    backbone = backbones.build(network).train()
    image = torch.zeros(2, 3, size, size)  # two, for the statistics of the last stage
    kept = saved_bytes(lambda: backbone(image), [*backbone.parameters(), image]) / 2
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory()
    fits = max(int(USABLE * free / (WHOLE * kept)), 1)
    most = MOST_BATCH if on_gpu else MOST_BATCH_ON_CPU
    # Four steps in an epoch, but no less than four images, which norms take their statistics of.
    wanted = min(most, max(images // 4, min(LEAST_BATCH, images)))
    value = max(min(1 << (fits.bit_length() - 1), wanted), min(2, images))
    reason = (
        f'an image keeps about {WHOLE * kept / 2**20:.0f} MiB for backward and '
        f'{free / 2**30:.0f} GiB are free; {most} at most on a {"GPU" if on_gpu else "CPU"}'
    )
    if wanted < min(fits, most):
        reason += f', and {wanted} for {images} images'
    return Setting(value, reason)


def _free_memory() -> int:
    """Bytes that the system has free, or 8 GiB where it does not say."""
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def run_length(images: int, steps: int, from_scratch: bool) -> Setting:
    """Epochs of the run.

    Args:
        images: To train with.
        steps: Of an epoch.
        from_scratch: No pretrained weights are loaded.
    """
    wanted = COCO_EPOCHS * (COCO_IMAGES / images) ** (1 / 3)
    value = min(max(wanted, COCO_EPOCHS), MOST_EPOCHS) * (FROM_SCRATCH if from_scratch else 1)
    least = min(math.ceil(LEAST_STEPS / steps), EPOCHS_FOR_THEM)
    if least > value:
        return Setting(least, f'{least * steps} iterations, as an epoch has {steps}')
    reason = f"COCO's {COCO_EPOCHS}, longer by the cube root of {COCO_IMAGES} / {images} images"
    reason += f', {MOST_EPOCHS} at most' if wanted > MOST_EPOCHS else ''
    return Setting(round(value), reason + '; half as much again from scratch' * from_scratch)


def learning_rate(head: str, batch: int, from_scratch: bool) -> Setting:
    """The highest rate of the run."""
    base = HEADS[head].lr_from_scratch if from_scratch else HEADS[head].lr
    value = base * math.sqrt(batch / BASE_BATCH)
    reason = f'{base:g} for {BASE_BATCH} images, by the square root of the batch'
    return Setting(float(f'{value:.2g}'), reason)

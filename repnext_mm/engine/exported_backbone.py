"""An exported file in the place of the backbone, inside any detector or segmentor of mm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoints import RunCheckpoint
from ..runtimes import Artifact, ArtifactError, open_artifact, shown_shape

TRIAL = 128  # pixels: a multiple of every stride


class Counts:
    """How many images were run, and how many of them padded, by the number of the file."""

    def __init__(self) -> None:
        self.images = 0
        self.padded: Counter[int] = Counter()

    def __deepcopy__(self, memo: dict) -> Counts:
        return self


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class ExportedBackbone(BaseModule):
    """Runs exported backbones, so that the figures of a test are those of the file that ships.

    It has no weights: a checkpoint's are used for neck and head, its backbone's are passed over.
    Files for one size are buckets: an image goes into the smallest that it fits in, padded with
    zeros on the right and below, and the features are cropped to the image.
    A batch is run in pieces of the batch size that the file was made for.
    Copies, such as those of EMAHook, share the open files and the counts.

    Args:
        artifact: An ONNX or OpenVINO file, or another that `open_artifact` opens; or several of
            the same network, for different sizes.
        precision: What OpenVINO computes in: 'f32', 'bf16' or 'f16'.
        threads: Number of threads to compute on; PyTorch's when None.
        trust: Run files that are code (TorchScript, AOTInductor); say so for files that you made.

    Attributes:
        counts: How many images it ran, and how many of them each file padded.

    Raises:
        ArtifactError: A file cannot be opened, does not return feature maps, or differs from the
            others.
    """

    def __init__(
        self,
        artifact: str | Sequence[str],
        precision: str | None = None,
        threads: int | None = None,
        trust: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        paths = [artifact] if isinstance(artifact, str | Path) else [*artifact]
        threads = threads or torch.get_num_threads()
        self.artifacts = [
            open_artifact(p, threads=threads, precision=precision, trust=trust) for p in paths
        ]
        for each in self.artifacts:
            if each.task != 'backbone':
                raise ArtifactError(
                    f'{each.path} is a complete model and no backbone; name it by --model.'
                )
            if each.metadata.get('preprocess'):
                raise ArtifactError(
                    f'{each.path} normalises its images itself, and detectors and segmentors hand '
                    'on normalised ones; export it with --preprocess none.'
                )
        found = [_try(each) for each in self.artifacts]
        for each, maps in zip(self.artifacts, found):
            if maps != found[0]:
                raise ArtifactError(
                    f'{each.path} returns {_described(maps)}, but {self.artifacts[0].path} returns '
                    f'{_described(found[0])}; give files of one network.'
                )
        self.out_channels, self.out_strides = found[0]
        self.counts = Counts()
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`(N, 3, H, W)` to one `(N, C_i, ceil(H / stride_i), ceil(W / stride_i))` per stage.

        Raises:
            ArtifactError: In training mode, no file accepts images of this size, or one fails.
        """
        if self.training:
            raise ArtifactError(
                f'{self.artifacts[0].path} is an exported file, which cannot be trained; train '
                'the network itself, and export it again.'
            )
        images = x.detach().float().cpu().numpy()
        height, width = images.shape[2:]
        artifact = self._smallest(height, width)
        full = _padded(images, artifact.input_shape[2] or height, artifact.input_shape[3] or width)
        self.counts.images += len(images)
        if full is not images:
            self.counts.padded[self.artifacts.index(artifact)] += len(images)
        stages = _in_batches(artifact, full)
        return tuple(
            torch.from_numpy(stage[:, :, : -(-height // stride), : -(-width // stride)]).to(x)
            for stage, stride in zip(stages, self.out_strides, strict=True)
        )

    def _smallest(self, height: int, width: int) -> Artifact:
        """The file that needs the least padding."""

        def area(artifact: Artifact) -> int:
            own = artifact.input_shape
            return (own[2] or height) * (own[3] or width)

        fitting = [
            artifact
            for artifact in self.artifacts
            if (artifact.input_shape[2] or height) >= height
            and (artifact.input_shape[3] or width) >= width
        ]
        if not fitting:
            sizes = ', '.join(f'{a.path} {shown_shape(a.input_shape[2:])}' for a in self.artifacts)
            raise ArtifactError(
                f'an image of {height} x {width} pixels fits into no artifact ({sizes}); export '
                'with --dynamic hw, or name further files for larger sizes.'
            )
        return min(fitting, key=area)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the weights of the network that the file replaces."""

    def __repr__(self) -> str:
        files = ', '.join(str(artifact.path) for artifact in self.artifacts)
        return f'{type(self).__name__}({files})'


def put_in_place(
    cfg: Config, artifacts: Sequence[str], precision: str | None, trust: bool = False
) -> None:
    """Let the config's model run exported files for its backbone, in place.

    Raises:
        ArtifactError: The model has no backbone.
    """
    if 'backbone' not in cfg.model:
        raise ArtifactError(
            f'the model {cfg.model.get("type")} has no backbone that an exported one could replace.'
        )
    cfg.model.backbone = dict(
        type=ExportedBackbone.__name__, artifact=[*artifacts], precision=precision, trust=trust
    )


def introduce(model: Any, checkpoint: RunCheckpoint) -> list[str]:
    """Check that the exported backbone in `model` fits; returns lines for the user about it.

    Args:
        model: Detector or segmentor.
        checkpoint: What neck and head are loaded from.

    Raises:
        ArtifactError: Its feature maps are not those that the neck, or the head without one,
            requires.
    """
    _check_fit(model)
    lines = []
    for artifact in model.backbone.artifacts:
        meta = artifact.metadata
        network = ' '.join(str(meta[k]) for k in ('family', 'arch') if k in meta) or 'unnamed'
        plan = f', plan {meta["plan"]}' if 'plan' in meta else ''
        lines.append(
            f'Backbone: {artifact.path} ({network}{plan}), images '
            f'{shown_shape(artifact.input_shape)}, {artifact.runtime} in {artifact.precision}.'
        )
        if meta.get('weights') == 'random':
            lines.append(f'warning: {artifact.path} was exported with random weights.')
        elif meta.get('checkpoint_sha256', checkpoint.sha256) != checkpoint.sha256:
            lines.append(
                f'warning: {artifact.path} was exported from another checkpoint than '
                f'{checkpoint.path}, whose neck and head may not know its features.'
            )
    return lines


def padding_line(model: Any) -> str | None:
    """A line for the user about the images that an exported backbone padded; None for none.

    To be called in every process of a distributed test, whose counts it adds up.

    Args:
        model: Detector or segmentor, possibly wrapped, with any backbone.
    """
    model = getattr(model, 'module', model)
    backbone: Any = model if hasattr(model, 'counts') else getattr(model, 'backbone', None)
    if not hasattr(backbone, 'counts'):
        return None
    everywhere = all_gather_object((backbone.counts.images, backbone.counts.padded))
    images = sum(count for count, _ in everywhere)
    padded = sum((counts for _, counts in everywhere), Counter[int]())
    if not padded:
        return None
    files = ', '.join(
        f'{count} to {shown_shape(artifact.input_shape[2:])} by {artifact.path}'
        for artifact, count in ((backbone.artifacts[i], padded[i]) for i in sorted(padded))
    )
    return (
        f'warning: {padded.total()} of {images} images were padded to the size of a file ({files}),'
        ' which changes their features near the edge; export with --dynamic hw, or files of their '
        'sizes.'
    )


def _check_fit(model: Any) -> None:
    backbone = model.backbone
    neck = getattr(model, 'neck', None)
    consumer: Any = neck if neck is not None else getattr(model, 'decode_head', None)
    if isinstance(consumer, nn.Sequential):
        consumer = consumer[0]
    wanted = getattr(consumer, 'in_channels', None)
    if wanted is None:
        return
    given: tuple[int, ...] = backbone.out_channels
    if neck is None:  # a head picks some of the stages
        picked = consumer.in_index
        picked = [picked] if isinstance(picked, int) else picked
        given = tuple(given[i] for i in picked if -len(given) <= i < len(given))
    elif isinstance(wanted, int):  # a neck that uses the last stage
        given = given[-1:]
    wanted = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if given != wanted:
        raise ArtifactError(
            f'{backbone.artifacts[0].path} returns stages of {_listed(given)} channels, and the '
            f'{type(consumer).__name__} of the config requires {_listed(wanted)}; export the '
            'backbone of this config.'
        )


def _try(artifact: Artifact) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Run it once; returns the channels and the strides of its feature maps."""
    batch, _, height, width = artifact.input_shape
    shape = batch or 1, 3, height or TRIAL, width or TRIAL
    outputs = artifact.run(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    for name, output in zip(artifact.output_names, outputs, strict=True):
        if output.ndim != 4 or len(output) != shape[0] or 0 in output.shape:
            raise ArtifactError(
                f'{artifact.path} returns {name} of shape {shown_shape(output.shape)} for images '
                f'{shown_shape(shape)}, which is no feature map (N, C, H, W).'
            )
        if not np.isfinite(output).all():
            raise ArtifactError(
                f'{artifact.path} returns NaN or infinity in {name}; its numbers do not reach as '
                'far as the network needs, or it is damaged.'
            )
    channels = tuple(output.shape[1] for output in outputs)
    strides = tuple(round(shape[2] / output.shape[2]) for output in outputs)
    for name, output, stride in zip(artifact.output_names, outputs, strides):
        if output.shape[2:] != tuple(-(-side // stride) for side in shape[2:]):
            raise ArtifactError(
                f'{artifact.path} returns {name} of shape {shown_shape(output.shape)} for images '
                f'{shown_shape(shape)}, which no stride explains.'
            )
    return channels, strides


def _padded(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images with zeros, mm's own padding of normalised images, on the right and below."""
    rest = height - images.shape[2], width - images.shape[3]
    return np.pad(images, ((0, 0), (0, 0), (0, rest[0]), (0, rest[1]))) if any(rest) else images


def _in_batches(artifact: Artifact, images: np.ndarray) -> list[np.ndarray]:
    """All outputs for any number of images."""
    step = artifact.input_shape[0]
    if step is None or step == len(images):
        return artifact.run(images)
    pieces = []
    for start in range(0, len(images), step):
        piece = images[start : start + step]
        missing = step - len(piece)
        pieces.append(artifact.run(np.pad(piece, ((0, missing), (0, 0), (0, 0), (0, 0)))))
    return [np.concatenate(outputs)[: len(images)] for outputs in zip(*pieces)]


def _described(maps: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    channels, strides = maps
    return f'{_listed(channels)} channels at strides {_listed(strides)}'


def _listed(values: Sequence[int]) -> str:
    return ', '.join(map(str, values))

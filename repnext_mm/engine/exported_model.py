"""An exported complete model in the place of mm's, whose own test then measures the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from ..checkpoints import RunCheckpoint
from ..classification.tested import is_classifier
from ..runtimes import Artifact, ArtifactError, open_artifact, shown_shape
from ..runtimes.predictor import finish
from .exported_backbone import Counts


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class ExportedModel(BaseModel):
    """Runs an exported detector or segmentor, so that the figures of a test are those of the file.

    It has no weights. Images come from the test pipeline of mm; what the file does not do itself
    (scaling back, pasting masks, the NMS of `--nms host`) is done by the code that is shipped
    beside it.

    Args:
        artifact: A file that `repnext-mm deploy` wrote of a complete model.
        data_preprocessor: That of the config; normalization is left out where the file has it.
        precision: What OpenVINO computes in: 'f32', 'bf16' or 'f16'.
        threads: Number of threads to compute on; PyTorch's when None.
        trust: Run files that are code (TorchScript, AOTInductor); say so for files that you made.

    Attributes:
        counts: How many images it ran, and how many were padded to the size of the file.

    Raises:
        ArtifactError: The file cannot be opened, or is not of a complete model.
    """

    def __init__(
        self,
        artifact: str,
        data_preprocessor: dict[str, Any] | None = None,
        precision: str | None = None,
        threads: int | None = None,
        trust: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        threads = threads or torch.get_num_threads()
        opened = open_artifact(artifact, threads=threads, precision=precision, trust=trust)
        if opened.task == 'backbone':
            raise ArtifactError(f'{opened.path} is a backbone alone; name it by --backbone.')
        pads = (data_preprocessor or {}).get('test_cfg') or {}
        if opened.task == 'segmentation' and (pads.get('size') or pads.get('size_divisor')):
            raise ArtifactError(
                f'data_preprocessor.test_cfg={dict(pads)} pads images, and {opened.path} returns '
                'the classes of all that it is given; resize in the test pipeline instead, as '
                'ResizeToMultiple does.'
            )
        if opened.metadata.get('preprocess') and data_preprocessor:
            left_out = ('mean', 'std', 'bgr_to_rgb', 'rgb_to_bgr', 'pad_value', 'pad_val')
            data_preprocessor = {k: v for k, v in data_preprocessor.items() if k not in left_out}
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.artifact = opened
        self.artifacts = [opened]
        self.counts = Counts()
        # A model without parameters has no device, and wrappers of mmengine ask for one.
        self.register_buffer('nothing', torch.zeros(0), persistent=False)

    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = 'predict'
    ) -> Any:
        """`(N, 3, H, W)` and the samples of a test to the same samples with predictions.

        Raises:
            ArtifactError: In training, without samples, or where an image does not fit.
        """
        self._require_prediction(mode, data_samples)
        assert data_samples is not None
        images = inputs.detach().float().cpu().numpy()
        for image, sample in zip(images, data_samples):
            result = self._predict(image, sample.metainfo)
            _note(sample, result)
        return data_samples

    def _require_prediction(self, mode: str, given: Any) -> None:
        if mode != 'predict' or given is None:
            raise ArtifactError(
                f'{self.artifact.path} is an exported file, which predicts and cannot be trained.'
            )

    def _predict(self, image: np.ndarray, meta: dict[str, Any]) -> dict[str, np.ndarray]:
        inside, original = tuple(meta['img_shape'][:2]), tuple(meta['ori_shape'][:2])
        artifact = self.artifact
        full = self._padded(image)
        batch = artifact.input_shape[0] or 1
        values: dict[str, np.ndarray] = {
            'image_size': np.repeat(np.array([inside], np.float32), batch, 0),
            'out_size': np.array(original, np.int64),
        }
        feed = {name: values[name] for name in artifact.input_names[1:]}
        outputs = artifact.run_named(
            {artifact.input_names[0]: np.repeat(full[None], batch, 0), **feed}
        )
        one = {name: value[0] for name, value in outputs.items()}
        factors = tuple(float(f) for f in meta.get('scale_factor', (1, 1))[:2])
        return finish(one, {**artifact.metadata}, original, inside, factors)  # type: ignore[arg-type]

    def _padded(self, image: np.ndarray) -> np.ndarray:
        """The image with zeros on the right and below, where the file has one size."""
        size = tuple(
            own or side for own, side in zip(self.artifact.input_shape[2:], image.shape[1:])
        )
        self.counts.images += 1
        if size == image.shape[1:]:
            return image
        rest = size[0] - image.shape[1], size[1] - image.shape[2]
        if min(rest) < 0 or self.artifact.task == 'segmentation':
            raise ArtifactError(
                f'{self.artifact.path} requires images of {shown_shape(size)}, and the test '
                f'pipeline makes one of {shown_shape(image.shape[1:])}; export with --dynamic '
                'batch-hw, or with this --size.'
            )
        self.counts.padded[0] += 1
        return np.pad(image, ((0, 0), (0, rest[0]), (0, rest[1])))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the weights of the model that the file replaces."""

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.artifact.path})'


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class ExportedClassifier(ExportedModel):
    """The same of a classifier: images come normalized from timm's transforms."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'predict'
    ) -> Any:
        """`(N, 3, H, W)` and `labels (N,)` to one pair of logits and label per image.

        Raises:
            ArtifactError: In training, without labels, or where an image does not fit.
        """
        self._require_prediction(mode, labels)
        assert labels is not None
        if own := self.artifact.metadata.get('preprocess'):
            mean, std = (inputs.new_tensor(own[key]).view(-1, 1, 1) for key in ('mean', 'std'))
            inputs = (inputs * std + mean).round()  # the pixels that they were made of
            inputs = inputs.flip(1) if own['swap'] else inputs
        count, most = len(inputs), self.artifact.input_shape[0] or len(inputs)
        self.counts.images += count
        logits = []
        for start in range(0, count, most):
            part = inputs[start : start + most]
            full = torch.cat([part, part[-1:].expand(most - len(part), -1, -1, -1)])
            (found,) = self.artifact.run_named({self.artifact.input_names[0]: full}).values()
            logits.append(torch.from_numpy(found)[: len(part)])
        return list(zip(torch.cat(logits), labels.cpu(), strict=True))


def _note(sample: Any, result: dict[str, np.ndarray]) -> None:
    """Put a result into a sample, as mm's own models do."""
    if 'classes' in result:
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(result['classes'])[None])
        return
    found = InstanceData()
    found.bboxes = torch.from_numpy(result['boxes'])
    found.scores = torch.from_numpy(result['scores'])
    found.labels = torch.from_numpy(result['labels'])
    if 'masks' in result:
        found.masks = torch.from_numpy(result['masks'])
    sample.pred_instances = found


def run_file(cfg: Config, artifact: str, precision: str | None, trust: bool = False) -> None:
    """Let the config's model be an exported file, in place."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    kind = ExportedClassifier if is_classifier(cfg) else ExportedModel
    cfg.model = dict(
        type=kind.__name__,
        artifact=artifact,
        data_preprocessor=preprocessor,
        precision=precision,
        trust=trust,
    )


def introduce_file(
    model: nn.Module, checkpoint: RunCheckpoint, classes: Sequence[str] | None
) -> list[str]:
    """Lines for the user about the file that is evaluated.

    Raises:
        ArtifactError: It knows another number of classes than the config.
    """
    artifact: Artifact = model.artifact  # type: ignore[assignment]
    meta = artifact.metadata
    own = meta.get('num_classes')
    if own is not None and classes is not None and own not in (len(classes), 1):
        raise ArtifactError(
            f'{artifact.path} has {own} classes, and the config has {len(classes)}; export '
            'the model of this config.'
        )
    lines = [
        f'Model: {artifact.path} ({meta.get("title", meta.get("family"))}), images '
        f'{shown_shape(artifact.input_shape)}, {artifact.runtime} in {artifact.precision}.'
    ]
    if meta.get('checkpoint_sha256', checkpoint.sha256) != checkpoint.sha256:
        lines.append(
            f'warning: {artifact.path} was exported from another checkpoint than '
            f'{checkpoint.path}, which has no part in these figures.'
        )
    return lines

"""A detector of mmdet: an image to boxes, scores, labels and masks, as `predict` finds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...operators.suppression import PRESENT
from . import boxes
from .base import IMAGE_SIZE, Preprocess, Target, UnsupportedModel
from .heads import Atlas, Found, RoIStages, RTMDetInsHead, dense_head, proposal_head, same_methods


class DetectorTarget(Target):
    """`image (N, 3, H, W)` and `image_size (N, 2)` to detections, the best first.

    `boxes (N, K, 4)` in pixels of the image, `scores (N, K)`, `labels (N, K)`, and for masks
    `masks (N, K, size, size)`: probabilities inside the box, or for RTMDet-Ins logits over the
    image at a stride. Rows beyond what was found have the score 0.

    Args:
        model: A one-stage or two-stage detector of mmdet.
        nms: 'graph', or 'host' for every box and score by level, before NMS.

    Raises:
        UnsupportedModel: A part predicts otherwise than those that are covered.
    """

    task = 'detection'
    extras = (IMAGE_SIZE,)
    model: Any

    def __init__(
        self,
        model: Any,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype | None = None,
        nms: str = 'graph',
    ) -> None:
        _require_plain(model)
        super().__init__(model, preprocess, dtype)
        self.nms = nms
        self.finished = nms == 'graph'
        self.stages: RoIStages | None = None
        self.takes_atlas = False
        if hasattr(model, 'roi_head'):
            self.dense = proposal_head(model.rpn_head, model.test_cfg.rpn)
            clips = getattr(model.rpn_head.bbox_coder, 'clip_border', True)
            self.stages = RoIStages(model.roi_head, model.test_cfg.rcnn, clips)
            self.takes_atlas = self.stages.takes_atlas
            self.masks = 'boxes' if self.stages.has_masks else None
            self.most_opset = 21
        else:
            self.dense = dense_head(model.bbox_head, model.test_cfg)
            self.masks = 'image' if isinstance(self.dense, RTMDetInsHead) else None
        self.every_mask = False
        self.counts = True
        self.lowers_once = self.masks == 'boxes' or self.dense.many
        names = ('boxes', 'scores', 'labels', *(['masks'] if self.masks else []))
        if nms == 'host':
            if self.stages or self.masks:
                raise UnsupportedModel(
                    f'--nms host is not possible for {type(model).__name__}: its '
                    f'{"second stage is" if self.stages else "masks are"} computed of what NMS '
                    'keeps.'
                )
            names = self._raw_names()
        self.output_names = tuple(names)

    def _raw_names(self) -> tuple[str, ...]:
        with torch.no_grad():
            features = self.features(torch.zeros(1, 3, 256, 256))
            levels = self.dense.levels(features)
        kinds = ('boxes', 'scores', *(['factors'] if levels[0].factors is not None else []))
        return tuple(f'{kind}{i}' for i in range(len(levels)) for kind in kinds)

    def features(self, image: Tensor, image_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """What backbone and neck make of an image, in float32."""
        features = self.model.extract_feat(self.prepared(image, image_size))
        return tuple(features if self.dtype is None else (each.float() for each in features))

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        features = self.features(image, image_size)
        if self.nms == 'host':
            return self.dense.raw(features, image_size)
        found = self.dense(features, image_size, self.counts)
        masks: list[Tensor] = []
        if self.stages is not None:
            pyramid = self.stages.atlas(features) if self.takes_atlas else features
            found = self.stages(pyramid, found, image_size)
            if self.masks:
                masks = [self._box_masks(pyramid, found)]
        elif isinstance(self.dense, RTMDetInsHead):
            masks = [self.dense.masks(found)]
        return found.boxes, found.scores.clamp(min=0), found.labels, *masks

    def _box_masks(self, features: Sequence[Tensor] | Atlas, found: Found) -> Tensor:
        """Masks `(N, K, size, size)`, computed for what was found and 0 elsewhere."""
        assert self.stages is not None
        n, count = found.scores.shape
        present = (found.scores > PRESENT).reshape(-1)
        if self.every_mask:
            rows = torch.arange(n * count, device=present.device)
            masks = self.stages.masks(features, found, rows)
            return torch.where(present[:, None, None], masks, 0).reshape(n, count, *masks.shape[1:])
        # At least one row, since a convolution of nothing cannot be exported.
        rows = torch.cat([present.new_zeros(1, dtype=torch.int64), present.nonzero()[:, 0]])
        masks = self.stages.masks(features, found, rows)
        every = masks.new_zeros(n * count, *masks.shape[1:]).index_put((rows,), masks)
        every = torch.where(present[:, None, None], every, 0)
        return every.reshape(n, count, *masks.shape[1:])

    @property
    def translations(self) -> dict[Any, Any]:
        return boxes.translations()

    def for_format(self, format_name: str) -> DetectorTarget:
        twin = copy.copy(self)
        # Compiled code mixes masks up where their number is known only when it runs (torch 2.14).
        if format_name == 'aoti' and self.lowers_once:
            twin.every_mask, twin.counts, twin.lowers_once = True, False, False
            return twin
        if format_name == 'torchscript':  # tracing makes a constant of the number
            twin.counts = False
            return twin
        # In bfloat16 OpenVINO rounds coordinates in an atlas to several pixels of a large image:
        # boxes of 800x1344 had a mean IoU of 0.89 instead of 0.95 with those in float32.
        if format_name == 'openvino' and self.takes_atlas:
            twin.takes_atlas = False
            return twin
        return self

    def network(self) -> list[nn.Module]:
        # What follows, such as boxes of 1344 pixels, does not fit into 8 or 11 bits.
        return [self.model.backbone, *([self.model.neck] if self.model.with_neck else [])]

    def refuse(self, format_name: str, dynamic: str) -> str:
        if format_name == 'torchscript' and dynamic != 'none':
            return 'tracing makes constants of its sizes'
        if format_name == 'coreml' and self.nms != 'host':
            return (
                'its converter has no selection of boxes; with --nms host (one-stage detectors '
                'without masks) the predictor does that'
            )
        return ''

    def description(self) -> dict[str, Any]:
        head: Any = self.model.bbox_head if self.stages is None else self.stages.heads[0]
        more: dict[str, Any] = {'nms': self.nms, 'num_classes': int(head.num_classes)}
        if self.nms == 'host':
            more['rule'] = self.dense.rule
        if self.masks:
            more['masks'] = self.masks
            cfg = self.model.test_cfg
            cfg = cfg.rcnn if self.masks == 'boxes' else cfg
            more['mask_threshold'] = float(cfg.get('mask_thr_binary', 0.5))
            if self.masks == 'image':
                more['mask_stride'] = int(self.model.bbox_head.prior_generator.strides[0][0])
        return more


def _require_plain(model: Any) -> None:
    from mmdet.models.detectors.single_stage import SingleStageDetector
    from mmdet.models.detectors.two_stage import TwoStageDetector

    kind, name = type(model), type(model).__name__
    for like in (SingleStageDetector, TwoStageDetector):
        if isinstance(model, like) and same_methods(kind, like, ('predict',)):
            break
    else:
        raise UnsupportedModel(
            f'{name} cannot be exported exactly: it predicts otherwise than the one-stage and '
            'two-stage detectors of mmdet; --scope backbone exports the backbone.'
        )
    for part in model.modules():
        if 'DeformConv' in type(part).__name__:
            raise UnsupportedModel(
                f'{name} has deformable convolutions ({type(part).__name__}), which are not '
                'exported; --scope backbone exports the backbone.'
            )

"""Heads of mmdet as modules of fixed-size outputs, written over the heads' own layers.

Whether a head is covered is decided by its methods: one that predicts with the methods of the class
that a module here follows, and with no others, is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...operators.suppression import ABSENT, PRESENT
from .base import UnsupportedModel
from .boxes import (
    batched_nms,
    best,
    decoded,
    flattened,
    rows_of,
    strongest,
)

#: Without `max_per_img`, as for YOLOX: the limit of COCO's evaluation.
MOST = 100
#: To select more candidates of a level than these takes longer than to count first how many there
#: are above the threshold.
MANY = 4096
#: Below a threshold in logits: their sigmoid may still be rounded to above it.
SLACK = 1e-3


class Level(NamedTuple):
    """What a dense head says at one level: of every anchor, in the order of mm.

    Args:
        scores: `(N, A, C)`: what `DenseHead.probabilities` takes.
        boxes: What `decode` makes boxes of, `(N, A, D)`.
        priors: `(A, P)`.
        factors: `(N, A)` that scores are multiplied with after the selection, or None.
        kernels: `(N, A, G)` of dynamic masks, or None.
        maps: `(N, P, H, W)` that kernels are applied to, or None.
    """

    scores: Tensor
    boxes: Tensor
    priors: Tensor
    factors: Tensor | None = None
    kernels: Tensor | None = None
    maps: Tensor | None = None


class Found(NamedTuple):
    """Candidates or detections `(N, K, ...)`; rows with nothing have the score `ABSENT`."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    #: Of which level, and what dynamic masks need.
    levels: Tensor
    kernels: Tensor | None = None
    priors: Tensor | None = None
    maps: Tensor | None = None

    def at(self, places: Tensor, scores: Tensor) -> Found:
        """The rows at `(N, K)`, with new scores."""
        return Found(
            rows_of(self.boxes, places),
            scores,
            self.labels.gather(1, places),
            self.levels.gather(1, places),
            None if self.kernels is None else rows_of(self.kernels, places),
            None if self.priors is None else rows_of(self.priors, places),
            self.maps,
        )


class DenseHead(nn.Module):
    """What `BaseDenseHead.predict_by_feat` does, and that of RPNHead, GFLHead and RTMDetInsHead.

    Args:
        head: The head.
        cfg: Its `test_cfg`.
        proposes: Whether it is an RPN: NMS separates by level, there is no score threshold.
    """

    def __init__(self, head: Any, cfg: Any, proposes: bool = False) -> None:
        super().__init__()
        self.head = head
        self.proposes = proposes
        self.before = int(cfg.get('nms_pre', -1))
        self.threshold = ABSENT if proposes else float(cfg.get('score_thr', 0))
        self.most = int(cfg.get('max_per_img', MOST))
        self.least_side = float(cfg.get('min_bbox_size', -1))
        self.iou, self.agnostic = _nms(cfg.nms, type(head).__name__)
        if not proposes and self.least_side > 0:
            raise UnsupportedModel(
                f'min_bbox_size={self.least_side:g} of {type(head).__name__} is measured in pixels '
                'of the original image, which a file does not know; set it to 0.'
            )
        if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
            raise UnsupportedModel(
                f'{type(head.loss_cls).__name__} of {type(head).__name__} has its own activation, '
                'which is not exported.'
            )

    @property
    def many(self) -> bool:
        """Whether so many are selected that it pays to count candidates first."""
        return self.before > MANY and self.threshold > 0

    @property
    def rule(self) -> dict[str, Any]:
        """How `raw` becomes detections; what a predictor does where NMS is left to it."""
        return {
            'nms_pre': self.before,
            'score_thr': self.threshold,
            'iou_threshold': self.iou,
            'max_per_img': self.most,
            'class_agnostic': self.agnostic,
            'best_class': False,
            'min_bbox_size': self.least_side,
        }

    def levels(self, features: Sequence[Tensor]) -> list[Level]:
        """The head's outputs, flattened."""
        scores, boxes, *more = self.head(features)
        priors = self.head.prior_generator.grid_priors(
            [level.shape[-2:] for level in scores], device=scores[0].device
        )
        factors = more[0] if more else [None] * len(scores)
        return [
            Level(
                flattened(score, self.head.cls_out_channels),
                flattened(box, box.shape[1] // self.head.num_base_priors),
                prior,
                None if factor is None else flattened(factor, 1)[..., 0].sigmoid(),
            )
            for score, box, prior, factor in zip(scores, boxes, priors, factors)
        ]

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(N, A, C)`; softmax knows one class more, the background."""
        return logits.sigmoid() if self.head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]

    def decode(self, priors: Tensor, boxes: Tensor, level: int, image_size: Tensor) -> Tensor:
        """Boxes `(N, K, 4)` of priors `(N, K, P)` and outputs `(N, K, D)`."""
        return decoded(self.head.bbox_coder, priors, boxes, image_size)

    def raw(self, features: Sequence[Tensor], image_size: Tensor) -> tuple[Tensor, ...]:
        """Boxes `(N, A, 4)`, scores `(N, A, C)` and, where there are some, factors, by level."""
        outputs: list[Tensor] = []
        for number, level in enumerate(self.levels(features)):
            priors = level.priors.expand(len(level.boxes), -1, -1)
            outputs += [
                self.decode(priors, level.boxes, number, image_size),
                self.probabilities(level.scores),
                *([] if level.factors is None else [level.factors]),
            ]
        return tuple(outputs)

    def candidates(self, features: Sequence[Tensor], image_size: Tensor, counts: bool) -> Found:
        """What goes into NMS: the best `nms_pre` pairs of anchor and class of each level."""
        levels = self.levels(features)
        found = [self._selected(level, n, image_size, counts) for n, level in enumerate(levels)]
        columns: list[Any] = [
            None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*found)
        ]
        return Found(*columns)._replace(maps=levels[0].maps)

    def _selected(self, level: Level, number: int, image_size: Tensor, counts: bool) -> Found:
        n, count, _ = level.scores.shape
        # The sigmoid keeps the order, so it is computed of what is left; softmax does not.
        late = self.head.use_sigmoid_cls
        scores = level.scores if late else self.probabilities(level.scores)
        missing, above = None, self.threshold if counts else None
        # Runtimes do not skip a maximum of one class.
        highest = scores[..., 0] if level.scores.shape[2] == 1 else scores.amax(-1)
        if self.many:
            cut = logit(above) - SLACK if above and late else above
            anchors = strongest(highest, self.before, cut)[1]
        elif self.before > 0:
            top, anchors = best(highest, self.before)
            missing = top == -torch.inf
        else:
            anchors = torch.arange(count, device=scores.device).expand(n, -1)
        scores = rows_of(scores, anchors)
        if late:
            scores = self.probabilities(scores)
        if missing is not None:
            scores = torch.where(missing[..., None], ABSENT, scores)
        kept, classes = scores.shape[1:]
        if classes > 1:
            pairs = self.before if self.before > 0 else kept * classes
            scores = scores.flatten(1)
            scores, places = strongest(scores, pairs, above) if self.many else best(scores, pairs)
            labels = places % classes
            anchors = anchors.gather(1, places // classes)
        else:
            scores, labels = scores[..., 0], torch.zeros_like(anchors)
        scores = torch.where(scores > self.threshold, scores, ABSENT)
        priors = level.priors[anchors]
        boxes = self.decode(priors, rows_of(level.boxes, anchors), number, image_size)
        if level.factors is not None:
            factors = level.factors.gather(1, anchors)
            scores = torch.where(scores > PRESENT, scores * factors, ABSENT)
        return Found(
            boxes,
            scores,
            labels,
            torch.full_like(labels, number),
            None if level.kernels is None else rows_of(level.kernels, anchors),
            None if level.kernels is None else priors,
        )

    def forward(
        self, features: Sequence[Tensor], image_size: Tensor, counts: bool = False
    ) -> Found:
        """The detections, the best first.

        Args:
            features: By level.
            image_size: `(N, 2)`.
            counts: Whether shapes may depend on how many candidates there are, with the same
                result. It matters to heads that select many.
        """
        found = self.candidates(features, image_size, counts)
        scores = found.scores
        if self.least_side >= 0:
            sides = (found.boxes[..., 2:] - found.boxes[..., :2]).amin(-1)
            scores = torch.where(sides > self.least_side, scores, ABSENT)
        ids = found.levels if self.proposes else found.labels
        ids = torch.zeros_like(ids) if self.agnostic else ids
        kept = batched_nms(found.boxes, scores, ids, self.iou, self.most)
        scores, places = best(kept, self.most)
        return found.at(places, scores.clamp(min=ABSENT))


class GFLHead(DenseHead):
    """A head that predicts distances as distributions (GFL, LD)."""

    def decode(self, priors: Tensor, boxes: Tensor, level: int, image_size: Tensor) -> Tensor:
        n, k = boxes.shape[:2]
        # Not `head.integral`, whose buffer torch.onnx knows under two names.
        project = (self.head.integral.project * 1.0)[:, None]
        distances = (boxes.reshape(n, k, 4, -1).softmax(-1) @ project)[..., 0]
        distances = distances * self.head.prior_generator.strides[level][0]
        centers = self.head.anchor_center(priors.reshape(n * k, -1)).reshape(n, k, 2)
        return decoded(self.head.bbox_coder, centers, distances, image_size)


class RTMDetInsHead(DenseHead):
    """RTMDet-Ins: boxes, and masks by kernels that the network computes."""

    def levels(self, features: Sequence[Tensor]) -> list[Level]:
        scores, boxes, kernels, maps = self.head(features)
        priors = self.head.prior_generator.grid_priors(
            [level.shape[-2:] for level in scores], device=scores[0].device, with_stride=True
        )
        return [
            Level(
                flattened(score, self.head.cls_out_channels),
                flattened(box, 4),
                prior,
                kernels=flattened(kernel, kernel.shape[1]),
                maps=maps,
            )
            for score, box, prior, kernel in zip(scores, boxes, priors, kernels)
        ]

    def decode(self, priors: Tensor, boxes: Tensor, level: int, image_size: Tensor) -> Tensor:
        return decoded(self.head.bbox_coder, priors[..., :2], boxes, image_size)

    def masks(self, found: Found) -> Tensor:
        """Logits `(N, K, H / 8, W / 8)`: grouped convolutions as matrix products."""
        maps, kernels, priors = found.maps, found.kernels, found.priors
        assert maps is not None and kernels is not None and priors is not None
        n, k = kernels.shape[:2]
        height, width = maps.shape[2:]
        at = self.head.prior_generator.single_level_grid_priors(
            (height, width), level_idx=0, device=maps.device
        ).reshape(1, 1, -1, 2)
        near = (priors[:, :, None, :2] - at) / (priors[:, :, None, 2:3] * 8)
        x = torch.cat([near.transpose(2, 3), maps.flatten(2)[:, None].expand(-1, k, -1, -1)], 2)
        parts = kernels.split(self.head.weight_nums + self.head.bias_nums, 2)
        layers = len(self.head.weight_nums)
        for number, (weight, bias) in enumerate(zip(parts[:layers], parts[layers:])):
            x = weight.reshape(n, k, bias.shape[2], -1) @ x + bias[..., None]
            x = x.relu() if number < layers - 1 else x
        return x.reshape(n, k, height, width)


class YOLOXHead(DenseHead):
    """YOLOX: only the best class of each anchor, and its score times the objectness."""

    many = False  # all anchors go into NMS

    @property
    def rule(self) -> dict[str, Any]:
        return {**super().rule, 'nms_pre': -1, 'best_class': True}

    def levels(self, features: Sequence[Tensor]) -> list[Level]:
        scores, boxes, objectness = self.head(features)
        priors = self.head.prior_generator.grid_priors(
            [level.shape[-2:] for level in scores], device=scores[0].device, with_stride=True
        )

        def joined(maps: Sequence[Tensor], channels: int) -> Tensor:
            return torch.cat([flattened(level, channels) for level in maps], 1)

        certain = joined(objectness, 1).sigmoid()
        scores = joined(scores, self.head.cls_out_channels).sigmoid() * certain
        return [Level(scores, joined(boxes, 4), torch.cat(priors))]

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits

    def decode(self, priors: Tensor, boxes: Tensor, level: int, image_size: Tensor) -> Tensor:
        return self.head._bbox_decode(priors if priors.ndim == 2 else priors[0], boxes)

    def candidates(self, features: Sequence[Tensor], image_size: Tensor, counts: bool) -> Found:
        (level,) = self.levels(features)
        scores, labels = level.scores.max(-1)
        scores = torch.where(scores >= self.threshold, scores, ABSENT)
        boxes = self.decode(level.priors, level.boxes, 0, image_size)
        return Found(boxes, scores, labels, torch.zeros_like(labels))


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf


def dense_head(head: Any, cfg: Any) -> DenseHead:
    """The module for a one-stage head.

    Raises:
        UnsupportedModel: It predicts otherwise than those that are covered.
    """
    from mmdet.models import dense_heads as mm

    base = mm.base_dense_head.BaseDenseHead
    #: The class whose `methods` a head must have, and the module that does the same.
    covered: Sequence[tuple[Any, tuple[str, ...], Callable[..., DenseHead]]] = (
        (base, ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'),
         DenseHead),
        (mm.GFLHead, ('predict', 'predict_by_feat', '_predict_by_feat_single',
                      '_bbox_post_process'), GFLHead),
        (mm.YOLOXHead, ('predict', 'predict_by_feat', '_bbox_decode', '_bbox_post_process'),
         YOLOXHead),
        (mm.RTMDetInsHead, ('predict', 'predict_by_feat', '_predict_by_feat_single',
                            '_bbox_mask_post_process', '_mask_predict_by_feat_single'),
         RTMDetInsHead),
    )  # fmt: skip
    for like, methods, module in covered:
        if same_methods(type(head), like, methods):
            return module(head, cfg)
    names = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
    own = [name for name in names if not same_methods(type(head), base, (name,))]
    raise UnsupportedModel(
        f'{type(head).__name__} cannot be exported exactly: its {own[0] if own else "predict"} '
        "differs from that of mmdet's dense heads; --scope backbone exports the backbone."
    )


def proposal_head(head: Any, cfg: Any) -> DenseHead:
    """The module for an RPN.

    Raises:
        UnsupportedModel: It proposes otherwise than RPNHead.
    """
    from mmdet.models.dense_heads import RPNHead

    methods = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
    if not same_methods(type(head), RPNHead, methods):
        raise UnsupportedModel(
            f'{type(head).__name__} proposes regions otherwise than RPNHead, and is not exported.'
        )
    return DenseHead(head, cfg, proposes=True)


def same_methods(kind: type, like: type, names: Sequence[str]) -> bool:
    """Whether a class has these methods of another one as they are."""
    return all(getattr(kind, n, None) is getattr(like, n, math.nan) for n in names)


def _nms(settings: Any, name: str) -> tuple[float, bool]:
    """The IoU threshold, and whether classes suppress each other."""
    kind = settings.get('type', 'nms')
    if kind != 'nms':
        raise UnsupportedModel(
            f'{name} uses {kind}, which no format has; set test_cfg.nms.type to nms.'
        )
    iou = settings.get('iou_threshold', settings.get('iou_thr', 0.5))
    return float(iou), bool(settings.get('class_agnostic', False))


# --- second stages


#: Pixels repeated around each level of an atlas, as far as RoIAlign looks beyond an edge.
FRAME = 1


@dataclass
class Atlas:
    """The levels of a pyramid in one feature map, for RoIAlign to run once instead of per level.

    Attributes:
        image: `(N, C, H, W)`: the levels from left to right, each with its edge repeated around it.
        widths: Of each level, with its frame.
    """

    image: Tensor
    widths: list[int]

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> Atlas:
        height = levels[0].shape[2] + 2 * FRAME
        pieces: list[Tensor] = []
        widths = []
        for level in levels:
            n, channels, own, width = level.shape
            rows = [level[:, :, :1], level, level[:, :, -1:]]
            if pieces:  # the first is the tallest
                rows.append(level.new_zeros((n, channels, height - own - 2 * FRAME, width)))
            column = torch.cat(rows, 2)
            pieces += [column[..., :1], column, column[..., -1:]]
            widths.append(width + 2 * FRAME)
        return cls(torch.cat(pieces, 3), widths)


class JoinLevels(nn.Module):
    """`Atlas.of` as a module, so that an exported file says where its operations belong."""

    def forward(self, levels: Sequence[Tensor]) -> Atlas:
        return Atlas.of(levels)


class RoIPooling(nn.Module):
    """SingleRoIExtractor: every box pooled at the level of its size.

    Attributes:
        takes_atlas: Whether the levels are pooled alike, and no sample of a box inside the image is
            further out than half a pixel. Without `aligned` a box has a pixel at least, beyond
            the edge too, where RoIAlign finds zeros.
    """

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

        if not same_methods(type(extractor), SingleRoIExtractor, ('forward', 'map_roi_levels')):
            raise UnsupportedModel(f'{type(extractor).__name__} is not exported.')
        self.finest = extractor.finest_scale
        self.layers = []
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or getattr(layer, 'pool_mode', 'avg') != 'avg':
                raise UnsupportedModel(
                    f'{type(layer).__name__} is not exported; RoIAlign with average pooling is.'
                )
            size = layer.output_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            self.layers.append((size, layer.spatial_scale, layer.sampling_ratio, layer.aligned))
        self.takes_atlas = len({(*rest, size) for size, _, *rest in self.layers}) == 1 and all(
            aligned for *_, aligned in self.layers
        )

    def forward(self, features: Sequence[Tensor] | Atlas, boxes: Tensor, images: Tensor) -> Tensor:
        """`(M, 4)` of `images (M,)` to `(M, C, size, size)`."""
        from torchvision.ops import roi_align  # takes most of a second

        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(torch.log2(area.sqrt() / self.finest + 1e-6))
        level = level.clamp(0, len(self.layers) - 1)
        images = images.to(boxes)[:, None]
        if isinstance(features, Atlas):
            size, _, ratio, aligned = self.layers[0]
            scale = boxes.new_tensor([layer[1] for layer in self.layers])[level.long()]
            left = torch.full_like(level, FRAME)
            for number, width in enumerate(features.widths[:-1]):
                left = left + (level > number).to(level) * width
            corner = torch.stack([left, torch.full_like(level, FRAME)], 1).repeat(1, 2)
            rows = torch.cat([images, boxes * scale[:, None] + corner], 1)
            return roi_align(features.image, rows, size, 1.0, ratio, aligned)
        total: Any = 0
        for number, (size, scale, ratio, aligned) in enumerate(self.layers):
            own = (level == number)[:, None]
            # The sampling is adaptive: a large box at a fine level would cost most of all, so
            # there stands a point.
            mine = torch.where(own, boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
            pooled = roi_align(
                features[number], torch.cat([images, mine], 1), size, scale, ratio, aligned
            )
            total = total + torch.where(own[..., None, None], pooled, 0)
        return total


class RoIStages(nn.Module):
    """The second stage of StandardRoIHead, or the stages of CascadeRoIHead.

    Args:
        head: The RoI head.
        cfg: `test_cfg.rcnn`.
        clips: Whether the proposals are inside the image.
    """

    def __init__(self, head: Any, cfg: Any, clips: bool = True) -> None:
        super().__init__()
        self.cascade = _is_cascade(head)
        self.iou, self.agnostic = _nms(cfg.nms, type(head).__name__)
        self.threshold, self.most = float(cfg.score_thr), int(cfg.max_per_img)
        self.has_masks = bool(head.with_mask)
        listed = (lambda value: list(value)) if self.cascade else (lambda value: [value])
        self.heads = nn.ModuleList(listed(head.bbox_head))
        self.pooling = nn.ModuleList(RoIPooling(e) for e in listed(head.bbox_roi_extractor))
        self.shared = head.shared_head if head.with_shared_head else nn.Identity()
        for bbox_head in self.heads:
            _require_box_head(bbox_head)
        if self.has_masks:
            self.mask_heads = nn.ModuleList(listed(head.mask_head))
            self.mask_pooling = nn.ModuleList(
                RoIPooling(e) for e in listed(head.mask_roi_extractor)
            )
            for mask_head in self.mask_heads:
                _require_mask_head(mask_head)
            self.class_agnostic_masks = bool(mask_head.class_agnostic)
        poolings = [*self.pooling, *(self.mask_pooling if self.has_masks else ())]
        levels = {len(pool.layers) for pool in poolings}
        self.levels = levels.pop() if len(levels) == 1 else 0
        # Boxes of the stages before the last are pooled, and those of the last for masks.
        inside = clips and all(getattr(h.bbox_coder, 'clip_border', True) for h in self.heads)
        self.pooling_atlas = JoinLevels()
        self.takes_atlas = self.levels > 1 and inside and all(pool.takes_atlas for pool in poolings)

    def atlas(self, features: Sequence[Tensor]) -> Atlas:
        """The features as `forward` and `masks` take them, too, where `takes_atlas`."""
        return self.pooling_atlas(features[: self.levels])

    def forward(
        self, features: Sequence[Tensor] | Atlas, proposals: Found, image_size: Tensor
    ) -> Found:
        """The detections, the best first."""
        boxes, present = proposals.boxes, proposals.scores > PRESENT
        n, count = present.shape
        images = torch.arange(n, device=boxes.device)[:, None].expand(n, count).reshape(-1)
        summed: Any = 0
        head: Any
        for number, (head, pool) in enumerate(zip(self.heads, self.pooling)):
            pooled = self.shared(pool(features, boxes.reshape(-1, 4), images))
            logits, deltas = head(pooled)
            summed = summed + logits
            sets = 1 if head.reg_class_agnostic else head.num_classes
            deltas = deltas.reshape(n, count, sets, 4)
            if number < len(self.heads) - 1:
                if sets > 1:
                    labels = logits[:, :-1].argmax(1).reshape(n, count, 1, 1)
                    deltas = deltas.gather(2, labels.expand(-1, -1, 1, 4))
                boxes = decoded(head.bbox_coder, boxes, deltas[:, :, 0], image_size)
        if len(self.heads) > 1:
            summed = summed / float(len(self.heads))
        scores = summed.softmax(-1)[:, :-1].reshape(n, count, -1)
        classes = scores.shape[2]
        scores = torch.where((scores > self.threshold) & present[..., None], scores, ABSENT)
        boxes = decoded(
            head.bbox_coder,
            boxes.repeat_interleave(sets, 1),
            deltas.reshape(n, count * sets, 4),
            image_size,
        )
        boxes = boxes.reshape(n, count, sets, 4).expand(-1, -1, classes, -1)
        boxes = boxes.reshape(n, count * classes, 4)
        labels = torch.arange(classes, device=boxes.device).repeat(count)[None].expand(n, -1)
        ids = torch.zeros_like(labels) if self.agnostic else labels
        kept = batched_nms(boxes, scores.flatten(1), ids, self.iou, self.most)
        scores, places = best(kept, self.most)
        return Found(rows_of(boxes, places), scores.clamp(min=ABSENT), places % classes, places * 0)

    def masks(self, features: Sequence[Tensor] | Atlas, found: Found, rows: Tensor) -> Tensor:
        """Probabilities `(M, size, size)` of the found rows `(M,)`, counted over all images."""
        count = found.boxes.shape[1]
        boxes, images = found.boxes.reshape(-1, 4)[rows], rows // count
        total: Any = 0
        for head, pool in zip(self.mask_heads, self.mask_pooling):
            total = total + head(self.shared(pool(features, boxes, images))).sigmoid()
        total = total / len(self.mask_heads) if len(self.mask_heads) > 1 else total
        if self.class_agnostic_masks:
            return total[:, 0]
        labels = found.labels.reshape(-1)[rows].reshape(-1, 1, 1, 1)
        return total.gather(1, labels.expand(-1, 1, *total.shape[2:]))[:, 0]


def _is_cascade(head: Any) -> bool:
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead

    standard = ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward')
    if same_methods(type(head), StandardRoIHead, standard):
        return False
    if same_methods(type(head), CascadeRoIHead, (*standard, '_refine_roi')):
        return True
    raise UnsupportedModel(
        f'{type(head).__name__} cannot be exported exactly: it predicts otherwise than '
        'StandardRoIHead and CascadeRoIHead; --scope backbone exports the backbone.'
    )


def _require_box_head(head: Any) -> None:
    from mmdet.models.roi_heads import BBoxHead

    name, methods = type(head).__name__, ('predict_by_feat', '_predict_by_feat_single')
    if not same_methods(type(head), BBoxHead, (*methods, 'regress_by_class')):
        raise UnsupportedModel(f'{name} has its own {methods[0]}, which is not exported.')
    if head.custom_cls_channels or not head.with_reg or not head.with_cls:
        raise UnsupportedModel(
            f'{name} without boxes, classes, or with its own activation is not exported.'
        )


def _require_mask_head(head: Any) -> None:
    from mmdet.models.roi_heads import FCNMaskHead

    if not same_methods(type(head), FCNMaskHead, ('predict_by_feat', '_predict_by_feat_single')):
        raise UnsupportedModel(
            f'{type(head).__name__} has its own predict_by_feat, which is not exported.'
        )

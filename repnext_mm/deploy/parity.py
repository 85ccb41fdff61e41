"""Whether an artifact computes what the model computes, by task.

Feature maps are compared with the network in float64. Classes and detections are compared with what
`predict` of mmseg and mmdet finds with the trained model; beside them stands the floor: what fusing
alone changes in that.
"""

from __future__ import annotations

import copy
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import require_regular
from ..runtimes import Artifact
from ..runtimes.predictor import finish
from .targets import (
    IMAGE_SIZE,
    INPUT,
    OUT_SIZE,
    BackboneTarget,
    ClassifierTarget,
    DetectorTarget,
    Preprocess,
    Target,
)

#: Of the arrays to compare on: a batch of 8 in 1344x800 takes 0.6 GB.
MOST_BYTES = 2 << 30
INPUTS = (INPUT, IMAGE_SIZE, OUT_SIZE)
#: So much above the lowest score that is kept, rounding may decide what is.
END = 1e-5
#: Share of the detections of an image that may be exchanged there.
MOST_EXCHANGED = 0.05
FLOOR = 'floor'
#: What a detection is beside its mask, and before the names of those that follow the kept ones.
COLUMNS = ('boxes', 'scores', 'labels')
BEYOND = 'beyond_'


@dataclass(frozen=True)
class Tolerance:
    """What an artifact must keep to, by the numbers that it computes in.

    Args:
        max_rel: Largest difference of a feature map relative to its standard deviation.
        sqnr_db: Ratio of the energies of signal and difference of a feature map, in dB.
        pixels: Share of pixels of another class.
        margin: Largest lead of the right class over the next in such a pixel, relative to the
            standard deviation of the logits.
        found: Share of the detections, weighted by score, that must be found again.
        box_px: Largest difference of a box in pixels.
        score: Largest difference of a score.
        mask: Pixels of masks that differ, as a share of those in masks.
    """

    max_rel: float = math.inf
    sqnr_db: float = -math.inf
    pixels: float = 1.0
    margin: float = math.inf
    found: float = 0.0
    box_px: float = math.inf
    score: float = math.inf
    mask: float = 1.0

    def text(self, task: str) -> str:
        """What is allowed in a task, for people."""
        if task == 'segmentation':
            return f'{self.pixels:.2%} of the pixels, with a lead of {self.margin:g} at most'
        if task == 'detection':
            return (
                f'{self.found:.0%} found again, boxes within {self.box_px:g} px, scores within '
                f'{self.score:g}, {self.mask:.1%} of the mask pixels'
            )
        if self.max_rel < math.inf:
            return f'max rel err <= {self.max_rel:g}'
        return f'SQNR >= {self.sqnr_db:g} dB'


#: Rounding to the 11 significant bits of float16 and the 8 of bfloat16 leaves about 50 and 33 dB in
#: networks as deep as these.
TOLERANCES = {
    'fp32': Tolerance(
        1e-4, pixels=1e-4, margin=1e-3, found=1.0, box_px=0.05, score=1e-3, mask=1e-3
    ),
    'fp16': Tolerance(sqnr_db=35.0, pixels=0.02, found=0.9),
    'bf16': Tolerance(sqnr_db=20.0, pixels=0.05, found=0.8),
    'int8': Tolerance(sqnr_db=15.0, pixels=0.2, found=0.5),
}


@dataclass(frozen=True)
class ParityRow:
    """How far one output of one artifact is from what is expected.

    Args:
        output: Its name, or `detections`.
        passed: Whether the tolerance is kept.
        text: The difference, for people.
        measures: The same in numbers.
    """

    output: str
    passed: bool
    text: str
    measures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Golden:
    """Inputs, and what the model makes of them.

    Args:
        inputs: By name; `image (N, 3, H, W)` float32 is one of them.
        outputs: What is expected, by name.
    """

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {**self.inputs, **self.outputs}
        with open(path, 'wb') as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote.

        Raises:
            ValueError: It is not that, or asks for more memory than `MOST_BYTES`.
        """
        _require_arrays(path)
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = dict(data)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} has no images to compare on ({error}).') from error
        inputs = {name: arrays.pop(name) for name in INPUTS if name in arrays}
        if INPUT not in inputs:
            raise ValueError(f'{path} has no images to compare on (there is no {INPUT!r}).')
        return cls(inputs, arrays)

    @property
    def resized(self) -> bool:
        """Whether classes are expected at another size than the image's."""
        size = self.inputs.get(OUT_SIZE)
        return size is not None and tuple(size) != self.inputs[INPUT].shape[2:]


def _require_arrays(path: Path) -> None:
    """Each array of the archive has as many bytes as its header says, and all fit into memory."""
    try:
        with zipfile.ZipFile(require_regular(path)) as archive:
            total = 0
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, _, dtype = read(file)
                    claimed = math.prod(shape) * dtype.itemsize
                    total += claimed
                    if claimed > entry.file_size or dtype.hasobject:
                        raise ValueError(f'{entry.filename} claims {claimed} bytes')
            if total > MOST_BYTES:
                raise ValueError(f'it unpacks to {total} bytes, and at most {MOST_BYTES} are read')
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} cannot be read as arrays: {error}.') from error


class Parity(ABC):
    """How the files of one task are compared."""

    @abstractmethod
    def golden(
        self, target: Target, trained: nn.Module, fused: nn.Module, inputs: dict[str, Tensor]
    ) -> Golden:
        """What is expected of a target for these inputs.

        Args:
            target: Over the model that is exported.
            trained: The model before fusing.
            fused: The model as it is exported.
            inputs: By name.
        """

    @abstractmethod
    def compare(
        self,
        outputs: Mapping[str, np.ndarray],
        expected: Golden,
        tolerance: Tolerance,
        metadata: Mapping[str, Any],
    ) -> list[ParityRow]:
        """Compare an artifact's outputs; one that is missing or has NaN does not pass."""


class FeatureParity(Parity):
    """Tensors, each with the network's in float64."""

    def golden(
        self, target: Target, trained: nn.Module, fused: nn.Module, inputs: dict[str, Tensor]
    ) -> Golden:
        return self.of(type(target)(trained, target.preprocess), inputs)  # type: ignore[arg-type]

    @torch.no_grad()
    def of(self, reference: BackboneTarget | ClassifierTarget, inputs: dict[str, Tensor]) -> Golden:
        """What this very network makes of the inputs in float64."""
        outputs = reference.exactly()(inputs[INPUT].double())
        named = {n: out.numpy() for n, out in zip(reference.output_names, outputs, strict=True)}
        return Golden({INPUT: inputs[INPUT].numpy()}, named)

    def compare(
        self,
        outputs: Mapping[str, np.ndarray],
        expected: Golden,
        tolerance: Tolerance,
        metadata: Mapping[str, Any],
    ) -> list[ParityRow]:
        rows = []
        for name, want in expected.outputs.items():
            got = outputs.get(name, np.empty(0))
            max_abs = max_rel = math.inf
            sqnr_db = -math.inf
            if got.shape == want.shape and np.isfinite(got).all():
                error = got.astype(np.float64) - want
                max_abs = float(np.abs(error).max())
                max_rel = max_abs / max(float(want.std()), 1e-12)
                # 300 dB is more than float64 can resolve.
                energy = float((error**2).sum()) / max(float((want**2).sum()), 1e-30)
                sqnr_db = -10 * math.log10(max(energy, 1e-30))
            passed = max_rel <= tolerance.max_rel and sqnr_db >= tolerance.sqnr_db
            measures: dict[str, Any] = {'max_abs': max_abs, 'max_rel': max_rel}
            measures |= {'sqnr_db': sqnr_db, 'shape': list(want.shape)}
            text = f'{max_rel:.1e} of its std, {sqnr_db:.0f} dB'
            rows.append(ParityRow(name, passed, text, measures))
        return rows


class ClassMapParity(Parity):
    """Classes of pixels, and how sure the model was where they differ."""

    @torch.no_grad()
    def golden(
        self, target: Target, trained: nn.Module, fused: nn.Module, inputs: dict[str, Tensor]
    ) -> Golden:
        image, size = inputs[INPUT], tuple(int(side) for side in inputs[OUT_SIZE])
        x = target.preprocess.apply(image) if target.preprocess else image
        if target.output_names == ('logits',):
            exact = _segmented(copy.deepcopy(trained).double(), x.double(), size)
            named = {name: value.numpy() for name, value in inputs.items()}
            return Golden(named, {'logits': exact.numpy()})
        logits, after = (_segmented(model, x, size) for model in (trained, fused))
        classes = _classes(trained, logits)
        top = logits.topk(min(2, logits.shape[1]), 1).values
        # A single channel stands for its class and the absence of it.
        margin = top[:, 0] - top[:, 1] if top.shape[1] > 1 else logits[:, 0].abs()
        floor = float((_classes(fused, after) != classes).float().mean())
        return Golden(
            {name: value.numpy() for name, value in inputs.items()},
            {
                'classes': classes.to(torch.int32).numpy(),
                'margin': (margin / logits.std()).half().float().numpy(),
                FLOOR: np.array([floor]),
            },
        )

    def compare(
        self,
        outputs: Mapping[str, np.ndarray],
        expected: Golden,
        tolerance: Tolerance,
        metadata: Mapping[str, Any],
    ) -> list[ParityRow]:
        if 'logits' in expected.outputs:
            return FeatureParity().compare(outputs, expected, tolerance, metadata)
        name = 'classes'
        got, want = outputs.get(name, np.empty(0)), expected.outputs[name]
        floor = float(expected.outputs[FLOOR][0])
        if got.shape != want.shape:
            text = f'shape {got.shape}, expected {want.shape}'
            return [ParityRow(name, False, text, {'pixels': 1.0})]
        other = got != want
        share, margin = float(other.mean()), float(expected.outputs['margin'][other].max(initial=0))
        passed = share <= max(tolerance.pixels, 2 * floor) and margin <= tolerance.margin
        text = f'{share:.1e} of the pixels differ (floor {floor:.1e}), lead {margin:.1e} at most'
        return [ParityRow(name, passed, text, {'pixels': share, 'margin': margin, FLOOR: floor})]


def _classes(model: Any, logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0].sigmoid() > model.decode_head.threshold).long()
    return logits.argmax(1)


def _segmented(model: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits `(N, C, *size)` by mmseg's own predict."""
    from mmseg.structures import SegDataSample

    shape = tuple(x.shape[2:])
    samples = []
    for _ in x:
        sample = SegDataSample()
        sample.set_metainfo({'img_shape': shape, 'pad_shape': shape, 'ori_shape': size})
        samples.append(sample)
    return torch.stack([s.seg_logits.data for s in model.predict(x, samples)])


@dataclass(frozen=True)
class Difference:
    """Between two sets of detections in some images.

    Args:
        images: How many have the same count and the same labels, of how many.
        box_px: Largest difference of boxes that are the same object, in pixels.
        score: The same of scores.
        mask_px: Pixels that differ in their masks.
        found: Share of the expected ones, weighted by score, that are found again.
        exchanged: How many of the expected, at the score where they end, others are found for.
    """

    same: int
    images: int
    box_px: float
    score: float
    mask_px: int
    found: float
    exchanged: int = 0


class DetectionParity(Parity):
    """Detections: counts, labels, boxes, scores, mask pixels, in the images as mm finishes them."""

    @torch.no_grad()
    def golden(
        self, target: Target, trained: nn.Module, fused: nn.Module, inputs: dict[str, Tensor]
    ) -> Golden:
        image, sizes = inputs[INPUT], inputs[IMAGE_SIZE]
        x = target.preprocess.apply(image, sizes) if target.preprocess else image
        assert isinstance(target, DetectorTarget), 'the target of this parity'
        last = target.stages or target.dense
        found, after = (
            # YOLOX has no limit of its own, and its file has one.
            [{k: v[: last.most] for k, v in each.items()} for each in _detected(model, x, sizes)]
            for model in (trained, fused)
        )
        beyond = _beyond(trained, x, sizes, last.most)
        ends = _ends(found, last.most, last.threshold)
        floor = difference(found, after, ends, END, beyond)
        outputs: dict[str, np.ndarray] = {
            'ends': ends,
            FLOOR: np.array(
                [
                    floor.same == floor.images,
                    floor.box_px,
                    floor.score,
                    floor.found,
                    floor.mask_px,
                ]
            ),
        }
        for prefix, images in (('', found), (BEYOND, beyond)):
            outputs[f'{prefix}counts'] = np.array([len(each['scores']) for each in images])
            for key in COLUMNS:
                outputs[prefix + key] = np.concatenate([each[key] for each in images])
        if 'masks' in found[0]:
            for number, each in enumerate(found):
                outputs[f'masks{number}'] = np.packbits(each['masks'], axis=None)
        return Golden({name: value.numpy() for name, value in inputs.items()}, outputs)

    def compare(
        self,
        outputs: Mapping[str, np.ndarray],
        expected: Golden,
        tolerance: Tolerance,
        metadata: Mapping[str, Any],
    ) -> list[ParityRow]:
        want = self._expected(expected)
        got = []
        for number, size in enumerate(expected.inputs[IMAGE_SIZE].astype(int)):
            own = {name: value[number] for name, value in outputs.items()}
            if not all(np.isfinite(value).all() for value in own.values()):
                return [ParityRow('detections', False, 'NaN or infinity', {'found': 0.0})]
            shape = int(size[0]), int(size[1])
            got.append(finish(own, metadata, shape, shape, (1.0, 1.0)))
        same, box_px, score, found, mask_px = expected.outputs[FLOOR]
        ends, beyond = None, None
        if 'ends' in expected.outputs:  # not in older files
            ends, beyond = expected.outputs['ends'], self._expected(expected, BEYOND)
        apart = difference(want, got, ends, max(END, 4 * score), beyond)
        inside = sum(int(each['masks'].sum()) for each in want if 'masks' in each)
        # Where fusing alone changes what is found, as at ties, a file may do so as well.
        every = apart.same == apart.images or not same or tolerance.found < 1
        passed = (
            every
            and apart.found >= min(tolerance.found, 0.9 * found if not same else 1.0)
            and apart.box_px <= max(tolerance.box_px, 4 * box_px)
            and apart.score <= max(tolerance.score, 4 * score)
            and apart.mask_px <= max(tolerance.mask * inside, 4 * mask_px)
        )
        total = sum(len(each['scores']) for each in want)
        text = (
            f'{total} detections, {apart.found:.1%} found again; boxes {apart.box_px:.1e} px, '
            f'scores {apart.score:.1e}, {apart.mask_px} mask px (floor {box_px:.1e} px, '
            f'{score:.1e})'
        )
        if apart.exchanged:
            text += f', {apart.exchanged} exchanged at the lowest score that is kept'
        measures = {
            'detections': total,
            'found': apart.found,
            'box_px': apart.box_px,
            'score': apart.score,
            'mask_px': apart.mask_px,
            'exchanged': apart.exchanged,
            'floor_box_px': float(box_px),
            'floor_score': float(score),
        }
        return [ParityRow('detections', bool(passed), text, measures)]

    @staticmethod
    def _expected(golden: Golden, prefix: str = '') -> list[dict[str, np.ndarray]]:
        arrays, start, images = golden.outputs, 0, []
        for number, count in enumerate(arrays[f'{prefix}counts']):
            own = {key: arrays[prefix + key][start : start + count] for key in COLUMNS}
            start += count
            if f'masks{number}' in arrays and not prefix:
                height, width = golden.inputs[IMAGE_SIZE][number].astype(int)
                bits = np.unpackbits(arrays[f'masks{number}'], count=count * height * width)
                own['masks'] = bits.reshape(count, height, width).astype(bool)
            images.append(own)
        return images


def difference(
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Sequence[Mapping[str, np.ndarray]],
    ends: np.ndarray | None = None,
    slack: float = 0.0,
    beyond: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> Difference:
    """Compare detections image by image; each expected one is the next in its class.

    Args:
        expected: Of each image, sorted or not.
        found: The same.
        ends: `(images,)`, the lowest score of each that is kept; candidates of it may be exchanged.
        slack: How far from that score they may be.
        beyond: What follows the expected in each image; those that are found instead are compared
            with these. Of others, one or `MOST_EXCHANGED` may be exchanged; where more were,
            as where all have one score, nothing would be proven.
    """
    total = Difference(0, len(expected), 0.0, 0.0, 0, 1.0)
    weight = lost = 0.0
    limits = [-np.inf] * len(expected) if ends is None else ends.tolist()
    for number, (want, got, limit) in enumerate(zip(expected, found, limits, strict=True)):
        count = len(want['scores'])
        every = want
        if beyond is not None:
            every = {k: np.concatenate([want[k], beyond[number][k]]) for k in COLUMNS}
        matched = _matches(every, got)
        pairs = [(i, j) for i, j in matched if i < count]
        missed = np.delete(want['scores'], [i for i, _ in pairs])
        added = np.delete(got['scores'], [j for _, j in matched])
        instead = every['scores'][[i for i, _ in matched if i >= count]]
        end = limit + slack
        at_end = max(int((missed <= end).sum()) - len(instead), int((added <= end).sum()))
        if at_end > max(1, MOST_EXCHANGED * count):
            end = -np.inf
        complete = bool(
            (missed <= end).all() and (added <= end).all() and (instead >= limit - slack).all()
        )
        weight += float(want['scores'].sum())
        lost += float(missed[missed > end].sum())
        box = max(
            (np.abs(every['boxes'][i] - got['boxes'][j]).max() for i, j in matched), default=0
        )
        score = max((abs(every['scores'][i] - got['scores'][j]) for i, j in matched), default=0)
        pixels = 0
        if 'masks' in want and 'masks' in got:
            pixels = sum(int((want['masks'][i] != got['masks'][j]).sum()) for i, j in pairs)
        total = replace(
            total,
            same=total.same + complete,
            exchanged=total.exchanged + max(int((missed <= end).sum()), int((added <= end).sum())),
            box_px=max(total.box_px, float(box)),
            score=max(total.score, float(score)),
            mask_px=total.mask_px + pixels,
        )
    return replace(total, found=1 - lost / weight if weight else 1.0)


def _beyond(model: Any, x: Tensor, sizes: Tensor, most: int) -> list[dict[str, np.ndarray]]:
    """What follows the first `most` detections in each image, without masks: as many again."""
    cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
    limit = cfg.get('max_per_img')  # YOLOX has none
    try:
        cfg.max_per_img = 2 * most
        every = _detected(model, x, sizes)
    finally:
        if limit is None:
            del cfg['max_per_img']
        else:
            cfg.max_per_img = limit
    return [{key: each[key][most : 2 * most] for key in COLUMNS} for each in every]


def _ends(found: Sequence[Mapping[str, np.ndarray]], most: int, threshold: float) -> np.ndarray:
    """`(images,)`: the lowest score that a detector keeps in each image.

    That of its last detection where there are as many as it may give, else its threshold. Rounding
    decides on which side of it candidates of this score are.
    """
    return np.array(
        [
            float(each['scores'].min()) if len(each['scores']) >= most else threshold
            for each in found
        ]
    )


def _matches(want: Mapping[str, Any], got: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Pairs of the same class whose boxes overlap by half at least, the best overlap first."""
    if not len(want['scores']) or not len(got['scores']):
        return []
    a, b = want['boxes'][:, None].astype(np.float64), got['boxes'][None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    close = np.where(union > 0, shared / np.maximum(union, 1e-9), 1.0)
    # Boxes that coincide are told apart by their scores.
    close -= np.abs(want['scores'][:, None] - got['scores'][None]) * 1e-3
    close[want['labels'][:, None] != got['labels'][None]] = 0
    pairs = []
    order = np.argsort(-close, axis=None)
    rows, columns = np.unravel_index(order[close.reshape(-1)[order] >= 0.5], close.shape)
    left, right = set(range(close.shape[0])), set(range(close.shape[1]))
    for i, j in zip(rows, columns):
        if i in left and j in right:
            pairs.append((int(i), int(j)))
            left.discard(i)
            right.discard(j)
    return pairs


def _detected(model: Any, x: Tensor, sizes: Tensor) -> list[dict[str, np.ndarray]]:
    """Detections of each image by mmdet's own predict."""
    from mmdet.structures import DetDataSample

    shape = tuple(x.shape[2:])
    samples = []
    for size in sizes:
        sample, own = DetDataSample(), tuple(int(side) for side in size)
        sample.set_metainfo(
            {
                'img_shape': own,
                'ori_shape': own,
                'pad_shape': shape,
                'batch_input_shape': shape,
                'scale_factor': (1.0, 1.0),
            }
        )
        samples.append(sample)
    results = [s.pred_instances.numpy() for s in model.predict(x, samples, rescale=True)]
    return [
        {
            'boxes': found.bboxes,
            'scores': found.scores,
            'labels': found.labels,
            **({'masks': found.masks[:, : own[0], : own[1]]} if 'masks' in found else {}),
        }
        for found, own in zip(results, sizes.int().tolist())
    ]


@torch.no_grad()
def predict_as_mm(
    model: Any, preprocess: Preprocess | None, inputs: Mapping[str, np.ndarray]
) -> Any:
    """The trained model's own predict for the inputs of a file, its normalization included."""
    image = torch.from_numpy(inputs[INPUT])
    sizes = torch.from_numpy(inputs[IMAGE_SIZE]) if IMAGE_SIZE in inputs else None
    x = preprocess.apply(image, sizes) if preprocess else image
    if sizes is not None:
        return _detected(model, x, sizes)
    if OUT_SIZE not in inputs:  # a classifier
        return model(x)
    return _segmented(model, x, tuple(int(side) for side in inputs[OUT_SIZE])).argmax(1)


#: By the task of a target.
PARITIES: dict[str, Parity] = {
    'backbone': FeatureParity(),
    'classification': FeatureParity(),
    'segmentation': ClassMapParity(),
    'detection': DetectionParity(),
}


def check_artifact(
    artifact: Artifact, goldens: Sequence[Golden], tolerance: Tolerance
) -> list[ParityRow]:
    """Run an opened artifact on every golden image and compare.

    Raises:
        ArtifactError: Its runtime fails.
    """
    parity = PARITIES[artifact.task]
    rows = []
    for item in goldens:
        if item.resized and OUT_SIZE not in artifact.input_names:
            continue
        outputs = artifact.run_named(
            {name: value for name, value in item.inputs.items() if name in artifact.input_names}
        )
        rows += parity.compare(outputs, item, tolerance, artifact.metadata)
    return rows


def other_shapes(
    shape: tuple[int, int, int, int], dynamic: str, stride: int, divisor: int = 1
) -> list[tuple[int, int, int, int]]:
    """Shapes besides the one exported at that an artifact with open dimensions must accept.

    Of heights and widths, one is odd and smaller, and one odd and larger; or next to that, what
    they must be divisible by.
    """
    batch, channels, height, width = shape
    more = batch + 2 if 'batch' in dynamic else batch
    if 'hw' in dynamic:
        larger = (height + stride - 3, width + 2 * stride + 1)
        smaller = (max(height // 2 + 1, stride + 1), max(width - stride // 2 + 5, stride + 1))
        (h, w), (i, j) = (
            [-(-side // divisor) * divisor for side in sides] for sides in (larger, smaller)
        )
        return [(more, channels, h, w), (batch, channels, i, j)]
    return [(more, channels, height, width)] if 'batch' in dynamic else []

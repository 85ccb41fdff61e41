"""int8: static post-training quantisation of an exported float32 backbone, behind gates.

Everything that can be is quantised first. Where a gate is missed, the layers that do most damage
go back to float.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..engine.errors import PACKAGE
from ..measure.environment import isa_flags
from ..runtimes import Artifact, open_artifact, unpadded
from ..runtimes.predictor import finish
from .calibration import ENOUGH_IMAGES, CalibrationImages, check_count, check_pictures
from .errors import ParityError, UsageError
from .options import GATE_DB
from .parity import difference
from .quantizers import CALIBRATORS, Quantizer, quantizer_for

#: Of the images, so many are not calibrated on but compared on.
HELD_OUT = 8
#: More than this share of the layers in float, and there is nothing left to gain from int8.
MOST_FLOAT = 0.5


@dataclass
class QuantizationReport:
    """What was quantised, and what it costs.

    Args:
        artifact: The float32 file.
        runtime: What runs both.
        images: Number of images calibrated on.
        held_out: Number of other images compared on.
        reduced_range: Whether weights use 7 of the 8 bits.
        equalized: Number of layers whose input channels were brought to one range
            before the export.
        quantized: Layers in int8.
        kept_float: Layers that would not pass a gate in int8, worst first.
        damage_db: For each layer that was tried alone, the signal-to-noise ratio of the stage
            that it disturbs most; empty where all passed at once.
        stages_db: Signal-to-noise ratio by stage, of the held-out images.
        metric: Name of the task metric and its values in float32 and int8.
    """

    artifact: str
    out: str
    runtime: str
    calibrator: str
    images: int
    held_out: int
    reduced_range: bool
    gate_db: float
    quantized: list[str] = field(default_factory=list)
    kept_float: list[str] = field(default_factory=list)
    damage_db: dict[str, float] = field(default_factory=dict)
    stages_db: dict[str, float] = field(default_factory=dict)
    equalized: int = 0
    metric: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """As it is in report.json."""
        return asdict(self)

    def __str__(self) -> str:
        stages = ', '.join(f'{name} {db:.1f}' for name, db in self.stages_db.items())
        kept = f'; in float: {", ".join(self.kept_float)}' if self.kept_float else ''
        metric = ''
        if self.metric:
            metric = '; {name} {fp32:.2f} in float32, {int8:.2f} in int8'.format(**self.metric)
        return (
            f'{len(self.quantized)} layers in int8{kept}; SQNR in dB: {stages} '
            f'(gate {self.gate_db:g}){metric}'
        )


class Metric(Protocol):
    """What an artifact is for, as a number."""

    @property
    def max_drop(self) -> float:
        """How much less than the float32 artifact's it may be."""

    def __call__(self, artifact: Path) -> tuple[str, float]:
        """Name of the metric, and its value with `artifact`."""


@dataclass(frozen=True)
class TaskMetric:
    """AP, mIoU or top-1 with an exported file in place of the config's backbone, or its model.

    Args:
        config: Config whose test data is evaluated.
        checkpoint: Where neck and head are loaded from.
        name: Which of the printed metrics; the first of AP, mIoU and top-1 when None.
        max_drop: Points that int8 may lose.
        options: Further arguments of tools/test.py.
        scope: 'backbone' or 'model': what the file replaces.
    """

    config: str
    checkpoint: str
    name: str | None = None
    max_drop: float = 1.0
    options: tuple[str, ...] = ()
    scope: str = 'backbone'

    def __call__(self, artifact: Path | None) -> tuple[str, float]:
        """Name and value, in points from 0 to 100; PyTorch's without an artifact.

        Raises:
            UsageError: The evaluation fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            arguments = [self.config, self.checkpoint, '--work-dir', folder, *self.options]
            arguments += [] if artifact is None else [f'--{self.scope}', str(artifact)]
            code = 'import sys; from repnext_mm.engine.cli import evaluate_main as main; '
            paths = [str(PACKAGE.parent), os.environ.get('PYTHONPATH', '')]
            # A process of its own: its worker threads end with it.
            done = subprocess.run(
                [sys.executable, '-c', f'{code}sys.exit(main(sys.argv[1:]))', *arguments],
                capture_output=True,
                text=True,
                env={**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in paths if path)},
            )
            files = sorted(Path(folder).glob('[0-9]*_[0-9]*/*.json'))
            if done.returncode or not files:
                lines = (done.stderr or done.stdout).strip().splitlines() or ['no output']
                raise UsageError(f'the task metric could not be measured: {lines[-1]}')
            found = json.loads(files[-1].read_text().splitlines()[-1])
        return self._choose(found)

    def _choose(self, found: Mapping[str, Any]) -> tuple[str, float]:
        common = ('coco/bbox_mAP', 'mIoU', 'accuracy/top1')
        name = self.name or next((key for key in common if key in found), None)
        if name is None or name not in found:
            raise UsageError(
                f'{self.config} does not measure {name or " or ".join(common)}; it measures '
                f'{", ".join(found)}.'
            )
        value = float(found[name])
        return name, 100 * value if 'mAP' in name and value <= 1 else value


def quantize(
    artifact: str | Path,
    out: str | Path,
    images: Sequence[np.ndarray],
    *,
    gate_db: float = GATE_DB,
    metric: Metric | None = None,
    calibrator: str = 'minmax',
    reduce_range: bool | None = None,
    keep_float: Collection[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> QuantizationReport:
    """Write an int8 form of a float32 artifact that passes its gates.

    All layers are quantised first. Where that fails a gate, each layer is quantised alone, and
    those that do most damage stay in float, as few as the gates allow.

    Args:
        artifact: A float32 `.onnx` file, or an OpenVINO model (the folder or its `.xml`).
        out: Where to: a file or folder of the same kind, which does not exist yet.
        images: `(1, 3, H, W)` float32, as the artifact requires them, see `calibration_images`.
        gate_db: Signal-to-noise ratio that every stage must keep on held-out images.
        metric: What must not drop; slow, so it is asked when the signal-to-noise ratio is met.
        calibrator: How ranges come from values: 'minmax', 'percentile', or 'entropy' (ONNX).
        reduce_range: Use 7 bits for weights, without which processors that have no VNNI
            instructions overflow; None asks the processor at hand.
        keep_float: Names of layers to leave in float from the start.
        say: Takes lines about the progress.

    Raises:
        UsageError: Too few images, noise instead of images, or an argument that is not allowed.
        DependencyError: What quantises this kind of artifact is not installed.
        ParityError: The gates cannot be passed; nothing is written.
    """
    start = time.perf_counter()
    source, target = Path(artifact), Path(out)
    if calibrator not in CALIBRATORS:
        raise UsageError(f'calibrator={calibrator!r} is not one of {", ".join(CALIBRATORS)}.')
    check_count(len(images), 'the source')
    check_pictures(images[:HELD_OUT])
    if reduce_range is None:
        reduce_range = not has_vnni()
    with open_artifact(source, trust=True) as opened:
        reference = REFERENCES[opened.task](opened, images[:HELD_OUT])
        report = QuantizationReport(
            str(source),
            str(target),
            opened.runtime,
            calibrator,
            images=len(images) - HELD_OUT,
            held_out=HELD_OUT,
            reduced_range=reduce_range,
            gate_db=gate_db,
        )
        metadata = opened.metadata
    report.equalized = metadata.get('equalized', 0)
    if report.images < ENOUGH_IMAGES:
        report.warnings.append(
            f'calibrated on {report.images} images; {ENOUGH_IMAGES} or more have ranges that '
            'hold for others'
        )
    if metadata.get('weights') == 'random':
        report.warnings.append('random weights: the int8 accuracy says nothing about trained ones')
    if isinstance(images, CalibrationImages):
        report.warnings += images.warnings()
    for text in report.warnings:
        say(f'warning: {text}')

    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.partial-') as folder:
        quantizer = quantizer_for(source, Path(folder), calibrator, reduce_range)
        unknown = sorted(set(keep_float) - set(quantizer.layers))
        if unknown:
            raise UsageError(
                f'keep_float names {", ".join(unknown)}, not among the layers that int8 is for: '
                f'{", ".join(quantizer.layers)}.'
            )
        if not set(quantizer.layers) - set(keep_float):
            raise UsageError(f'{source} has no layer left that could be put into int8.')
        say(f'Calibrating {len(quantizer.layers)} layers on {report.images} images')
        quantizer.calibrate(images[HELD_OUT:])
        _Search(quantizer, reference, report, metric, say).run(list(keep_float))
        report.seconds = round(time.perf_counter() - start, 1)
        record = {k: v for k, v in report.as_record().items() if k not in ('artifact', 'out')}
        quantizer.annotate(metadata | {'dtype': 'int8', 'quantization': record})
        os.replace(quantizer.result, target)
    say(str(report))
    return report


class _Reference:
    """Held-out images and what the float32 artifact makes of them: of a backbone, feature maps."""

    def __init__(self, artifact: Artifact, images: Sequence[np.ndarray]) -> None:
        self.images = images
        self.outputs = [self._run(artifact, image) for image in images]
        self.names = self._names(artifact)

    def _names(self, artifact: Artifact) -> Sequence[str]:
        self.signal = sum(self._energies([*each.values()]) for each in self.outputs)
        return artifact.output_names

    @staticmethod
    def _run(artifact: Artifact, image: np.ndarray) -> dict[str, np.ndarray]:
        batch = artifact.input_shape[0] or 1
        return artifact.run_named(unpadded(artifact.input_names, image.repeat(batch, axis=0)))

    def noise(self, artifact: Path, count: int | None = None) -> np.ndarray:
        """What is lost, relative to what there is, by name, in the first images."""
        total = np.zeros(len(self.names))
        with open_artifact(artifact, trust=True) as opened:
            for image, expected in zip(self.images[:count], self.outputs):
                total += self._lost(opened, image, expected)
        # NaN is as bad as it gets.
        share = len(self.images) / (count or len(self.images))
        return np.nan_to_num(total * share, nan=np.inf)

    def _lost(self, opened: Artifact, image: np.ndarray, expected: Mapping[str, Any]) -> np.ndarray:
        """Energy of the difference relative to the signal's of all images."""
        actual = self._run(opened, image)
        return self._energies([actual[n] - expected[n] for n in self.names]) / self.signal

    @staticmethod
    def _energies(stages: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([np.square(stage, dtype=np.float64).sum() for stage in stages])


class _ResultReference(_Reference):
    """The same of a complete model: pixels of another class, or detections that are not found."""

    def _names(self, artifact: Artifact) -> Sequence[str]:
        return ['results']

    def _lost(self, opened: Artifact, image: np.ndarray, expected: Mapping[str, Any]) -> np.ndarray:
        size = image.shape[2], image.shape[3]
        want, got = (
            finish({k: v[0] for k, v in outputs.items()}, opened.metadata, size, size, (1.0, 1.0))
            for outputs in (expected, self._run(opened, image))
        )
        if 'classes' in want:
            lost = float((want['classes'] != got['classes']).mean())
        else:
            lost = 1 - difference([want], [got]).found
        return np.array([lost / len(self.images)])


REFERENCES: dict[str, type[_Reference]] = {
    'backbone': _Reference,
    'classification': _Reference,
    'segmentation': _ResultReference,
    'detection': _ResultReference,
}


def _decibel(noise: np.ndarray | float) -> Any:
    return -10 * np.log10(np.maximum(noise, 1e-30))


class _Search:
    """Finds the fewest layers to keep in float."""

    def __init__(
        self,
        quantizer: Quantizer,
        reference: _Reference,
        report: QuantizationReport,
        metric: Metric | None,
        say: Callable[[str], None],
    ) -> None:
        self.quantizer, self.reference, self.report = quantizer, reference, report
        self.metric, self.say = metric, say
        self.allowed = 10 ** (-report.gate_db / 10)

    def run(self, kept: list[str]) -> None:
        """Write the result, or raise ParityError."""
        given = list(kept)
        if self._passes(kept):
            return
        alone = self._each_alone([name for name in self.quantizer.layers if name not in kept])
        order = sorted(alone, key=lambda name: -alone[name].max())
        self.report.damage_db = {name: float(_decibel(alone[name].max())) for name in order}
        most = max(1, int(MOST_FLOAT * len(self.quantizer.layers)) - len(given))
        fails, passes = 0, min(self._predicted(order, alone), most)
        while not self._passes(given + order[:passes]):
            if passes == most:
                raise ParityError(
                    f'int8 does not pass its gate with {most} of {len(self.quantizer.layers)} '
                    f'layers in float ({self.report}); the worst alone is {order[0]} '
                    f'({self.report.damage_db[order[0]]:.1f} dB). Calibrate on images like those '
                    'it will see, use another calibrator, or stay with a float dtype.'
                )
            fails, passes = passes, most
        if fails:  # the prediction was too low: the fewest are between
            while passes - fails > 1:
                middle = (fails + passes) // 2
                if self._passes(given + order[:middle]):
                    passes = middle
                else:
                    fails = middle
            if self.report.kept_float != given + order[:passes]:
                self._passes(given + order[:passes])  # as it did: this writes it again

    def _passes(self, kept: list[str]) -> bool:
        layers = [name for name in self.quantizer.layers if name not in kept]
        self.quantizer.write(layers)
        noise = self.reference.noise(self.quantizer.file)
        self.report.quantized, self.report.kept_float = layers, kept
        levels = zip(self.reference.names, _decibel(noise), strict=True)
        self.report.stages_db = {name: float(level) for name, level in levels}
        self.say(f'SQNR {min(self.report.stages_db.values()):.1f} dB, {len(kept)} layers in float')
        return bool(noise.max() <= self.allowed) and self._metric_holds()

    def _metric_holds(self) -> bool:
        if self.metric is None:
            return True
        if self.report.metric is None:
            self.say('Evaluating the float32 artifact')
            name, value = self.metric(Path(self.report.artifact))
            self.report.metric = {'name': name, 'fp32': value, 'max_drop': self.metric.max_drop}
        self.say('Evaluating the int8 artifact')
        name, value = self.metric(self.quantizer.file)
        self.report.metric['int8'] = value
        self.say(f'{name} {value:.2f}, {self.report.metric["fp32"]:.2f} in float32')
        return value >= self.report.metric['fp32'] - self.metric.max_drop

    def _each_alone(self, layers: list[str]) -> dict[str, np.ndarray]:
        self.say(f'Quantising each of {len(layers)} layers alone')
        noise = {}
        for name in layers:
            self.quantizer.write_one(name)
            noise[name] = self.reference.noise(self.quantizer.file, count=2)
        return noise

    def _predicted(self, order: list[str], alone: dict[str, np.ndarray]) -> int:
        """How many of the worst must go, if the layers' noises add up; at least one."""
        left = sum(alone.values(), np.zeros(len(self.reference.names)))
        for count, name in enumerate(order):
            if count and left.max() <= self.allowed:
                return count
            left = left - alone[name]
        return len(order)


def has_vnni() -> bool:
    """Whether the processor multiplies bytes into 32-bit sums without overflow.

    x86 without VNNI adds two products in 16 bits. Arm does not. Unknown counts as no.
    """
    return not {'avx512_vnni', 'avx_vnni', 'asimddp'}.isdisjoint(isa_flags())

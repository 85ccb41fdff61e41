"""int8: static post-training quantisation of an exported float32 backbone, behind gates.

The layers are convolutions: weights in int8 with one scale per output channel, activations in
uint8 with one scale per tensor, ranges from images. Everything else stays in float: activation
functions, shortcuts, resizes, linear attention. ONNX files are quantised by ONNX Runtime
(quantise-dequantise pairs), OpenVINO models by NNCF.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .calibration import ENOUGH_IMAGES, check_count, check_pictures
from .errors import DependencyError, ParityError, UsageError
from .runtimes import METADATA_KEY, open_artifact

#: Of the images, so many are not calibrated on but compared on.
HELD_OUT = 8
#: Signal-to-noise ratio of every stage that is asked for.
GATE_DB = 20.0
#: More than this share of the layers in float, and there is nothing left to gain from int8.
MOST_FLOAT = 0.5
CALIBRATORS = ('minmax', 'percentile', 'entropy')
PERCENTILE = 99.99
INT8_PACKAGES = {'.onnx': ('onnx', 'onnxruntime'), '.xml': ('openvino', 'nncf')}


@dataclass
class QuantizationReport:
    """What was quantised, and what it costs.

    Args:
        artifact: The float32 file.
        runtime: What runs both.
        images: Number of images calibrated on.
        held_out: Number of other images compared on.
        reduced_range: Whether weights use 7 of the 8 bits.
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
    metric: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """As it stands in report.json."""
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
    """AP or mIoU with an exported backbone in the place of the config's.

    Args:
        config: Config whose test data is evaluated.
        checkpoint: Where neck and head are loaded from.
        name: Which of the printed metrics; the first of AP and mIoU when None.
        max_drop: Points that int8 may lose.
        options: Further arguments of tools/test.py.
    """

    config: str
    checkpoint: str
    name: str | None = None
    max_drop: float = 1.0
    options: tuple[str, ...] = ()

    def __call__(self, artifact: Path) -> tuple[str, float]:
        """Name and value, in points from 0 to 100.

        Raises:
            UsageError: The evaluation fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            arguments = [self.config, self.checkpoint, '--backbone', str(artifact)]
            arguments += ['--work-dir', folder, *self.options]
            code = 'import sys; from repnext_mm.engine.cli import evaluate_main as main; '
            # A process of its own: its worker threads end with it.
            done = subprocess.run(
                [sys.executable, '-c', f'{code}sys.exit(main(sys.argv[1:]))', *arguments],
                capture_output=True,
                text=True,
            )
            files = sorted(Path(folder).glob('*/*.json'))
            if done.returncode or not files:
                lines = (done.stderr or done.stdout).strip().splitlines() or ['no output']
                raise UsageError(f'the task metric could not be measured: {lines[-1]}')
            found = json.loads(files[-1].read_text().splitlines()[-1])
        return self._choose(found)

    def _choose(self, found: Mapping[str, Any]) -> tuple[str, float]:
        common = ('coco/bbox_mAP', 'mIoU')
        name = self.name or next((key for key in common if key in found), None)
        if name not in found:
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
        images: `(1, 3, H, W)` float32, as the artifact takes them, see `calibration_images`.
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
    with open_artifact(source) as opened:
        reference = _Reference(
            opened.output_names, images[:HELD_OUT], [opened.run(i) for i in images[:HELD_OUT]]
        )
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
    if report.images < ENOUGH_IMAGES:
        report.warnings.append(
            f'calibrated on {report.images} images; {ENOUGH_IMAGES} or more give ranges that '
            'hold for others'
        )
    if metadata.get('weights') == 'random':
        report.warnings.append('random weights: the int8 accuracy says nothing about trained ones')
    for text in report.warnings:
        say(f'warning: {text}')

    with tempfile.TemporaryDirectory(dir=target.parent, prefix='.partial-') as folder:
        quantizer = _quantizer(source, Path(folder), calibrator, reduce_range)
        unknown = sorted(set(keep_float) - set(quantizer.layers))
        if unknown:
            raise UsageError(
                f'keep_float names {", ".join(unknown)}, not among the layers that int8 is for: '
                f'{", ".join(quantizer.layers)}.'
            )
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
    """Held-out images and what the float32 artifact makes of them."""

    def __init__(
        self,
        names: Sequence[str],
        images: Sequence[np.ndarray],
        outputs: Sequence[Sequence[np.ndarray]],
    ) -> None:
        self.names = names
        self.images = images
        self.outputs = outputs
        self.signal = sum(self._energies(stages) for stages in outputs)

    def noise(self, artifact: Path, count: int | None = None) -> np.ndarray:
        """Energy of the difference relative to the signal's, by stage, of the first images."""
        total = np.zeros(len(self.names))
        with open_artifact(artifact) as opened:
            for image, expected in zip(self.images[:count], self.outputs):
                actual = opened.run(image)
                total += self._energies([a - e for a, e in zip(actual, expected)])
        # NaN is as bad as it gets.
        return np.nan_to_num(total / self.signal * len(self.images) / (count or len(self.images)),
                             nan=np.inf)  # fmt: skip

    @staticmethod
    def _energies(stages: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([np.square(stage, dtype=np.float64).sum() for stage in stages])


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
        most = int(MOST_FLOAT * len(self.quantizer.layers))
        count = self._predicted(order, alone)
        while len(given) + count <= most:
            kept = given + order[:count]
            self.say(f'Keeping {len(kept)} layers in float: {", ".join(kept)}')
            if self._passes(kept):
                return
            count += max(1, count // 4)
        raise ParityError(
            f'int8 does not pass its gate with {most} of {len(self.quantizer.layers)} layers in '
            f'float ({self.report}); the worst alone is {order[0]} '
            f'({self.report.damage_db[order[0]]:.1f} dB). Calibrate on images like those it will '
            f'see, take another calibrator, or stay with a float dtype.'
        )

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
            name, value = self.metric(Path(self.report.artifact))
            self.report.metric = {'name': name, 'fp32': value, 'max_drop': self.metric.max_drop}
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


# --- one class per kind of artifact


class Quantizer(ABC):
    """What quantises layers of one artifact.

    Attributes:
        layers: Names of the layers that int8 pays for, in the graph's order.
        result: What `write` writes: a file, or a folder.
        file: What a runtime opens of it.
    """

    layers: list[str]
    result: Path
    file: Path

    @abstractmethod
    def calibrate(self, images: Sequence[np.ndarray]) -> None:
        """Look at the images."""

    @abstractmethod
    def write(self, layers: Collection[str]) -> None:
        """Write the model with these layers in int8."""

    @abstractmethod
    def write_one(self, layer: str) -> None:
        """Write the model with this layer in int8, as fast as may be."""

    @abstractmethod
    def annotate(self, metadata: Mapping[str, Any]) -> None:
        """Put metadata into what was written."""


class OnnxQuantizer(Quantizer):
    """ONNX Runtime's own quantiser.

    In ONNX Runtime convolutions over all channels gain by int8; depthwise ones, and the first,
    whose input is a float image, do not.
    """

    def __init__(self, source: Path, folder: Path, calibrator: str, reduce_range: bool) -> None:
        import onnx

        self.source, self.folder = source, folder
        self.calibrator, self.reduce_range = calibrator, reduce_range
        self.result = self.file = folder / 'int8.onnx'
        self.model = onnx.shape_inference.infer_shapes(onnx.load(source))
        graph = self.model.graph
        weights = {initializer.name: initializer.dims for initializer in graph.initializer}
        images = {value.name for value in graph.input}
        self.nodes = {
            _layer_name(node.input[1]): node.name
            for node in graph.node
            if node.op_type == 'Conv'
            and node.input[0] not in images
            and weights.get(node.input[1], [0, 1])[1] > 1  # input channels per group
        }
        self.layers = [*self.nodes]

    def calibrate(self, images: Sequence[np.ndarray]) -> None:
        from onnxruntime import quantization
        from onnxruntime.quantization.calibrate import create_calibrator

        names = {'minmax': 'MinMax', 'percentile': 'Percentile', 'entropy': 'Entropy'}
        percentile = {'percentile': PERCENTILE} if self.calibrator == 'percentile' else {}
        calibrator = create_calibrator(
            self.source,
            ['Conv'],
            augmented_model_path=str(self.folder / 'augmented.onnx'),
            calibrate_method=quantization.CalibrationMethod[names[self.calibrator]],
            extra_options=percentile,
        )
        name, batch = self.model.graph.input[0].name, _batch(self.model)

        class Reader(quantization.CalibrationDataReader):
            def __init__(self, image: np.ndarray) -> None:
                self.items = iter([{name: image.repeat(batch, axis=0)}])

            def get_next(self) -> Any:
                return next(self.items, None)

        for image in images:  # one at a time, for the values of all would not fit into memory
            calibrator.collect_data(Reader(image))
        self.ranges = calibrator.compute_data()

    def write(self, layers: Collection[str]) -> None:
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=self.reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self.ranges,
            nodes_to_quantize=[self.nodes[layer] for layer in layers],
            nodes_to_exclude=[],
            op_types_to_quantize=['Conv'],
            extra_options={},
        )
        quantizer.quantize_model()
        self.written = quantizer.model.model
        onnx.save(self.written, self.file)

    def write_one(self, layer: str) -> None:
        self.write([layer])

    def annotate(self, metadata: Mapping[str, Any]) -> None:
        import onnx

        kept = {entry.key: entry.value for entry in self.written.metadata_props}
        onnx.helper.set_model_props(self.written, kept | {METADATA_KEY: json.dumps(metadata)})
        onnx.save(self.written, self.file)


class OpenVINOQuantizer(Quantizer):
    """NNCF, the quantiser of OpenVINO.

    In OpenVINO all convolutions gain by int8: between them splits and concatenations then move a
    quarter of the bytes.
    """

    #: What NNCF would quantise besides, and what stays in float here.
    FLOAT_TYPES = ('Add', 'Multiply', 'Subtract', 'MatMul', 'Interpolate', 'ReduceMean')
    KINDS = ('Convolution', 'GroupConvolution')

    def __init__(self, source: Path, folder: Path, calibrator: str, reduce_range: bool) -> None:
        import openvino

        if calibrator == 'entropy':
            raise UsageError("calibrator='entropy' is ONNX Runtime's; NNCF has minmax, percentile.")
        self.calibrator, self.reduce_range = calibrator, reduce_range
        self.result = folder / 'int8'
        # An OpenVINO artifact is a folder, or one of the two files in it.
        xml = next(source.glob('*.xml')) if source.is_dir() else source
        self.file = self.result / xml.name
        self.model = openvino.Core().read_model(xml)
        self.nodes = {
            _layer_name(op.get_friendly_name()): op.get_friendly_name()
            for op in self.model.get_ordered_ops()
            if op.get_type_name() in self.KINDS
        }
        self.layers = [*self.nodes]
        shape = self.model.inputs[0].get_partial_shape()
        self.batch = shape[0].get_length() if shape[0].is_static else 1

    def calibrate(self, images: Sequence[np.ndarray]) -> None:
        self.images = images
        self.ranges: dict[str, tuple[float, float]] = {}

    def write(self, layers: Collection[str]) -> None:
        with _quiet():
            import nncf
            from nncf.quantization import advanced_parameters as advanced
            from nncf.quantization.range_estimator import RangeEstimatorParametersSet

            overflow = advanced.OverflowFix
            ranges = RangeEstimatorParametersSet
            model = nncf.quantize(
                self.model.clone(),
                nncf.Dataset(range(len(self.images)), self._image),
                subset_size=len(self.images),
                # Bias correction takes most of the time, and gains less than 1 dB.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=overflow.ENABLE if self.reduce_range else overflow.DISABLE,
                    disable_bias_correction=True,
                    activations_range_estimator_params={
                        'minmax': ranges.MINMAX,
                        'percentile': ranges.MEAN_QUANTILE,
                    }[self.calibrator],
                ),
                ignored_scope=nncf.IgnoredScope(
                    names=[op for layer, op in self.nodes.items() if layer not in layers],
                    types=[*self.FLOAT_TYPES],
                    validate=False,
                ),
            )
        self._save(model)

    def _image(self, index: int) -> np.ndarray:
        return self.images[index].repeat(self.batch, axis=0)

    def write_one(self, layer: str) -> None:
        from openvino import opset13 as ops

        if not self.ranges:
            self._measure_ranges()
        model = self.model.clone()
        conv = self._find(model, layer)
        low, high = self.ranges[layer]
        image = ops.fake_quantize(conv.input_value(0), low, high, low, high, levels=256)
        conv.input(0).replace_source_output(image.output(0))
        # GroupConvolution's weights have the group in front of the output channel.
        weight = conv.input_value(1).get_node().data
        apart = 2 if conv.get_type_name() == 'GroupConvolution' else 1
        limit = np.abs(weight).max(axis=tuple(range(apart, weight.ndim)), keepdims=True)
        levels = 127 if self.reduce_range else 255
        kernel = ops.fake_quantize(conv.input_value(1), -limit, limit, -limit, limit, levels)
        conv.input(1).replace_source_output(kernel.output(0))
        self._save(model)

    def _measure_ranges(self) -> None:
        """Extremes of every layer's input, of as many images as are compared on."""
        import openvino

        model = self.model.clone()
        inputs = [self._find(model, layer).input_value(0) for layer in self.layers]
        watched = openvino.Model(inputs, model.get_parameters(), 'watched')
        compiled = openvino.Core().compile_model(watched, 'CPU')
        for i in range(min(HELD_OUT, len(self.images))):
            found = compiled([self._image(i)])
            for n, layer in enumerate(self.layers):
                low, high = self.ranges.get(layer, (0.0, 0.0))
                value = found[n]
                self.ranges[layer] = min(low, float(value.min())), max(high, float(value.max()))

    def _find(self, model: Any, layer: str) -> Any:
        return next(o for o in model.get_ops() if o.get_friendly_name() == self.nodes[layer])

    def _save(self, model: Any) -> None:
        import openvino

        shutil.rmtree(self.result, ignore_errors=True)  # it may still be mapped into memory
        self.result.mkdir()
        self.written = model
        openvino.save_model(model, self.file, compress_to_fp16=False)

    def annotate(self, metadata: Mapping[str, Any]) -> None:
        self.written.set_rt_info(json.dumps(metadata), METADATA_KEY)
        self._save(self.written)


QUANTIZERS: dict[str, type[Quantizer]] = {'.onnx': OnnxQuantizer, '.xml': OpenVINOQuantizer}


def _quantizer(source: Path, folder: Path, calibrator: str, reduce_range: bool) -> Any:
    from importlib.util import find_spec

    suffix = '.xml' if source.is_dir() else source.suffix
    if suffix not in QUANTIZERS:
        raise UsageError(f'{source} cannot be quantised; int8 is for ONNX and OpenVINO artifacts.')
    missing = [name for name in INT8_PACKAGES[suffix] if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f'int8 for {suffix} needs {", ".join(missing)}, not installed here; '
            f'run: pip install {" ".join(missing)}'
        )
    return QUANTIZERS[suffix](source, folder, calibrator, reduce_range)


def _layer_name(text: str) -> str:
    """The module that a weight or an operation comes from, as far as its name tells."""
    return text.removeprefix('backbone.').removesuffix('.weight').split('/')[0]


def _batch(model: Any) -> int:
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1


def has_vnni() -> bool:
    """Whether the processor multiplies bytes into 32-bit sums without overflow.

    x86 without VNNI adds two products in 16 bits. Arm does not. Unknown counts as no.
    """
    try:
        flags = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        return False
    return not {'avx512_vnni', 'avx_vnni', 'asimddp'}.isdisjoint(flags)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and advice to itself."""
    logger = logging.getLogger('nncf')
    level = logger.level
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter('ignore')
            logger.setLevel(logging.ERROR)
            yield
    finally:
        logger.setLevel(level)

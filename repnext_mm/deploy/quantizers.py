"""What puts layers of an artifact into int8: ONNX Runtime's quantiser, and NNCF for OpenVINO.

The layers are convolutions: weights in int8 with one scale per output channel, activations in
uint8 with one scale per tensor, ranges from images. Everything else stays in float: activation
functions, shortcuts, resizes, linear attention.

One scale for all of a tensor wastes bits where channels differ in range. Where a convolution reads
what other convolutions alone write, ranges are made equal first: each channel is multiplied by a
factor in the weights before and divided by it in the weights after, which changes nothing in
float.
"""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.quiet import muffled
from ..runtimes import METADATA_KEY, unpadded
from ..runtimes.openvino import kept_signal_stack, openvino_core
from .errors import DependencyError, UsageError
from .job import AFTER_NETWORK, IN_PART

CALIBRATORS = ('minmax', 'percentile', 'entropy')
PERCENTILE = 99.99
#: OpenVINO computes in bfloat16 where the processor can, unless its options say otherwise.
FLOAT32 = {'INFERENCE_PRECISION_HINT': 'f32'}
INT8_PACKAGES = {'.onnx': ('onnx', 'onnxruntime'), '.xml': ('openvino', 'nncf')}
LARGEST_FACTOR = 1000.0  # for one channel
#: Images whose extremes of the layers' inputs are used to try layers alone.
RANGE_IMAGES = 8


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

    def __init__(self, source: Path, folder: Path, calibrator: str, reduce_range: bool) -> None:
        self.source, self.folder = source, folder
        self.calibrator, self.reduce_range = calibrator, reduce_range

    def equalize(self, images: Sequence[np.ndarray]) -> int:
        """Bring the input channels of layers to one range; returns of how many layers."""
        parts = {layer: self.parts(layer) for layer in self.convolutions()}
        movable = {layer: found for layer, found in parts.items() if any(name for name, _ in found)}
        peaks: dict[str, Any] = dict.fromkeys(movable, 0.0)
        for image in images:
            for layer, values in zip(movable, self.inputs([*movable], image), strict=True):
                peaks[layer] = np.maximum(peaks[layer], np.abs(values).max(axis=(0, 2, 3)))
        for layer, found in movable.items():
            widths = [width for _, width in found]
            free = np.repeat([name is not None for name, _ in found], widths)
            peak = peaks[layer]
            # The range of the channels that cannot be scaled, for it stays.
            target = max(float((peak if free.all() else peak[~free]).max()), 1e-6)
            factor = np.where(free, target / np.maximum(peak, target / LARGEST_FACTOR), 1.0)
            for (name, _), own in zip(found, np.split(factor, np.cumsum(widths)[:-1])):
                if name is not None:
                    self.scale(name, outputs=own)
            self.scale(layer, inputs=1 / factor)
        return len(movable)

    @abstractmethod
    def convolutions(self) -> list[str]:
        """Names of all convolutions with weights of their own, in the graph's order."""

    @abstractmethod
    def parts(self, layer: str) -> list[tuple[str | None, int]]:
        """What a convolution reads: for each run of channels which other convolution writes it,
        None where it is not a convolution or others read it too, and how many channels.
        """

    @abstractmethod
    def inputs(self, layers: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
        """What these convolutions read, `(N, C, H, W)` each."""

    @abstractmethod
    def scale(
        self, layer: str, *, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
    ) -> None:
        """Multiply the weights along input channels, or weights and bias along output channels."""

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

        super().__init__(source, folder, calibrator, reduce_range)
        self.result = self.file = folder / 'int8.onnx'
        self.model = onnx.shape_inference.infer_shapes(onnx.load(source))
        graph = self.model.graph
        self.weights = {initializer.name: initializer for initializer in graph.initializer}
        self.watched: list[str] = []
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(output.name for output in graph.output)
        self.writers = {name: node for node in graph.node for name in node.output}
        self.channels = {v.name: v.type.tensor_type.shape for v in graph.value_info}
        self.nodes = {
            _layer_name(node.input[1]): node
            for node in graph.node
            if node.op_type == 'Conv' and self.readers[node.input[1]] == 1
        }
        self.layers = [
            layer
            for layer, node in self.nodes.items()
            if node.input[0] in self.writers  # not the image
            and self.weights[node.input[1]].dims[1] > 1  # channels per group
        ]

    def convolutions(self) -> list[str]:
        return [*self.nodes]

    def parts(self, layer: str) -> list[tuple[str | None, int]]:
        source = self.nodes[layer].input[0]
        writer = self.writers.get(source)
        if writer is None or self.readers[source] > 1:
            return []
        names = writer.input if writer.op_type == 'Concat' else [source]
        found: list[tuple[str | None, int]] = []
        for name in names:
            before = self.writers.get(name)
            conv = _layer_name(before.input[1]) if before and before.op_type == 'Conv' else None
            movable = conv in self.nodes and self.readers[name] == 1
            found.append((conv if movable else None, self.channels[name].dim[1].dim_value))
        return found

    def inputs(self, layers: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
        import onnx
        import onnxruntime

        names = [self.nodes[layer].input[0] for layer in layers]
        if self.watched != names:
            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            for name in names:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
            self.watching = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=['CPUExecutionProvider']
            )
            self.watched = names
        return self.watching.run(names, self._feed(image))

    def scale(
        self, layer: str, *, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
    ) -> None:
        from onnx import numpy_helper

        self.watched = []
        node = self.nodes[layer]
        names = node.input[1:] if outputs is not None else node.input[1:2]
        for name in names:
            tensor = self.weights[name]
            value = numpy_helper.to_array(tensor)
            if outputs is not None:
                value = value * outputs.reshape(-1, *[1] * (value.ndim - 1))
            if inputs is not None:
                # Each group of a grouped convolution reads channels of its own.
                per_group = inputs.reshape(-1, value.shape[1])
                rows = np.repeat(per_group, len(value) // len(per_group), axis=0)
                value = value * rows[:, :, None, None]
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    def _feed(self, image: np.ndarray) -> dict[str, np.ndarray]:
        names = [given.name for given in self.model.graph.input]
        return unpadded(names, image.repeat(_batch(self.model), axis=0))

    def calibrate(self, images: Sequence[np.ndarray]) -> None:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.calibrate import create_calibrator

        names = {'minmax': 'MinMax', 'percentile': 'Percentile', 'entropy': 'Entropy'}
        percentile = {'percentile': PERCENTILE} if self.calibrator == 'percentile' else {}
        equalized = self.folder / 'float.onnx'
        onnx.save(self.model, equalized)
        calibrator = create_calibrator(
            equalized,
            ['Conv'],
            augmented_model_path=str(self.folder / 'augmented.onnx'),
            calibrate_method=quantization.CalibrationMethod[names[self.calibrator]],
            extra_options=percentile,
        )

        feed = self._feed

        class Reader(quantization.CalibrationDataReader):
            def __init__(self, image: np.ndarray) -> None:
                self.items = iter([feed(image)])

            def get_next(self) -> Any:
                return next(self.items, None)

        with muffled():
            for image in images:  # one at a time: the values of all would not fit into memory
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
            nodes_to_quantize=[self.nodes[layer].name for layer in layers],
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
        if calibrator == 'entropy':
            raise UsageError("calibrator='entropy' is ONNX Runtime's; NNCF has minmax, percentile.")
        super().__init__(source, folder, calibrator, reduce_range)
        self.result = folder / 'int8'
        # An OpenVINO artifact is a folder, or one of the two files in it.
        xml = next(source.glob('*.xml')) if source.is_dir() else source
        self.file = self.result / xml.name
        self.model = openvino_core().read_model(xml)
        self.nodes = {
            _layer_name(op.get_friendly_name()): op.get_friendly_name()
            for op in self.model.get_ordered_ops()
            if op.get_type_name() in self.KINDS
        }
        #: What makes boxes of the network's outputs, which needs more than 8 bits.
        names = (op.get_friendly_name() for op in self.model.get_ordered_ops())
        self.after = [name for name in names if name.split(IN_PART)[0] in AFTER_NETWORK]
        self.layers = [*self.nodes]
        self.compiled: tuple[Sequence[str], Any] = ((), None)
        shape = self.model.inputs[0].get_partial_shape()
        self.batch = shape[0].get_length() if shape[0].is_static else 1

    def convolutions(self) -> list[str]:
        return [layer for layer in self.layers if self._own_weights(layer)]

    def _own_weights(self, layer: str) -> bool:
        weight = self._find(self.model, layer).input_value(1)
        return weight.get_node().get_type_name() == 'Constant' and _readers(weight) == 1

    def parts(self, layer: str) -> list[tuple[str | None, int]]:
        source = self._find(self.model, layer).input_value(0)
        if _readers(source) > 1:
            return []
        writer = source.get_node()
        joined = writer.get_type_name() == 'Concat'
        outputs = writer.input_values() if joined else [source]
        return [
            (self._written_by(output), output.get_partial_shape()[1].get_length())
            for output in outputs
        ]

    def _written_by(self, output: Any) -> str | None:
        """The convolution whose sum with its bias this is, if no one else reads it."""
        add = output.get_node()
        if add.get_type_name() != 'Add' or _readers(output) > 1:
            return None
        conv, bias = (add.input_value(i) for i in range(2))
        layer = _layer_name(conv.get_node().get_friendly_name())
        alone = _readers(conv) == _readers(bias) == 1
        if layer not in self.nodes or bias.get_node().get_type_name() != 'Constant' or not alone:
            return None
        return layer if self._own_weights(layer) else None

    def inputs(self, layers: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
        import openvino

        if self.compiled[0] != layers:
            model = self.model.clone()
            found = [self._find(model, layer).input_value(0) for layer in layers]
            watched = openvino.Model(found, model.get_parameters(), 'watched')
            self.compiled = layers, openvino_core().compile_model(watched, 'CPU', FLOAT32)
        results = self.compiled[1](self._feed(image))
        return [results[i] for i in range(len(layers))]

    def scale(
        self, layer: str, *, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
    ) -> None:
        self.compiled = (), None
        conv = self._find(self.model, layer)
        weight = conv.input_value(1).get_node().data.copy()
        shape = weight.shape
        # GroupConvolution's weights have the group in front of the output channel.
        groups = shape[0] if conv.get_type_name() == 'GroupConvolution' else 1
        weight = weight.reshape(groups, -1, *shape[-3:])
        if inputs is not None:
            weight = weight * inputs.reshape(groups, 1, -1, 1, 1)
        if outputs is not None:
            weight = weight * outputs.reshape(groups, -1, 1, 1, 1)
            add = next(iter(conv.output(0).get_target_inputs())).get_node()
            bias = add.input_value(1).get_node().data
            _put(add, bias * outputs.reshape(1, -1, 1, 1))
        _put(conv, weight.reshape(shape))

    def calibrate(self, images: Sequence[np.ndarray]) -> None:
        self.images = images
        self.ranges: dict[str, tuple[float, float]] = {}

    def write(self, layers: Collection[str]) -> None:
        # Its list of what stays in float is long, and was chosen here.
        logging.getLogger('nncf').setLevel(logging.WARNING)
        with muffled(), kept_signal_stack():
            import nncf
            from nncf.quantization import advanced_parameters as advanced
            from nncf.quantization.range_estimator import RangeEstimatorParametersSet

            overflow = advanced.OverflowFix
            ranges = RangeEstimatorParametersSet
            model = nncf.quantize(
                self.model.clone(),
                nncf.Dataset(self.images, self._feed),
                subset_size=len(self.images),
                # Bias correction needs most of the time, and gains less than 1 dB.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=overflow.ENABLE if self.reduce_range else overflow.DISABLE,
                    disable_bias_correction=True,
                    activations_range_estimator_params={
                        'minmax': ranges.MINMAX,
                        'percentile': ranges.MEAN_QUANTILE,
                    }[self.calibrator],
                ),
                ignored_scope=nncf.IgnoredScope(
                    names=[
                        *(op for layer, op in self.nodes.items() if layer not in layers),
                        *self.after,
                    ],
                    types=[*self.FLOAT_TYPES],
                    validate=False,
                ),
            )
        self._save(model)

    def _feed(self, image: np.ndarray) -> dict[str, np.ndarray]:
        names = [given.any_name for given in self.model.inputs]
        return unpadded(names, image.repeat(self.batch, axis=0))

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
        for i in range(min(RANGE_IMAGES, len(self.images))):
            for layer, value in zip(self.layers, self.inputs(self.layers, self.images[i])):
                low, high = self.ranges.get(layer, (0.0, 0.0))
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


def _readers(output: Any) -> int:
    return len(output.get_target_inputs())


def _put(op: Any, value: np.ndarray) -> None:
    """Give a convolution other weights, or an addition another bias."""
    from openvino import opset13 as ops

    constant = ops.constant(np.ascontiguousarray(value, dtype=np.float32))
    op.input(1).replace_source_output(constant.output(0))


QUANTIZERS: dict[str, type[Quantizer]] = {'.onnx': OnnxQuantizer, '.xml': OpenVINOQuantizer}


def quantizer_for(source: Path, folder: Path, calibrator: str, reduce_range: bool) -> Quantizer:
    """What quantises the artifact `source`; it writes into `folder`.

    Raises:
        UsageError: int8 is not for this kind of artifact, or the calibrator not for its quantiser.
        DependencyError: A package is missing.
    """
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
    """The module that a weight or an operation comes from, as far as its name says."""
    return text.removeprefix('model.').removesuffix('.weight').split('/')[0]


def _batch(model: Any) -> int:
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1

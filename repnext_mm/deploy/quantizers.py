"""What puts layers of an artifact into int8: ONNX Runtime's quantiser, and NNCF for OpenVINO.

The layers are convolutions: weights in int8 with one scale per output channel, activations in
uint8 with one scale per tensor, ranges from images. Everything else stays in float: activation
functions, shortcuts, resizes, linear attention.
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
        weights = {initializer.name: initializer for initializer in graph.initializer}
        computed = {name for node in graph.node for name in node.output}
        readers = Counter(name for node in graph.node for name in node.input)
        self.nodes = {
            _layer_name(node.input[1]): node
            for node in graph.node
            if node.op_type == 'Conv' and readers[node.input[1]] == 1
        }
        self.layers = [
            layer
            for layer, node in self.nodes.items()
            if node.input[0] in computed  # not the image
            and weights[node.input[1]].dims[1] > 1  # channels per group
        ]

    def _feed(self, image: np.ndarray) -> dict[str, np.ndarray]:
        names = [given.name for given in self.model.graph.input]
        return unpadded(names, image.repeat(_batch(self.model), axis=0))

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
        shape = self.model.inputs[0].get_partial_shape()
        self.batch = shape[0].get_length() if shape[0].is_static else 1

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
        import openvino

        model = self.model.clone()
        inputs = [self._find(model, layer).input_value(0) for layer in self.layers]
        watched = openvino.Model(inputs, model.get_parameters(), 'watched')
        compiled = openvino_core().compile_model(watched, 'CPU', FLOAT32)
        for image in self.images[:RANGE_IMAGES]:
            results = compiled(self._feed(image))
            for i, layer in enumerate(self.layers):
                low, high = self.ranges.get(layer, (0.0, 0.0))
                value = results[i]
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

"""ONNX models in ONNX Runtime."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from .artifact import (
    PRECISIONS,
    Artifact,
    ArtifactError,
    check_inputs,
    import_runtime,
    read_metadata,
)


class ONNXArtifact(Artifact):
    """An ONNX model in ONNX Runtime."""

    runtime = 'onnxruntime'
    package = 'onnxruntime'

    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        ort = import_runtime(self)
        providers = list(providers or ['CPUExecutionProvider'])
        available = ort.get_available_providers()
        if unknown := [p for p in providers if p not in available]:
            raise ArtifactError(
                f'onnxruntime {ort.__version__} has no {", ".join(unknown)} here; it has '
                f'{", ".join(available)}.'
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Idle workers that spin keep the cores from PyTorch, which runs the rest of a detector.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        # Its own retry prints to stdout, with the same providers.
        self.session = ort.InferenceSession(
            self.path, options, providers=providers, enable_fallback=False
        )
        inputs = self.session.get_inputs()
        check_inputs(self, [i.name for i in inputs])
        self.input_shape = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)
        self.output_names = tuple(output.name for output in self.session.get_outputs())
        self.metadata = read_metadata(self, self.session.get_modelmeta().custom_metadata_map)
        self.input_type = {'tensor(float)': np.float32, 'tensor(float16)': np.float16}.get(
            inputs[0].type
        )
        if self.input_type is None:
            raise ArtifactError(
                f'{self.path} requires {inputs[0].type}, and images are tensor(float).'
            )
        stated = PRECISIONS.get(self.metadata.get('dtype', inputs[0].type), 'f32')
        # Its CPU kernels for x86 have no float16: it converts to float32 and back around each.
        on_x86 = providers == ['CPUExecutionProvider'] and platform.machine() in ('x86_64', 'AMD64')
        self.precision = 'f32' if stated == 'f16' and on_x86 else stated

    def infer(self, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        images, *others = inputs
        arrays = [images.astype(self.input_type, copy=False), *others]
        return self.session.run(None, dict(zip(self.input_names, arrays)))

    def close(self) -> None:
        del self.session

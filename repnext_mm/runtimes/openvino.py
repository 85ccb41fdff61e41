"""OpenVINO models on the CPU, without harm to the signals of the process.

Each core's CPU plugin sets another stack for the process's signal handlers, and puts the former one
back when it ends. Where cores end in the order in which they began, the one put back is gone by
then, and the next signal that Python handles, be it Ctrl-C or the end of a data loader's worker,
is a segmentation fault (seen with OpenVINO 2026.4.1).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .artifact import (
    METADATA_KEY,
    PRECISIONS,
    Artifact,
    ArtifactError,
    check_inputs,
    import_runtime,
    read_metadata,
)

#: Operations, each for one size of image, that a model with open sizes keeps compiled. With
#: OpenVINO's own 5000, RepNeXt-M1 grew from 160 to 386 MiB over 120 sizes, and with 200 to 221; the
#: time of an image was the same (2026.4.1, one thread).
KEPT_OPERATIONS = '200'


class OpenVINOArtifact(Artifact):
    """An OpenVINO IR on the CPU."""

    runtime = 'openvino'
    package = 'openvino'

    def load(
        self, threads: int | None, precision: str | None, providers: Sequence[str] | None
    ) -> None:
        import_runtime(self)
        precision = precision or 'f32'
        if precision not in ('f32', 'bf16', 'f16'):
            raise ArtifactError(
                f'precision={precision!r} is not allowed; OpenVINO computes in f32, bf16 or f16.'
            )
        # By default it uses bfloat16 where the CPU has it.
        options: dict[str, Any] = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': precision,
            'CPU_RUNTIME_CACHE_CAPACITY': KEPT_OPERATIONS,
        }
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        core = openvino_core()
        model = core.read_model(self.path)
        check_inputs(self, [i.any_name if i.names else str(n) for n, i in enumerate(model.inputs)])
        self.input_shape = tuple(
            None if d.is_dynamic else d.get_length() for d in model.inputs[0].partial_shape
        )
        self.output_names = tuple(
            o.any_name if o.names else f'output{n}' for n, o in enumerate(model.outputs)
        )
        self.metadata = read_metadata(
            self,
            {METADATA_KEY: model.get_rt_info(METADATA_KEY).value}
            if model.has_rt_info(METADATA_KEY)
            else {},
        )
        self.input_type = model.inputs[0].element_type.to_dtype()
        quantised = any(op.get_type_name() == 'FakeQuantize' for op in model.get_ops())
        compiled = core.compile_model(model, 'CPU', options)
        really = compiled.get_property('INFERENCE_PRECISION_HINT').to_string()
        self.precision = 'int8' if quantised else PRECISIONS.get(really, really)
        self.request = compiled.create_infer_request()

    def infer(self, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        images, *others = inputs
        arrays = [images.astype(self.input_type, copy=False), *others]
        # Copies: the next run writes into the same memory.
        return [np.array(v) for v in self.request.infer(dict(enumerate(arrays))).values()]

    def close(self) -> None:
        del self.request


@functools.cache
def openvino_core() -> Any:
    """The one core of this process; it never ends."""
    import openvino

    return openvino.Core()


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put the stack for signal handlers back, whatever others' cores did to it."""
    if sys.platform != 'linux':
        yield
        return
    sigaltstack, stack = ctypes.CDLL(None).sigaltstack, _Stack()
    sigaltstack(None, ctypes.byref(stack))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(stack), None)

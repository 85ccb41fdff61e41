"""The formats, one class each: what it needs, refuses, writes, and how its operations are counted.

Where a format can be reached from `torch.export`, all use the same exported program, so that no
two of them can differ in what they describe.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from packaging.requirements import Requirement
from torch import nn
from torch.torch_version import TorchVersion

from ..checkpoints import read_weights
from ..engine.errors import signals_wait
from ..engine.quiet import muffled
from ..runtimes import METADATA_KEY
from ..runtimes.openvino import openvino_core
from ..runtimes.predictor import digest
from ..runtimes.programs import load_program
from ..text import closest
from .errors import DependencyError, UsageError
from .job import Job, in_memory
from .targets import INPUT, Target

#: The values of `--dynamic`.
DYNAMIC: tuple[str, ...] = ('none', 'batch', 'hw', 'batch-hw')
#: Older torch writes an exported program as a Python pickle, which is never opened here.
TORCH_EXPORT = {'torch': 'torch>=2.9'}
#: In the metadata of AOTInductor packages, which torch runs on whatever they are given.
UNCHECKED = (
    'The code reads its input as contiguous float32 images of the shape that size, batch and '
    'dynamic say, and checks none of this unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the environment.'
)


class Format(ABC):
    """One format.

    Attributes:
        name: Its name in `--format`.
        suffix: What the name of an artifact ends with.
        title: One line for people.
        runtime: What runs an artifact here; None where nothing on this system can.
        dtypes: What `--dtype` may be, the default first.
        packages: What must be installed, by import name.
        int8_packages: What `--dtype int8` needs besides.
        options: Further options of this format.
        main: The file inside, for a format that is a folder.
        companions: Files of this package that are shipped beside an artifact.
        in_all: Whether `--format all` includes it.
        has_operations: Whether it can normalise images itself.
        is_code: Whether an artifact is a program, which is run for those who trust it alone.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    title: ClassVar[str]
    runtime: ClassVar[str | None]
    dtypes: ClassVar[tuple[str, ...]] = ('fp32', 'fp16', 'bf16')
    packages: ClassVar[Mapping[str, str]] = {}
    int8_packages: ClassVar[Mapping[str, str]] = {}
    options: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[str | None] = None
    companions: ClassVar[tuple[str, ...]] = ()
    in_all: ClassVar[bool] = True
    has_operations: ClassVar[bool] = True
    is_code: ClassVar[bool] = False

    @abstractmethod
    def export(self, job: Job, path: Path) -> None:
        """Write an artifact."""

    @abstractmethod
    def operations(self, path: Path) -> Counter[str]:
        """The operations in an artifact's main file, counted as the format names them."""

    def refuse_dynamic(self, dynamic: str) -> str:
        """Why open dimensions cannot be had; '' where they can."""
        return ''

    def refuse_target(self, target: Target) -> str:
        """Why this kind of target cannot be had; '' where it can."""
        return ''

    def warnings(self) -> list[str]:
        """What to be warned of before anything is written.

        Raises:
            DependencyError: A package is installed and does not work.
        """
        return []

    def missing(self, dtype: str | None = None) -> list[str]:
        """Requirements that are not installed in a version that they allow."""
        needed = {**self.packages, **(self.int8_packages if dtype == 'int8' else {})}
        return [line for module, line in needed.items() if not _installed(module, line)]

    def check_installed(self, dtype: str | None = None) -> None:
        """Raise DependencyError, with the command that fixes it, where a package is missing."""
        if missing := self.missing(dtype):
            raise DependencyError(
                f'--format {self.name} needs {", ".join(missing)}, not installed here; '
                f'run: {install_command(missing)}'
            )

    def file(self, path: Path) -> Path:
        """What a runtime is given of the artifact at `path`."""
        return path / self.main if self.main else path


class Weights(Format):
    """The fused state dict, for this package's own modules."""

    name, suffix = 'pth', '.pth'
    title = 'fused weights for this package (deploy=True)'
    runtime = 'torch'
    has_operations = False

    def export(self, job: Job, path: Path) -> None:
        content = {
            'state_dict': job.module().model.state_dict(),
            'meta': {METADATA_KEY: job.metadata_text},
        }
        with in_memory(path) as buffer:
            torch.save(content, buffer)

    def operations(self, path: Path) -> Counter[str]:
        """Modules that the weights belong to, found from their tensors."""
        kinds: Counter[str] = Counter()
        for name, tensor in read_weights(path).tensors.items():
            if name.endswith('running_mean'):
                kinds['BatchNorm2d'] += 1
            elif name.endswith('weight') and tensor.ndim == 4:
                kinds['Conv2d'] += 1
        return kinds

    def refuse_target(self, target: Target) -> str:
        return (
            ''
            if target.task == 'backbone'
            else 'of a complete model it is written where it is named: --format pth'
        )


class ExportedProgram(Format):
    """An exported program, PyTorch's neutral format."""

    name, suffix, title = 'pt2', '.pt2', 'torch.export program'
    runtime = 'torch.export'
    packages: ClassVar[Mapping[str, str]] = TORCH_EXPORT

    def export(self, job: Job, path: Path) -> None:
        with in_memory(path) as buffer:
            torch.export.save(job.program(), buffer, extra_files={METADATA_KEY: job.metadata_text})

    def operations(self, path: Path) -> Counter[str]:
        """ATen operators."""
        nodes = load_program(path).graph.nodes
        return Counter(str(node.target) for node in nodes if node.op == 'call_function')


class AOTInductor(Format):
    """A library compiled by AOTInductor for the processor at hand."""

    name, suffix = 'aoti', '.aoti.pt2'
    title = 'AOTInductor package, compiled for this machine'
    runtime = 'aotinductor'
    packages: ClassVar[Mapping[str, str]] = TORCH_EXPORT
    options = ('device',)
    is_code = True

    def export(self, job: Job, path: Path) -> None:
        from torch import _inductor

        text = json.dumps(job.metadata | {'unchecked': UNCHECKED})
        with in_memory(path) as buffer:
            _inductor.aoti_compile_and_package(
                job.program(device=job.device),
                package_path=buffer,
                inductor_configs={'aot_inductor.metadata': {METADATA_KEY: text}},
            )

    def operations(self, path: Path) -> Counter[str]:
        """Calls in the generated code: library functions and fused lowers_once."""
        with zipfile.ZipFile(path) as archive:
            sources = [name for name in archive.namelist() if name.endswith('.wrapper.cpp')]
            text = '\n'.join(archive.read(name).decode() for name in sources)
        return Counter(re.findall(r'(?:aoti_torch_c\w+?_|(?=cpp_|triton_))(\w+)\(', text))


class ONNX(Format):
    """One ONNX file with its weights inside."""

    name, suffix, title = 'onnx', '.onnx', 'ONNX, in one file'
    runtime = 'onnxruntime'
    dtypes: ClassVar[tuple[str, ...]] = ('fp32', 'fp16', 'int8')
    packages: ClassVar[Mapping[str, str]] = {
        'onnx': 'onnx>=1.18',
        'onnxscript': 'onnxscript>=0.6.2',
        'onnxruntime': 'onnxruntime>=1.22',
    }
    options = ('opset',)

    def export(self, job: Job, path: Path) -> None:
        import onnx

        model = onnx.load_from_string(job.onnx())
        entry = model.metadata_props.add()
        entry.key = METADATA_KEY
        entry.value = json.dumps(job.metadata | {'opset': job.opset})
        path.write_bytes(model.SerializeToString())

    def operations(self, path: Path) -> Counter[str]:
        import onnx

        model = onnx.load(path, load_external_data=False)
        return Counter(node.op_type for node in model.graph.node)


class OpenVINO(Format):
    """An OpenVINO IR: a folder with `model.xml` and `model.bin`."""

    name, suffix = 'openvino', '_openvino'
    title = 'OpenVINO IR, a folder with .xml and .bin'
    runtime = 'openvino'
    dtypes = ('fp32', 'fp16', 'int8')
    packages: ClassVar[Mapping[str, str]] = {'openvino': 'openvino>=2025.2'}
    int8_packages: ClassVar[Mapping[str, str]] = {'nncf': 'nncf>=2.18'}
    main = 'model.xml'

    def export(self, job: Job, path: Path) -> None:
        import openvino

        # What OpenVINO computes in is chosen when it runs; a file in fp16 is half as large.
        if job.target.translations:
            # Its frontend for programs does not know the operators of detectors; ONNX's does.
            data = job.onnx('fp32')
            with signals_wait():
                model = openvino.convert_model(BytesIO(data))
        else:
            shapes = []
            for value, dims in zip(job.example, job.open_dims()):
                shape = [-1 if i in dims else side for i, side in enumerate(value.shape)]
                shapes.append(openvino.PartialShape(shape))
            if not job.dynamic.startswith('batch'):
                shapes[0] = openvino.PartialShape(
                    [job.batch, 3, *([-1, -1] if job.dynamic == 'hw' else job.size)]
                )
            program = job.program('fp32')
            with signals_wait():
                model = openvino.convert_model(program, input=shapes)
            for given, name in zip(model.inputs, job.input_names, strict=True):
                given.get_tensor().set_names({name})
            for output, name in zip(model.outputs, job.target.output_names, strict=True):
                output.get_tensor().set_names({name})
        model.set_rt_info(job.metadata_text, METADATA_KEY)
        path.mkdir()
        openvino.save_model(model, path / 'model.xml', compress_to_fp16=job.dtype == 'fp16')

    def operations(self, path: Path) -> Counter[str]:
        """Layers, without constants."""
        kinds = (op.get_type_name() for op in openvino_core().read_model(path).get_ops())
        return Counter(kind for kind in kinds if kind != 'Constant')


class CoreML(Format):
    """A Core ML program with float32 inputs and outputs."""

    name, suffix, title = 'coreml', '.mlpackage', 'Core ML program'
    runtime = None
    dtypes = ('fp16', 'fp32')
    packages: ClassVar[Mapping[str, str]] = {'coremltools': 'coremltools>=9.0'}
    options = ('ios_target',)
    companions = ('verify_on_mac.py',)

    def refuse_dynamic(self, dynamic: str) -> str:
        if dynamic == 'none':
            return ''
        return (
            'its upsampling requires fixed sizes, and open ones cannot be verified without macOS; '
            'export one artifact per size: --size 512,800x1344'
        )

    def warnings(self) -> list[str]:
        with muffled():
            import coremltools
            from coremltools import _deps
        try:
            from coremltools.libmilstoragepython import _BlobStorageWriter  # noqa: F401
        except ImportError as error:
            raise DependencyError(
                f'coremltools {coremltools.__version__} came without its native library here, as '
                'pip installs it where there is no wheel for this Python; use Python 3.10 to 3.13 '
                'on Linux or macOS.'
            ) from error
        tested = getattr(_deps, '_TORCH_MAX_VERSION', None)
        if tested and TorchVersion(torch.__version__.split('+')[0]) > TorchVersion(tested):
            return [
                f'coremltools {coremltools.__version__} is tested by its makers up to torch '
                f'{tested}, and this is torch {torch.__version__}'
            ]
        return []

    def export(self, job: Job, path: Path) -> None:
        import coremltools as ct

        job = job.for_format(self.name)
        # Keeps linear attention in float32, as PyTorch does: in half precision its sums lose too
        # much.
        half = ct.transform.FP16ComputePrecision(op_selector=_takes_float16)
        task = job.target.task
        whole = task == 'segmentation' and job.target.output_names == ('classes',)
        pictured = whole or task == 'classification'
        names = job.target.output_names
        model = ct.convert(
            trace(job, 'fp32'),
            inputs=[
                # An image as the camera gives it, where the program normalizes it.
                ct.ImageType(name, shape=tuple(value.shape), color_layout=ct.colorlayout.BGR)
                if pictured and name == INPUT and job.target.preprocess and job.batch == 1
                else ct.TensorType(name, shape=tuple(value.shape), dtype=np.float32)
                for name, value in zip(job.input_names, job.example)
            ],
            outputs=[
                ct.TensorType(name=name, dtype=np.int32 if whole else np.float32) for name in names
            ],
            convert_to='mlprogram',
            compute_precision=half if job.dtype == 'fp16' else ct.precision.FLOAT32,
            minimum_deployment_target=ct.target[f'iOS{job.ios_target}'],
            skip_model_load=True,
            # The label of the best class, and the probability of each.
            classifier_config=ct.ClassifierConfig(_distinct(job.settings['classes']))
            if task == 'classification' and job.settings
            else None,
        )
        model.short_description = job.metadata.get('title', 'repnext_mm')
        model.version = job.metadata['version']
        model.user_defined_metadata[METADATA_KEY] = job.metadata_text
        if whole and job.settings:  # for the preview of Xcode
            colors = ['#{:02x}{:02x}{:02x}'.format(*color) for color in job.settings['palette']]
            shown = {'labels': job.settings['classes'], 'colors': colors}
            preview = 'com.apple.coreml.model.preview'
            model.user_defined_metadata[f'{preview}.type'] = 'imageSegmenter'
            model.user_defined_metadata[f'{preview}.parameters'] = json.dumps(shown)
        model.save(str(path))

    def operations(self, path: Path) -> Counter[str]:
        """Operations, without constants."""
        import coremltools

        function = coremltools.utils.load_spec(str(path)).mlProgram.functions['main']
        block = function.block_specializations[function.opset]
        return Counter(op.type for op in block.operations if op.type != 'const')


class TorchScript(Format):
    """A traced module, the bridge to tools that read nothing newer."""

    name, suffix = 'torchscript', '.torchscript'
    title = 'TorchScript, a bridge to older tools'
    runtime = 'torchscript'
    in_all = False
    is_code = True

    def export(self, job: Job, path: Path) -> None:
        job = job.for_format(self.name)
        module = torch.jit.freeze(trace(job))
        with in_memory(path) as buffer:
            torch.jit.save(module, buffer, _extra_files={METADATA_KEY: job.metadata_text})

    def operations(self, path: Path) -> Counter[str]:
        """Nodes, without constants and lists."""
        graph = torch.jit.load(path, map_location='cpu').inlined_graph
        kinds = Counter(node.kind() for node in graph.nodes())
        return Counter({kind: n for kind, n in kinds.items() if not kind.startswith('prim::')})


class Web(ONNX):
    """A page that runs the model in a browser: any server of files serves the folder."""

    name, suffix, title = 'web', '_web', 'a page that runs the model in a browser'
    dtypes: ClassVar[tuple[str, ...]] = ('fp32', 'fp16')
    main = 'model.onnx'
    in_all = False

    def export(self, job: Job, path: Path) -> None:
        path.mkdir()
        super().export(job, self.file(path))
        for file in sorted(Path(__file__).with_name('web').iterdir()):
            shutil.copyfile(file, path / file.name)
        record = {
            'path': self.main,
            'format': 'onnx',
            'sha256': digest(self.file(path)),
            'size': list(job.size),
            'batch': job.batch,
            'dynamic': job.dynamic,
            'inputs': job.input_names,
            'outputs': list(job.target.output_names),
        }
        text = json.dumps({**job.settings, 'files': [record]}, indent=1)
        (path / 'model.json').write_text(text + '\n', encoding='utf-8')

    def refuse_target(self, target: Target) -> str:
        if target.task == 'backbone':
            return 'a page shows what a complete model finds, and this is a backbone'
        if not target.finished:
            return 'a page leaves NMS to the model; use --nms graph'
        return ''


def _distinct(labels: Sequence[str]) -> list[str]:
    """Labels of which each is there once, as Core ML needs them: the further ones are numbered."""
    seen: Counter[str] = Counter()
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label if seen[label] == 1 else f'{label} ({seen[label]})')
    return found


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Weights(),
        ExportedProgram(),
        AOTInductor(),
        ONNX(),
        OpenVINO(),
        CoreML(),
        TorchScript(),
        Web(),
    )
}


def trace(job: Job, dtype: str | None = None) -> torch.jit.ScriptModule:
    """The traced module, in the dtype of the job or the one asked for."""
    with torch.no_grad(), warnings.catch_warnings():
        # That a trace holds for one size is what `refuse` is for.
        warnings.simplefilter('ignore')
        return torch.jit.trace(job.module(dtype), job.example, check_trace=False).eval()


def _takes_float16(op: Any) -> bool:
    from coremltools.converters.mil.mil.scope import ScopeSource

    from ..backbones.recnext import LinearAttention

    inside = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_TYPE, [])
    return LinearAttention.__name__ not in inside or nn.Conv2d.__name__ in inside


def batch_norms(operations: Mapping[str, int]) -> int:
    """Normalisations among operations, by any format's name for one."""
    return sum(n for name, n in operations.items() if 'batchnorm' in name.lower().replace('_', ''))


def convolutions(operations: Mapping[str, int]) -> int:
    """Convolutions among operations."""
    return sum(n for name, n in operations.items() if re.search('conv(?!ert)', name.lower()))


def _installed(module: str, requirement: str) -> bool:
    """Whether a module is there, in a version that the requirement allows."""
    try:
        if importlib.util.find_spec(module) is None:
            return False
    except ImportError:
        return False
    required = Requirement(requirement)
    try:
        version = metadata.version(required.name)
    except metadata.PackageNotFoundError:  # not by pip: its version is unknown
        return True
    return required.specifier.contains(version, prereleases=True)


def install_command(requirements: Sequence[str]) -> str:
    """What to type to get them."""
    return f'pip install {shlex.join(requirements)}'


def choose_formats(text: str) -> list[Format]:
    """The formats of a comma list; `all` means those not marked as a bridge.

    Raises:
        UsageError: A name is unknown; says which is close.
    """
    chosen: dict[str, Format] = {}
    for name in text.split(','):
        if name == 'all':
            chosen |= {row.name: row for row in FORMATS.values() if row.in_all}
        elif name in FORMATS:
            chosen[name] = FORMATS[name]
        else:
            close = closest(name.lower(), [*FORMATS, 'all'])
            hint = f' Did you mean {close!r}?' if close else ''
            raise UsageError(
                f'unknown format {name!r}.{hint} Formats: {", ".join(FORMATS)}, or all.'
            )
    return list(chosen.values())


__all__ = [
    'DYNAMIC',
    'FORMATS',
    'INPUT',
    'TORCH_EXPORT',
    'Format',
    'batch_norms',
    'choose_formats',
    'convolutions',
    'install_command',
    'trace',
]

"""The one table of formats; command line, its checks, documentation and tests all use it."""

from __future__ import annotations

import importlib.util
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ..text import closest
from . import exporters, inspection
from .errors import DependencyError, UsageError
from .exporters import Job

#: The values of `--dynamic`.
DYNAMIC: tuple[str, ...] = ('none', 'batch', 'hw')


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Args:
        name: Its name in `--format`.
        suffix: What the name of an artifact ends with.
        title: One line for people.
        export: Writes an artifact to a path.
        operations: Counts the operations in an artifact.
        runtime: What runs an artifact here; None where nothing on this system can.
        dtypes: What `--dtype` may be, the default first.
        dynamic: For each value of `--dynamic`, why it is refused; empty where it is accepted.
        packages: What must be installed, by import name.
        int8_packages: What `--dtype int8` needs besides.
        options: Further options of this format.
        main: The file inside, for a format that is a folder.
        check: Says what to be warned of before anything is written.
        companions: Files of this package that are shipped beside an artifact.
        in_all: Whether `--format all` includes it.
        has_operations: Whether it can normalise images itself.
    """

    name: str
    suffix: str
    title: str
    export: Callable[[Job, Path], None]
    operations: Callable[[Path], Counter[str]]
    runtime: str | None
    dtypes: tuple[str, ...] = ('fp32', 'fp16', 'bf16')
    dynamic: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(DYNAMIC, ''))
    packages: Mapping[str, str] = field(default_factory=dict)
    int8_packages: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    main: str | None = None
    check: Callable[[], list[str]] = list
    companions: tuple[str, ...] = ()
    in_all: bool = True
    has_operations: bool = True

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


FIXED_COREML = (
    'its upsampling requires fixed sizes, and open ones cannot be verified without macOS; export '
    'one artifact per size: --size 512,800x1344'
)
ONNX_PACKAGES = {
    'onnx': 'onnx>=1.18',
    'onnxscript': 'onnxscript>=0.6.2',
    'onnxruntime': 'onnxruntime>=1.22',
}
OPENVINO_PACKAGES = {'openvino': 'openvino>=2025.2'}
COREML_PACKAGES = {'coremltools': 'coremltools>=9.0'}
NNCF = {'nncf': 'nncf>=2.18'}
#: Older torch writes an exported program as a Python pickle, which is never opened here.
TORCH_EXPORT = {'torch': 'torch>=2.9'}

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            'pth',
            '.pth',
            'fused weights for this package (deploy=True)',
            exporters.export_pth,
            inspection.operations_pth,
            runtime='torch',
            has_operations=False,
        ),
        Format(
            'pt2',
            '.pt2',
            'torch.export program',
            exporters.export_pt2,
            inspection.operations_pt2,
            runtime='torch.export',
            packages=TORCH_EXPORT,
        ),
        Format(
            'aoti',
            '.aoti.pt2',
            'AOTInductor package, compiled for this machine',
            exporters.export_aoti,
            inspection.operations_aoti,
            runtime='aotinductor',
            packages=TORCH_EXPORT,
            options=('device',),
        ),
        Format(
            'onnx',
            '.onnx',
            'ONNX, in one file',
            exporters.export_onnx,
            inspection.operations_onnx,
            runtime='onnxruntime',
            dtypes=('fp32', 'fp16', 'int8'),
            packages=ONNX_PACKAGES,
            options=('opset',),
        ),
        Format(
            'openvino',
            '_openvino',
            'OpenVINO IR, a folder with .xml and .bin',
            exporters.export_openvino,
            inspection.operations_openvino,
            runtime='openvino',
            dtypes=('fp32', 'fp16', 'int8'),
            packages=OPENVINO_PACKAGES,
            int8_packages=NNCF,
            main='model.xml',
        ),
        Format(
            'coreml',
            '.mlpackage',
            'Core ML program',
            exporters.export_coreml,
            inspection.operations_coreml,
            runtime=None,
            dtypes=('fp16', 'fp32'),
            dynamic={'none': '', 'batch': FIXED_COREML, 'hw': FIXED_COREML},
            packages=COREML_PACKAGES,
            options=('ios_target',),
            check=exporters.check_coreml,
            companions=('verify_on_mac.py',),
        ),
        Format(
            'torchscript',
            '.torchscript',
            'TorchScript, a bridge to older tools',
            exporters.export_torchscript,
            inspection.operations_torchscript,
            runtime='torchscript',
            in_all=False,
        ),
    )
}


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

"""Opening a file in the runtime that it is made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import CheckpointError
from .artifact import Artifact, ArtifactError, reason, shown_shape
from .onnx import ONNXArtifact
from .openvino import OpenVINOArtifact

SUFFIXES = ('.onnx', '.xml', '.torchscript', '.pth', '.pt2')


def open_artifact(
    path: str | Path,
    *,
    threads: int | None = None,
    precision: str | None = None,
    providers: Sequence[str] | None = None,
    trust: bool = False,
) -> Artifact:
    """Open an exported backbone, segmentor or detector.

    ONNX, OpenVINO and fused `.pth` files are data, and so is an exported program (`.pt2`) that is
    not refused. An AOTInductor package is machine code, and a TorchScript file is a program, which
    can write files and never end: they are opened only with `trust`.

    Args:
        path: An `.onnx` file, an OpenVINO `.xml` file or the folder with it, a `.pt2` file
            (exported program or AOTInductor package), a `.torchscript` or a fused `.pth` file.
        threads: Number of threads to compute on; the runtime chooses when None. In PyTorch's
            formats it is set for the complete process.
        precision: What OpenVINO computes in: 'f32' (when None), 'bf16' or 'f16'. The other
            runtimes compute in what the file says.
        providers: ONNX Runtime's execution providers; the CPU's when None.
        trust: Open a file that is code; say so for files that you made.

    Raises:
        ArtifactError: There is no such file, it is code and not trusted, its runtime is not
            installed or refuses it, or its inputs are not those of an exported model: an image
            `(N, 3, H, W)`, then maybe `image_size` or `out_size`.
    """
    file = _find(Path(path))
    artifact = _kind(file)(file)
    if artifact.program and not trust:
        raise ArtifactError(
            f'{file} is {artifact.program}, and running it runs whatever it contains; if you made '
            'it, add --trust (in Python: trust=True).'
        )
    if precision is not None and not isinstance(artifact, OpenVINOArtifact):
        raise ArtifactError(
            f'precision={precision!r} is a setting of OpenVINO; {file} computes in what it was '
            'exported in.'
        )
    if providers is not None and not isinstance(artifact, ONNXArtifact):
        raise ArtifactError(
            f'providers={list(providers)} is a setting of ONNX Runtime, not of {file}.'
        )
    try:
        artifact.load(threads, precision, providers)
    except ArtifactError:
        raise
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except Exception as error:
        raise ArtifactError(
            f'{file} cannot be opened in {artifact.runtime}: {reason(error)}.'
        ) from error
    _check_interface(artifact)
    return artifact


def _find(path: Path) -> Path:
    """The file to open; in a folder with OpenVINO's files, the `.xml` of them."""
    if path.is_dir() and path.suffix != '.mlpackage':
        found = sorted(path.glob('*.xml'))
        if len(found) != 1:
            raise ArtifactError(f'{path} is a folder with {len(found)} .xml files; name the file.')
        return found[0]
    if not path.exists():
        raise ArtifactError(f'there is no file {path}; tools/deploy.py writes such files.')
    if not path.is_file() and path.suffix != '.mlpackage':  # a pipe would be waited for
        raise ArtifactError(f'{path} is no regular file; give a file that tools/deploy.py wrote.')
    return path


def _kind(path: Path) -> type[Artifact]:
    if path.suffix == '.onnx':
        return ONNXArtifact
    if path.suffix == '.xml':
        return OpenVINOArtifact
    if path.suffix == '.mlpackage':
        raise ArtifactError(f'{path} is a Core ML package, which runs on macOS only.')
    if path.suffix not in SUFFIXES:
        raise ArtifactError(
            f'{path} has no suffix of a format; there are {", ".join(SUFFIXES[:-1])} and '
            f'{SUFFIXES[-1]}.'
        )
    # It imports the networks and torchvision's operators, which takes a second.
    from . import torch_files

    if path.suffix == '.torchscript':
        return torch_files.TorchScriptArtifact
    if path.suffix == '.pth':
        return torch_files.FusedArtifact
    if torch_files.is_compiled(path):
        return torch_files.AOTInductorArtifact
    return torch_files.ExportedProgramArtifact


def _check_interface(artifact: Artifact) -> None:
    shape = artifact.input_shape
    if len(shape) != 4 or shape[1] not in (None, 3):
        artifact.close()
        raise ArtifactError(
            f'{artifact.path} requires {shown_shape(shape)}, and a backbone requires images '
            '(N, 3, H, W).'
        )

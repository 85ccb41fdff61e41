"""Exported files, opened by the predictor that is shipped with them.

Beside ONNX and OpenVINO, which `predict.py` runs alone, the files of PyTorch's formats.
"""

from __future__ import annotations

from pathlib import Path

from ..runtimes import open_artifact
from ..runtimes.predictor import Model, find_model


def open_model(
    path: Path, threads: int | None = None, precision: str | None = None, trust: bool = False
) -> Model:
    """An exported model by its folder, its model.json, or one of its files.

    Raises:
        PredictError: There is no such model.
        ArtifactError: Its file cannot be opened, or is code and not trusted.
    """
    file, settings = find_model(path)
    if settings['file'].get('format') in ('onnx', 'openvino'):
        return Model(path, threads, precision)
    artifact = open_artifact(file, threads=threads, precision=precision, trust=trust)
    return Model(path, run=artifact.run_named)

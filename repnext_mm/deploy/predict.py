"""What `repnext-mm predict` does: exported files on images, with the predictor that is shipped.

Beside ONNX and OpenVINO, which `predict.py` runs alone, the files of PyTorch's formats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import UserError, run_tool, sigterm_raises
from ..program import program
from ..runtimes import ArtifactError, open_artifact
from ..runtimes.predictor import Model, PredictError, add_options, find_model, predict_all


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


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm predict`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('predict'), description='Run an exported model on images.'
    )
    parser.add_argument(
        'model', type=Path, help='folder of an export, its model.json, or one of its files'
    )
    add_options(parser)
    parser.add_argument(
        '--trust', action='store_true', help='run a file that is code, which you made'
    )
    args = parser.parse_args(argv)
    code = 0

    def run() -> None:
        nonlocal code
        try:
            model = open_model(args.model, args.threads, args.precision, args.trust)
            code = predict_all(model, args.images, args.out, args.json, args.threshold)
        except (ArtifactError, PredictError) as error:
            raise UserError(str(error)) from error

    with sigterm_raises():
        return run_tool(run) or code

"""One interface to a checkpoint of a run and to an exported file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.predict import open_model
from ..engine.errors import UserError
from ..engine.inference import Result, TrainedModel
from ..runtimes import ArtifactError
from ..runtimes.predictor import PredictError
from ..runtimes.predictor import read_image as read_exported
from ..visualization.colors import apart

Image = np.ndarray | str | Path
#: Endings of checkpoints of PyTorch; other files are exported ones.
CHECKPOINTS = ('.pth', '.tar', '.ckpt')


class Predictor:
    """A model as a function of images.

        predictor = repnext_mm.Predictor('work_dirs/pets_repnext_m0/best.pth')
        found = predictor('photo.jpg')   # or an array (H, W, 3) uint8, blue first as OpenCV's

    A detector returns `boxes (n, 4)` in pixels, `scores (n,)`, `labels (n,)` and maybe `masks
    (n, H, W)`, the best first; a segmentor `classes (H, W)`; a classifier `probabilities (C,)`.

    Args:
        model: A checkpoint of mmdet, mmseg or this package, or an exported file, its folder or its
            model.json.
        config: Of a checkpoint that does not store its config.
        device: Of a checkpoint: 'cpu', 'cuda:0' ...; None takes a GPU if there is one.
        threads: Of an exported file; its runtime chooses when None.
        precision: What OpenVINO computes in: 'f32', 'bf16' or 'f16'.
        trust: Run a file that is code (TorchScript, AOTInductor), which you made.

    Attributes:
        task: 'detection', 'segmentation' or 'classification'.
        classes: Their names.
        settings: `task`, `classes` and `palette`, as drawing needs them.
        trained: The model of a checkpoint; None for an exported file.

    Raises:
        UserError: The model cannot be opened.
    """

    def __init__(
        self,
        model: str | Path,
        config: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
        trust: bool = False,
    ) -> None:
        self.trained: TrainedModel | None = None
        self._exported: Any = None
        path = Path(model)
        if path.suffix.lower() in CHECKPOINTS or (config is not None):
            for name, given in (('threads', threads), ('precision', precision)):
                if given is not None:
                    raise UserError(f'--{name} is for exported files, and {model} is a checkpoint.')
            self.trained = TrainedModel(model, config, device)
            self.task, self.classes = self.trained.task, tuple(self.trained.classes)
            self.settings: dict[str, Any] = {
                'task': self.task,
                'classes': list(self.classes),
                'palette': apart(len(self.classes)),
            }
            return
        if device not in (None, 'cpu'):
            raise UserError(f'--device {device} is for checkpoints; exported files run on the CPU.')
        try:
            self._exported = open_model(path, threads, precision, trust)
        except (ArtifactError, PredictError) as error:
            raise UserError(str(error)) from error
        self.settings = self._exported.settings
        self.task, self.classes = self.settings['task'], tuple(self._exported.classes)

    def read(self, path: str | Path) -> np.ndarray:
        """An image file as the model's test pipeline loads it, `(H, W, 3)` uint8, blue first.

        Raises:
            ValueError: It cannot be read.
        """
        return self.trained.read(path) if self.trained else read_exported(path)

    def __call__(self, image: Image) -> Result:
        """Results of one image.

        Raises:
            ValueError: It is no image, or does not fit into an exported file.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[Image]) -> list[Result]:
        """Results of several images; a checkpoint computes those of equal size together.

        Raises:
            ValueError: One is no image, or does not fit into an exported file.
        """
        arrays = [
            self.read(item) if isinstance(item, str | Path) else _checked(item) for item in images
        ]
        if self.trained is not None:
            return self.trained(arrays)
        return [self._exported(array) for array in arrays]


def _checked(array: Any) -> np.ndarray:
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 3
        or array.shape[2] != 3
        or array.dtype != np.uint8
        or not array.size
    ):
        what = f'shape {array.shape} and type {array.dtype}' if hasattr(array, 'shape') else array
        raise ValueError(f'an image of {what} was given; give (H, W, 3) uint8, blue first.')
    return array

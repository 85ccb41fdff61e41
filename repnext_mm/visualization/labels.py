"""What a classifier calls its images, beside what they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from torch.utils.data import default_collate

from ..datasets.images import read_image
from .curves import save_figure


@dataclass
class Answer:
    """An RGB `image` (H, W, 3), the label it has, the one it is given, and how surely."""

    image: np.ndarray
    truth: int
    prediction: int
    score: float


def classify(model: BaseModel, dataset: Any, indices: Iterable[int]) -> list[Answer]:
    """Run a classifier on images of a `TimmDataset`."""
    model.eval()
    answers = []
    for index in indices:
        with torch.no_grad():
            ((logits, label),) = model.test_step(default_collate([dataset[index]]))
        score, best = logits.softmax(0).max(0)
        pixels = read_image(dataset.filename(index))[..., ::-1]
        answers.append(Answer(pixels, int(label), int(best), float(score)))
    return answers


def draw_answers(
    answers: Sequence[Answer],
    classes: Sequence[str],
    out_file: str | os.PathLike,
    per_row: int = 8,
) -> Path:
    """Draw every image with its prediction; a wrong one is red and has the true class below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(-(-len(answers) // per_row), 1)
    figure = Figure(figsize=(1.5 * per_row, 1.9 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, per_row, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for axes, answer in zip(grid.flat, answers, strict=False):
        axes.imshow(answer.image)
        right = answer.prediction == answer.truth
        axes.set_title(
            f'{classes[answer.prediction]} {answer.score:.2f}'
            + ('' if right else f'\nis {classes[answer.truth]}'),
            fontsize='small',
            color='black' if right else 'firebrick',
        )
    return save_figure(figure, out_file)

"""GELU that is fast in either memory format."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .forms import TrainingLayer, is_channels_last, runs_eagerly


class GELU(nn.GELU, TrainingLayer):
    """Exact GELU, `(N, C, H, W) -> (N, C, H, W)`.

    On a CPU only contiguous tensors reach torch's fast kernel, so a channels_last map goes
    through its contiguous (N, H, W, C) view.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Layout is asked for last: of symbolic sizes the answer would become a condition.
        eager = self.train_form == 'merged' and runs_eagerly()
        if eager and x.device.type == 'cpu' and is_channels_last(x):
            return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.gelu(x)

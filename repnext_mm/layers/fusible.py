"""What a layer offers so that a network holding it can be fused."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from torch import nn

from ..reparam.plans import Exactness, Plan


class Note(Protocol):
    """Records one rewrite; raises ValueError when its exactness was not accepted."""

    def __call__(self, rule: str, exactness: Exactness = 'exact') -> None: ...


class Fusible(nn.Module):
    """A layer that can be replaced by an equivalent, cheaper one.

    The walker visits children first, so `fuse` finds them already fused.
    """

    @abstractmethod
    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        """Return the layer's form under `plan` (itself where nothing changes).

        Called in eval mode, without gradient tracking, on a copy that the caller owns;
        the layer may therefore reuse and change its own parts.
        """

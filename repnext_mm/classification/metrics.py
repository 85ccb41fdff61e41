"""Accuracy of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module(force=True)  # replaces its stand-in of `lazy`
class TopK(BaseMetric):
    """Share of the images, in percent, whose class is among the k most likely.

    With k or fewer classes, the accuracy at k is left out: it is 100.

    Args:
        topk: The values of k.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Note the rank of each image's class.

        Args:
            data_batch: Is not looked at.
            data_samples: Pairs of logits `(num_classes,)` and label.
        """
        for logits, label in data_samples:
            # A tie is no hit: constant logits know nothing. NaN ranks last.
            others = (logits >= logits[label]).sum().item()
            known = bool(logits[label] == logits[label])
            self.results.append((int(others) if known else len(logits), len(logits)))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """`top1`, `top5`, ... in percent."""
        return {
            f'top{k}': 100 * sum(rank <= k for rank, _ in results) / len(results)
            for k in self.topk
            if k < max(count for _, count in results)
        }

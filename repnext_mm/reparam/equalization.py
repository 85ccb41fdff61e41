"""Equal ranges: the channels that a convolution reads, brought to one range for int8.

In int8 all channels of a feature map share one scale, so a channel of small range keeps few of
the 256 levels. Where a convolution reads what other convolutions alone write, each channel is
multiplied by a factor in the weights before and divided by it in the weights after, which changes
nothing in float (Nagel et al., Data-Free Quantization through Weight Equalization and Bias
Correction, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

#: A node of a graph; its arguments are checked where they are read.
Node = Any

LARGEST_FACTOR = 1000.0  # for one channel
CONV = torch.ops.aten.conv2d.default
CAT = torch.ops.aten.cat.default


@torch.no_grad()
def equalize(network: nn.Module, images: Sequence[Tensor]) -> list[str]:
    """Bring the input channels of convolutions to one range, in place.

    Channels that something else writes (the identity part of a RepNeXt block), or that something
    else reads as well, cannot be scaled. They stay, and set the range.

    Args:
        network: Fused, in eval mode.
        images: `(N, 3, H, W)` each, of one shape, as the network requires them; the ranges are
            those of these images.

    Returns:
        Names of the weights that read equalized channels, in the order of computation.
    """
    graph = torch.export.export(network, (images[0],)).module()
    assert isinstance(graph, fx.GraphModule)
    parameters = dict(network.named_parameters())
    readers: dict[Node, list[tuple[Node | None, int]]] = {}
    for node in graph.graph.nodes:
        parts = _parts(node) if _has_own_weight(node) else []
        if any(writer is not None for writer, _ in parts):
            readers[node] = parts
    peaks = _Peaks(graph, [node.args[0] for node in readers])
    for image in images:
        peaks.run(image)
    for reader, parts in readers.items():
        widths = [width for _, width in parts]
        free = torch.tensor([writer is not None for writer, _ in parts])
        free = free.repeat_interleave(torch.tensor(widths))
        peak = peaks.values[reader.args[0]].cpu()
        target = max(float((peak if free.all() else peak[~free]).max()), 1e-6)
        factor = (target / peak.clamp_min(target / LARGEST_FACTOR)).where(free, torch.tensor(1.0))
        for (writer, _), own in zip(parts, factor.split(widths), strict=True):
            if writer is not None:
                for operand in writer.args[1:3]:  # weight and bias
                    if operand is not None:
                        value = parameters[operand.target]
                        value.mul_(own.to(value).view(-1, *[1] * (value.ndim - 1)))
        weight = parameters[reader.args[1].target]
        # Each group of a grouped convolution reads channels of its own.
        per_group = (1 / factor).view(-1, weight.shape[1])
        rows = per_group.repeat_interleave(len(weight) // len(per_group), dim=0)
        weight.mul_(rows[:, :, None, None].to(weight))
    return [reader.args[1].target for reader in readers]


def _has_own_weight(node: Node) -> bool:
    """Whether it is a convolution, whose weight and bias no other operation uses."""
    return node.target is CONV and all(
        operand is None or (operand.op == 'get_attr' and len(operand.users) == 1)
        for operand in node.args[1:3]
    )


def _parts(reader: Node) -> list[tuple[Node | None, int]]:
    """What a convolution reads: for each run of channels the convolution that writes it, None
    where it is none or others read it too, and how many channels.
    """
    source = reader.args[0]
    if len(source.users) > 1:
        return []
    joined = source.target is CAT and source.args[1] == 1
    return [
        (
            writer if _has_own_weight(writer) and len(writer.users) == 1 else None,
            writer.meta['val'].shape[1],
        )
        for writer in (source.args[0] if joined else [source])
    ]


class _Peaks(fx.Interpreter):
    """Runs a graph and keeps the largest absolute value per channel of some of its nodes."""

    def __init__(self, graph: fx.GraphModule, watched: Sequence[Node]) -> None:
        super().__init__(graph)
        self.values: dict[Node, Any] = {}
        self.watched = {*watched}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n in self.watched:
            peak = result.abs().amax(dim=(0, 2, 3))
            self.values[n] = torch.maximum(self.values.get(n, peak), peak)
        return result

"""Equal ranges before an export change nothing in float, and bring channels to one range."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import TINY, tiny
from torch import Tensor, nn

from repnext_mm.reparam import equalize, reparameterize


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, 3, 64, 64, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def inputs_of(network: nn.Module, name: str, image: Tensor) -> Tensor:
    """What the convolution of a weight reads, in the traced program."""
    program = torch.export.export(network, (image,)).module()
    node = next(
        n
        for n in program.graph.nodes
        if n.target is torch.ops.aten.conv2d.default and n.args[1].target == name
    )
    seen: dict[Any, Tensor] = {}

    class Kept(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Kept(program).run(image)
    return seen[node.args[0]]


@pytest.mark.parametrize('family', TINY)
def test_nothing_changes_in_float(family: str) -> None:
    network = reparameterize(tiny(family).eval(), 'full').double()
    equal = copy.deepcopy(network)
    names = equalize(equal, images())
    assert names
    before, after = (dict(n.named_parameters()) for n in (network, equal))
    assert all(not torch.equal(before[name], after[name]) for name in names)
    image = images(3)[-1]  # not one of those that ranges come from
    with torch.no_grad():
        for one, two in zip(network(image), equal(image), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10 * float(one.abs().max()))


def test_channels_get_one_range_but_for_those_passed_on() -> None:
    network = reparameterize(tiny('repnext_m').eval(), 'full').double()
    equal = copy.deepcopy(network)
    (image,) = images(1)
    name = 'stages.2.blocks.0.channel_mixer.0.weight'
    assert name in equalize(equal, [image])
    before, after = (inputs_of(n, name, image).abs().amax(dim=(0, 2, 3)) for n in (network, equal))
    passed_on = len(before) // 4
    torch.testing.assert_close(after[:passed_on], before[:passed_on])
    target = before[:passed_on].max().expand(len(before) - passed_on)
    torch.testing.assert_close(after[passed_on:], target)


class Readers(nn.Module):
    """Convolutions whose channels cannot be scaled: others read them, or share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)  # the sum reads what `second` reads
        return self.last(self.shared(self.shared(x)).relu())


def test_channels_that_others_read_stay() -> None:
    network = Readers().double().eval()
    before = copy.deepcopy(network.state_dict())
    assert equalize(network, images()) == []
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_groups_read_channels_of_their_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2, bias=False)).double()
    equal = copy.deepcopy(network)
    assert equalize(equal, images()) == ['1.weight']
    image = images()[0]
    with torch.no_grad():
        torch.testing.assert_close(equal(image), network(image), rtol=1e-9, atol=1e-12)
        peaks = equal[0](torch.cat(images())).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(peaks, peaks.max().expand(8))

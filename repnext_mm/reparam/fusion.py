"""Fusing networks: what a layer offers, the walk over all layers, and complete models.

A layer that is `Fusible` returns its cheaper equivalent under a plan, and notes each rewrite.
"""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..complexity import count_parameters
from ..network import (
    PLANS,
    Exactness,
    FusionReport,
    Network,
    Plan,
    Rewrite,
    check_plan,
    networks_in,
)

M = TypeVar('M', bound=nn.Module)

#: What is not exact in a rewrite that is not.
INEXACT: dict[str, str] = {
    'border': 'the bias of the first strip of an 11x11 pair reaches less far on the top and '
    'bottom 5 rows than the merged kernel assumes',
}


class Note(Protocol):
    """Records one rewrite; raises ValueError when it is not exact and that was not accepted."""

    def __call__(self, rule: str, exactness: Exactness = 'exact') -> None: ...


class Fusible(nn.Module):
    """A layer that can be replaced by an equivalent, cheaper one.

    The walk visits children first, so `fuse` finds them already fused.
    """

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        """Return the layer's form under `plan` (itself where nothing changes).

        Called in eval mode, without gradient tracking, on a copy that the caller owns;
        the layer may therefore reuse and change its own parts.
        """
        raise NotImplementedError(f'{type(self).__name__} must define fuse().')


def reparameterize(model: M, plan: Plan = 'full', *, accept_inexact: bool = False) -> M:
    """Return a fused deep copy of a backbone, or of a detector or segmentor with backbones.

    The copy computes the same function up to rounding, on the same device, in the same dtype
    and memory format; `model` itself is untouched. Fusing a fused model again under the same
    plan returns an equal copy; under a plan that merges more, it merges the rest. What was done
    is in each fused backbone's `fusion_report`.

    Args:
        model: Contains at least one of this package's backbones; must be in eval mode.
        plan: 'upstream' (what the published `fuse()` does), 'full' (no norm left) or 'single'
            (one depthwise convolution per token mixer).
        accept_inexact: Allow a rewrite that is not exact. 'single' needs it for trained RepNeXt
            weights: the top and bottom five rows then differ.

    Raises:
        TypeError: `model` contains none of this package's backbones, or `accept_inexact` is not a
            bool.
        ValueError: Wrong plan, `model` in training mode or already fused further than `plan`,
            or an inexact rewrite that was not accepted.
    """
    plan = check_plan(plan)
    if not isinstance(accept_inexact, bool):
        raise TypeError(f'accept_inexact={accept_inexact!r} must be True or False.')
    networks = networks_in(model, Network, 'fuse')
    watched: list[nn.Module] = [model, *networks]
    if any(m.training for m in watched):
        raise ValueError(
            'the model is in training mode, where batch statistics decide the outputs; '
            'call model.eval() before fusing it.'
        )
    for network in networks:
        if network.plan is not None and PLANS.index(network.plan) > PLANS.index(plan):
            raise ValueError(
                f'the backbone is already fused with plan={network.plan!r}, which cannot be '
                f'undone to plan={plan!r}; fuse the training form instead.'
            )
    fused = copy.deepcopy(model)
    for network in networks_in(fused, Network, 'fuse'):
        fuse(network, plan, accept_inexact)
    return fused


@torch.no_grad()
def fuse(network: Network, plan: Plan, accept_inexact: bool = False) -> FusionReport:
    """Fuse `network` in place; its state is undefined if this raises (see `reparameterize`)."""
    report = FusionReport(plan, params_before=count_parameters(network))
    for name, child in list(network.named_children()):
        setattr(network, name, _fuse(child, name, report, accept_inexact))
    report.params_after = count_parameters(network)
    report.norms_left = [n for n, m in network.named_modules() if isinstance(m, _BatchNorm)]
    network.on_fused(report)
    return report


def _fuse(module: nn.Module, name: str, report: FusionReport, accept: bool) -> nn.Module:
    for child_name, child in list(module.named_children()):
        fused = _fuse(child, f'{name}.{child_name}', report, accept)
        if fused is not child:
            module.register_module(child_name, fused)
    if not isinstance(module, Fusible):
        return module

    def note(rule: str, exactness: Exactness = 'exact') -> None:
        if exactness != 'exact' and not accept:
            raise ValueError(
                f'plan={report.plan!r} is not exact at {name}: {INEXACT[exactness]}. Use '
                'plan="full", or accept the difference with accept_inexact=True.'
            )
        report.rewrites.append(Rewrite(name, rule, exactness))

    return module.fuse(report.plan, note)

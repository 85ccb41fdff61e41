"""Fusing a backbone, alone or inside a detector or segmentor."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..complexity import count_parameters
from .plans import INEXACT, PLANS, Exactness, Plan, check_plan

if TYPE_CHECKING:
    from ..backbones.pyramid import PyramidBackbone

M = TypeVar('M', bound=nn.Module)


@dataclass(frozen=True)
class Rewrite:
    """One replacement: where, by which rule, and how exact it is."""

    module: str
    rule: str
    exactness: Exactness


@dataclass
class FusionReport:
    """What fusing one backbone did."""

    plan: Plan
    params_before: int
    params_after: int = 0
    rewrites: list[Rewrite] = field(default_factory=list)
    norms_left: list[str] = field(default_factory=list)

    @property
    def inexact(self) -> list[Rewrite]:
        return [r for r in self.rewrites if r.exactness != 'exact']

    def __str__(self) -> str:
        rules: dict[tuple[str, str], int] = {}
        for r in self.rewrites:
            rules[r.rule, r.exactness] = rules.get((r.rule, r.exactness), 0) + 1
        lines = [
            f'plan {self.plan}: {self.params_before:,} -> {self.params_after:,} parameters, '
            f'{len(self.norms_left)} norms left'
        ]
        lines += [f'  {count:3d} x {rule} ({how})' for (rule, how), count in rules.items()]
        return '\n'.join(lines)


def reparameterize(model: M, plan: Plan = 'exact', *, accept_inexact: Collection[str] = ()) -> M:
    """Return a fused deep copy of a backbone, or of a detector or segmentor holding backbones.

    The copy computes the same function up to rounding, on the same device, in the same dtype
    and memory format; `model` itself is untouched. Fusing a fused model again under the same
    plan returns an equal copy; under a plan that merges more, it merges the rest. What was done
    is in each fused backbone's `fusion_report`.

    Args:
        model: Has at least one of this package's backbones; must be in eval mode.
        plan: 'branches' (what the published `fuse()` does), 'exact' (no norm left) or 'single'
            (one depthwise convolution per token mixer).
        accept_inexact: Names of inexact rewrites to allow. 'single' needs 'border' for trained
            RepNeXt weights: the top and bottom five rows then differ.

    Raises:
        TypeError: `model` holds none of this package's backbones.
        ValueError: Wrong plan, `model` in training mode or already fused further than `plan`,
            or an inexact rewrite that was not accepted by name.
    """
    from ..backbones.pyramid import PyramidBackbone

    plan = check_plan(plan)
    unknown = sorted(set(accept_inexact) - set(INEXACT))
    if unknown:
        raise ValueError(f'accept_inexact={unknown} is unknown; allowed: {", ".join(INEXACT)}.')
    backbones = [m for m in model.modules() if isinstance(m, PyramidBackbone)]
    if not backbones:
        raise TypeError(
            f'{type(model).__name__} holds no backbone of repnext_mm, so there is nothing to fuse.'
        )
    watched: list[nn.Module] = [model, *backbones]
    if any(m.training for m in watched):
        raise ValueError(
            'the model is in training mode, where batch statistics decide the outputs; '
            'call model.eval() before fusing it.'
        )
    for backbone in backbones:
        if backbone.plan is not None and PLANS.index(backbone.plan) > PLANS.index(plan):
            raise ValueError(
                f'the backbone is already fused with plan={backbone.plan!r}, which cannot be '
                f'undone to plan={plan!r}; fuse the training form instead.'
            )
    fused = copy.deepcopy(model)
    for module in fused.modules():
        if isinstance(module, PyramidBackbone):
            fuse_backbone(module, plan, accept_inexact)
    return fused


@torch.no_grad()
def fuse_backbone(
    backbone: PyramidBackbone, plan: Plan, accept_inexact: Collection[str] = ()
) -> FusionReport:
    """Fuse `backbone` in place; its state is undefined if this raises (see `reparameterize`)."""
    from ..layers.forms import configure

    report = FusionReport(plan, params_before=count_parameters(backbone))
    for name, child in list(backbone.named_children()):
        setattr(backbone, name, _fuse(child, name, plan, report, accept_inexact))
    report.params_after = count_parameters(backbone)
    report.norms_left = [n for n, m in backbone.named_modules() if isinstance(m, _BatchNorm)]
    # 'branches' stands for the published fused model, so it computes as that does.
    backbone.train_form = 'branches' if plan == 'branches' else 'merged'
    configure(backbone, train_form=backbone.train_form)
    backbone.plan = plan
    backbone.fusion_report = report
    backbone.train(backbone.training)  # freezes what replaced frozen parameters
    return report


def _fuse(
    module: nn.Module, name: str, plan: Plan, report: FusionReport, accept: Collection[str]
) -> nn.Module:
    from ..layers.fusible import Fusible

    for child_name, child in list(module.named_children()):
        fused = _fuse(child, f'{name}.{child_name}', plan, report, accept)
        if fused is not child:
            module.register_module(child_name, fused)
    if not isinstance(module, Fusible):
        return module

    def note(rule: str, exactness: Exactness = 'exact') -> None:
        if exactness != 'exact' and exactness not in accept:
            raise ValueError(
                f'plan={plan!r} is not exact at {name}: {INEXACT[exactness]}. Use plan="exact", or '
                f'accept the difference with accept_inexact=({exactness!r},).'
            )
        report.rewrites.append(Rewrite(name, rule, exactness))

    return module.fuse(plan, note)

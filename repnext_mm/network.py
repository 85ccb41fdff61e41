"""What fusing, measuring and loading weights ask of a network: its table of variants and its form.

A network is in its training form, or fused under one of the plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import nn

Plan = Literal['upstream', 'full', 'single']
Exactness = Literal['exact', 'border']

#: How far a network is merged; each plan contains the rewrites of the ones before it.
#: - upstream: parallel kernels merged, each Conv + BatchNorm pair folded, as the published
#:   `fuse()` does. Norms between the token and the channel mixer stay.
#: - full: no BatchNorm left anywhere; the form whose parameter counts are published.
#: - single: one depthwise convolution per token mixer.
PLANS: tuple[Plan, ...] = get_args(Plan)


def check_plan(plan: str) -> Plan:
    """Return `plan` if it is one, else raise ValueError with those that are."""
    if plan not in PLANS:
        raise ValueError(f'plan={plan!r} is not a fusion plan; choose one of {", ".join(PLANS)}.')
    return plan


def deploy_plan(deploy: bool | str) -> Plan | None:
    """The plan that a backbone's `deploy` argument asks for; None for the training form."""
    if deploy is False or deploy is None:
        return None
    return 'full' if deploy is True else check_plan(deploy)


@dataclass(frozen=True)
class Rewrite:
    """One replacement: where, by which rule, and how exact it is."""

    module: str
    rule: str
    exactness: Exactness


@dataclass
class FusionReport:
    """What fusing one network did."""

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


class Network(nn.Module):
    """Base of what can be fused and loaded by name: a family of variants, in one of their forms.

    A subclass is built by `Family(arch, norm_cfg=..., deploy=...)`.
    """

    #: Settings of every variant by name.
    arch_zoo: ClassVar[dict[str, dict[str, Any]]]

    #: Name of a row of `arch_zoo`, or 'custom'.
    arch: str
    #: The complete row, from which the same network can be built again.
    settings: dict[str, Any]
    norm_cfg: dict[str, Any]
    #: None is the training form.
    plan: Plan | None = None
    fusion_report: FusionReport | None = None

    def on_fused(self, report: FusionReport) -> None:
        """Note that this network was fused; a family adds what its new layers need."""
        self.plan = report.plan
        self.fusion_report = report

    def twin(self, plan: Plan | None) -> Network:
        """The same network in another form, with weights of its own."""
        options: dict[str, Any] = dict(norm_cfg=self.norm_cfg, deploy=plan or False)
        return type(self)(self.settings, **options)

    def describe(self) -> str:
        """The call that builds this network."""
        return describe(type(self), self.arch if self.arch in self.arch_zoo else None, self.plan)


def describe(family: type[Network], arch: str | None, plan: Plan | None) -> str:
    """The call that builds a network; `arch` None means one given as a dict."""
    arch_text = 'arch=dict(...)' if arch is None else f'arch={arch!r}'
    deploy = '' if plan is None else f', deploy={True if plan == "full" else plan!r}'
    return f'{family.__name__}({arch_text}{deploy})'


N = TypeVar('N', bound=Network)


def networks_in(model: nn.Module, kind: type[N], purpose: str) -> list[N]:
    """The networks of this `kind` that are in `model`, itself included.

    Raises:
        TypeError: There are none, so that there is nothing to `purpose`.
    """
    networks = [module for module in model.modules() if isinstance(module, kind)]
    if not networks:
        raise TypeError(
            f'{type(model).__name__} holds no backbone of repnext_mm, so there is nothing to '
            f'{purpose}.'
        )
    return networks


def family_of(network: Network) -> type[Network]:
    """The family whose table of variants a network has."""
    return next(cls for cls in type(network).__mro__ if 'arch_zoo' in vars(cls))


def families() -> Iterator[type[Network]]:
    """The families of this package, and of whoever builds on it."""
    for registered in Network.__subclasses__():
        # One that is registered, but not imported yet (see `lazy`).
        if hasattr(registered, 'import_class'):
            registered.import_class()
    yield from _subclasses(Network)


def _subclasses(base: type[Network]) -> Iterator[type[Network]]:
    for family in base.__subclasses__():
        # One that takes over the table of another is that family with heads.
        if 'arch_zoo' in vars(family):
            yield family
        yield from _subclasses(family)

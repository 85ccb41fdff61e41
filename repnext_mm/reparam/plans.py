"""The fusion plans: how far a network is merged."""

from __future__ import annotations

from typing import Literal, get_args

Plan = Literal['branches', 'exact', 'single']
Exactness = Literal['exact', 'border']

#: Each plan contains the rewrites of the ones before it.
#: - branches: parallel kernels merged, each Conv + BatchNorm pair folded; what the published
#:   `fuse()` does. Norms between the token and the channel mixer stay.
#: - exact: no BatchNorm left anywhere; the form whose parameter counts are published.
#: - single: one depthwise convolution per token mixer.
PLANS: tuple[Plan, ...] = get_args(Plan)

#: Kinds of inexactness a user can accept by name, with what they mean.
INEXACT: dict[str, str] = {
    'border': 'the bias of the first strip of an 11x11 pair reaches less far on the top and '
    'bottom 5 rows than the merged kernel assumes',
}


def check_plan(plan: str) -> Plan:
    """Return `plan` if it is one, else raise ValueError naming those that are."""
    if plan not in PLANS:
        raise ValueError(f'plan={plan!r} is not a fusion plan; choose one of {", ".join(PLANS)}.')
    return plan


def deploy_plan(deploy: bool | str) -> Plan | None:
    """The plan that a backbone's `deploy` argument asks for; None for the training form."""
    if deploy is False or deploy is None:
        return None
    return 'exact' if deploy is True else check_plan(deploy)

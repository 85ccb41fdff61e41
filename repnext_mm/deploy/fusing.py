"""The model of a source in the form that is exported."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..network import Network, Plan
from ..reparam import reparameterize
from ..reparam.convolution_norms import fold_convolution_norms
from ..reparam.verify import noise
from .errors import ModelError
from .source import Source, network_in


def fused_model(source: Source, plan: Plan) -> Any:
    """The model of a source as it is exported: no norm left that is known to follow a convolution.

    Raises:
        ModelError: It is fused further already.
    """
    own = any(isinstance(module, Network) for module in source.model.modules())
    try:
        # Whoever asks for a plan by its name has chosen it.
        model = (
            reparameterize(source.model, plan, accept_inexact=True)
            if own
            else copy.deepcopy(source.model)
        )
    except ValueError as error:
        raise ModelError(f'{error} Or pass --plan {source.plan}.') from error
    if source.scope == 'model' and plan != 'upstream':
        fold_convolution_norms(model)
        if not own:  # ours is proven by `prove`
            _prove_folded(source.model, model)
    return model


@torch.no_grad()
def _prove_folded(trained: Any, folded: Any) -> None:
    """See that the norms of a backbone that is not ours were folded where they belong."""
    image = noise((1, 3, 128, 160), 0).double()
    exact, other = (copy.deepcopy(m).double().extract_feat(image) for m in (trained, folded))
    for one, two in zip(exact, other):
        if not torch.allclose(one, two, rtol=1e-6, atol=1e-6 * float(one.std())):
            raise ModelError(
                f'the norms of {type(network_in(trained)).__name__} follow other layers than their '
                'names say, and cannot be folded; add --plan upstream to keep them.'
            )


def inexact_kinds(model: nn.Module) -> set[str]:
    """What is not exact in the fusion of a model."""
    reports = [module.fusion_report for module in model.modules() if isinstance(module, Network)]
    return {rewrite.exactness for report in reports if report for rewrite in report.inexact}

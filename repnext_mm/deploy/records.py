"""What report.json says of a model and of how it was fused."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones.classifier import Classifier
from ..classification import TimmClassifier
from ..complexity import count_macs, count_parameters
from ..network import Network, Plan
from ..reparam import prove, reparameterize
from .prepare import Prepared
from .report import ModelRecord, PlanRecord, Record


def model_record(prepared: Prepared) -> ModelRecord:
    """What is exported, with the size and cost of its fused form."""
    source, size = prepared.source, prepared.sizes[0]
    fused = next(iter(prepared.fused.values()))
    counted: Any = _Features(fused) if prepared.complete else fused
    if isinstance(fused, TimmClassifier):  # its heads are of a fixed cost
        counted = fused.network
    return ModelRecord(
        name=source.name,
        task=prepared.target.task,
        scope=source.scope,
        family=source.family,
        arch=source.arch,
        config=source.config,
        checkpoint=source.checkpoint,
        checkpoint_sha256=source.checkpoint_sha256,
        container=source.container,
        weights_source=source.weights,
        seed=prepared.options.seed,
        params=count_parameters(fused),
        macs=count_macs(counted, size),
        size=list(size),
        details=prepared.target.description(),
    )


def plan_record(prepared: Prepared, plan: Plan) -> PlanRecord:
    """What fusing did, and how far the fused network is off in float64."""
    source, fused = prepared.source, prepared.fused[plan]
    own = [module for module in source.model.modules() if isinstance(module, Network)]
    proof: list[Record] = []
    if own:
        # Fused in float64, so that the difference is the rewrites' own and no rounding of
        # weights.
        exact = copy.deepcopy(own[0]).double()
        fused_exact = reparameterize(exact, plan, accept_inexact=True)
        stages = prove(exact, fused_exact, prepared.sizes[0])
        proof = [
            {'output': output, 'max_abs': stage.max_abs, 'max_rel': stage.max_rel}
            for output, stage in zip(_outputs(own[0]), stages, strict=True)
        ]
    reports = [m.fusion_report for m in fused.modules() if isinstance(m, Network)]
    return PlanRecord(
        name=plan,
        steps=[asdict(step) for report in reports if report for step in report.rewrites],
        proof_float64=proof,
        bn_left=count_norms(fused),
        convs_before=_count_convolutions(source.model),
        convs_after=_count_convolutions(fused),
    )


def count_norms(model: nn.Module) -> int:
    """Batch norms that a model contains."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def _count_convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def _outputs(network: Any) -> list[str]:
    """Names of what a network returns."""
    if isinstance(network, Classifier):
        return ['logits']
    return [f'stage{i}' for i in network.out_indices]


class _Features(nn.Module):
    """Backbone and neck of a complete model, whose operations are counted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model.extract_feat(image)

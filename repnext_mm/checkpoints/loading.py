"""Loading a checkpoint into a backbone: all checks first, then all tensors, then one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from mmengine.logging import print_log
from torch import Tensor

from ..network import PLANS, Network, Plan, family_of
from ..reparam import reparameterize
from .errors import CheckpointError
from .fetching import fetch
from .matching import Match, find_fit, match_keys
from .published import Published, find_published, names_for
from .reading import Weights, read_weights


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from where; `str(report)` is the line that is logged."""

    source: str
    model: str
    weights: str
    match: Match
    #: The file's form, where it was fused on the way into the model.
    fused_from: str = ''
    #: Loaded tensors that hold NaN or infinity.
    non_finite: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.match.missing or self.match.unexpected or self.match.reshaped)

    def __str__(self) -> str:
        match = self.match
        parts = [
            f'{len(match.matched)} matched',
            _counted('missing', match.missing),
            _counted('unexpected', match.unexpected),
        ]
        if match.reshaped:
            parts.append(_counted('of another shape', match.reshaped))
        text = f'{self.model} <- {self.source} ({self.weights}): {", ".join(parts)}'
        if match.ignored:
            groups = ', '.join(f'{group} {count}' for group, count in match.ignored.items())
            text += f'; ignored: {groups}'
        if match.prefix:
            text += f'; prefix {match.prefix!r}'
        return text + self.fused_from


def load_pretrained(
    model: Network,
    checkpoint: str | os.PathLike[str] | Weights,
    *,
    prefix: str | None = None,
    allow_partial: bool = False,
    container: str | None = None,
) -> LoadReport:
    """Load a checkpoint into a backbone and log one line about it.

    A fused model (`deploy`) accepts a file fused under the same plan, and also a training
    checkpoint or one fused less far, which is fused while loading. A training model accepts
    training checkpoints only: fusing cannot be undone.

    Args:
        model: The backbone; unchanged if anything fails.
        checkpoint: Published name, URL or path; or weights that were read already.
        prefix: Where the backbone's keys begin in the file, such as 'backbone.'; found by itself
            when None.
        allow_partial: Load what matches, however little it is.
        container: The key of a torch checkpoint to load from, such as 'model_ema'; None for the
            weights that its training evaluates. The line says which it was.

    Raises:
        CheckpointError: No such checkpoint, it cannot be read safely, or, unless
            `allow_partial`, less than 99 % of the keys of model and file match.
        TypeError: `model` is not a backbone of this package.
    """
    if not isinstance(model, Network):
        raise TypeError(
            f'{type(model).__name__} is not a backbone of repnext_mm; pass the backbone itself, '
            'such as detector.backbone.'
        )
    if isinstance(checkpoint, Weights):
        source, weights = checkpoint.label, checkpoint
    else:
        source = str(checkpoint)
        published = find_published(source)
        if published and not allow_partial:
            _check_published(model, published)
        weights = read_weights(fetch(checkpoint), container=container)
    plan, match = _choose_form(model, weights, prefix, allow_partial)
    tensors = {name: weights.tensors[match.prefix + name] for name in match.matched}
    _check_tensors(tensors, source)
    state = tensors if plan == model.plan else _fuse_state(model, plan, tensors)
    model.load_state_dict(state, strict=False)

    report = LoadReport(
        source=source,
        model=model.describe(),
        weights=str(weights),
        match=match,
        fused_from='' if plan == model.plan else f'; {_form(plan)}, fused on loading',
        non_finite=[name for name, t in tensors.items() if not torch.isfinite(t).all()],
    )
    print_log(str(report), 'current', logging.INFO if report.complete else logging.WARNING)
    if report.non_finite:
        print_log(
            f'{source} has NaN or infinity in {_counted("tensors", report.non_finite)}: '
            'the model will not compute sensible outputs.',
            'current',
            logging.WARNING,
        )
    return report


def _choose_form(
    model: Network, weights: Weights, prefix: str | None, allow_partial: bool
) -> tuple[Plan | None, Match]:
    """The form of the file, of those that the model accepts, and the match in that form."""
    file = {key: tensor.shape for key, tensor in weights.tensors.items()}
    forms: list[Plan | None] = [model.plan]
    if model.plan is not None:
        forms += [None, *PLANS[: PLANS.index(model.plan)]]
    own: Match | None = None
    for form in forms:
        if form == model.plan:
            shapes: Mapping = {k: t.shape for k, t in model.state_dict().items()}
        else:
            with torch.device('meta'):
                shapes = {k: t.shape for k, t in model.twin(form).state_dict().items()}
        match = match_keys(file, shapes, prefix)
        own = own or match
        if match.fits:
            return form, match
    assert own is not None
    if allow_partial and own.matched:
        return model.plan, own

    fit = find_fit(file, prefix, like=model)
    text = (
        f'{weights.label} does not fit {model.describe()}: {len(own.matched)} of {own.total} '
        f'keys match ({own.ratio:.0%})'
    )
    if fit is None:
        counts = [
            _counted('missing', own.missing),
            _counted('unexpected', own.unexpected),
            _counted('of another shape', own.reshaped),
        ]
        text += (
            f', {", ".join(counts)}, and no network of this package fits better; '
            'allow_partial=True loads what matches.'
        )
    elif fit.plan is not None and model.plan is None:
        text += (
            f'; it is fused, which cannot be undone: build {fit} for it, or load the training '
            'checkpoint.'
        )
    else:
        text += f'; it fits {fit}.'
    raise CheckpointError(text)


def _check_published(model: Network, published: Published) -> None:
    """Refuse a published file that cannot fit, before it is downloaded."""
    family = family_of(model).__name__
    wrong_arch = (family, model.arch) != (published.family, published.arch)
    fused = published.plan is not None and model.plan is None
    if model.arch in model.arch_zoo and (wrong_arch or fused):
        deploy = f', deploy={published.plan!r}' if fused else ''
        rivals = names_for(family, model.arch, fused=model.plan is not None)
        instead = f'; for {model.describe()} there are {", ".join(rivals)}' if rivals else ''
        raise CheckpointError(
            f'{published.name!r} holds {published.family}(arch={published.arch!r}{deploy}), which '
            f'does not fit {model.describe()}{instead}.'
        )


def _check_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        counter = name.endswith('.num_batches_tracked')
        if tensor.layout != torch.strided or not (counter or tensor.is_floating_point()):
            raise CheckpointError(
                f'{source} holds {name} as {tensor.layout}, {tensor.dtype}, which is not a plain '
                'floating-point weight; load the file from before it was quantised.'
            )


def _fuse_state(
    model: Network, plan: Plan | None, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of `model`'s form from one of the same network in an earlier form."""
    twin = model.twin(plan)
    twin.load_state_dict(tensors, strict=False)
    assert model.plan is not None, 'training files only are loaded into a training model'
    # Whoever built the model with this plan has accepted that it is not exact.
    return reparameterize(twin.eval(), model.plan, accept_inexact=True).state_dict()


def _form(plan: Plan | None) -> str:
    return 'training form' if plan is None else f'fused with plan {plan!r}'


def _counted(what: str, names: list[str], shown: int = 3) -> str:
    """'2 missing (a, b)', with at most a few names."""
    if not names:
        return f'0 {what}'
    more = ', ...' if len(names) > shown else ''
    return f'{len(names)} {what} ({", ".join(names[:shown])}{more})'

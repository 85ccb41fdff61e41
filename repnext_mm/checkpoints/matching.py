"""Comparing the keys of a file with those of networks, by names and shapes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..network import PLANS, Network, Plan, describe, families, family_of
from .errors import CheckpointError

#: A file fits a network when at least this share of the keys of both together match.
THRESHOLD = 0.99

#: What an ImageNet classifier holds besides the backbone.
CLASSIFIER_KEYS = ('head.', 'head_dist.')

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Match:
    """How the keys of a file relate to those of a network.

    Names are the network's, without the file's `prefix`.
    """

    prefix: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    #: Tensors left out on purpose (classifier, neck, heads), by the first part of their names.
    ignored: dict[str, int]

    @property
    def total(self) -> int:
        """Keys of the network and of the file's backbone together.

        The file's count too: every key of M3 is in M4 with an equal shape, so that an M4 file
        would fill an M3 completely.
        """
        return sum(map(len, (self.matched, self.missing, self.unexpected, self.reshaped)))

    @property
    def ratio(self) -> float:
        return len(self.matched) / self.total if self.total else 0.0

    @property
    def fits(self) -> bool:
        return self.ratio >= THRESHOLD


@dataclass(frozen=True)
class Fit:
    """A network that a file fits."""

    family: type[Network]
    arch: str | None
    plan: Plan | None
    match: Match

    def __str__(self) -> str:
        return describe(self.family, self.arch, self.plan)


def match_keys(file: Shapes, network: Shapes, prefix: str | None = None) -> Match:
    """Match a file's keys with a network's.

    Args:
        file: Shapes in the file.
        network: Shapes in the network.
        prefix: Where the backbone's keys begin in the file; found by itself when None.

    Raises:
        CheckpointError: Nothing in the file begins with `prefix`, or without one given, two
            places in the file match equally well.
    """
    if prefix is None:
        matches = [_match_below(p, file, network) for p in _prefixes(file, network) or ['']]
        best = max(matches, key=lambda m: m.ratio)
        rivals = [m.prefix for m in matches if m.ratio == best.ratio > 0]
        if len(rivals) > 1:
            raise CheckpointError(
                f'the file holds {len(rivals)} backbones that match equally well, under '
                f'{" and ".join(map(repr, rivals))}; choose one with prefix=...'
            )
        return best
    prefix = f'{prefix}.' if prefix and not prefix.endswith('.') else prefix
    if not any(key.startswith(prefix) for key in file):
        found = ', '.join(dict.fromkeys(repr(key.split('.')[0]) for key in file))
        raise CheckpointError(f'no key in the file begins with prefix={prefix!r}; keys: {found}.')
    return _match_below(prefix, file, network)


def _prefixes(file: Shapes, network: Shapes) -> list[str]:
    """Prefixes under which the file has any of the network's names."""
    counts: Counter[str] = Counter()
    for key in file:
        parts = key.split('.')
        for i in range(len(parts)):
            if '.'.join(parts[i:]) in network:
                counts['.'.join([*parts[:i], ''])] += 1
    return list(counts)


def _match_below(prefix: str, file: Shapes, network: Shapes) -> Match:
    outer = prefix.rstrip('.').rpartition('.')[0]
    ignored: Counter[str] = Counter()
    inside: dict[str, torch.Size] = {}
    for key, shape in file.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            ignored[key.removeprefix(f'{outer}.' if outer else '').split('.')[0]] += 1
        elif name not in network and name.startswith(CLASSIFIER_KEYS):
            ignored[name.split('.')[0]] += 1
        else:
            inside[name] = shape
    common = [name for name in network if name in inside]
    return Match(
        prefix,
        matched=[name for name in common if inside[name] == network[name]],
        # A counter that no inference uses; files of some tools leave it out.
        missing=[
            name
            for name in network
            if name not in inside and not name.endswith('.num_batches_tracked')
        ],
        unexpected=[name for name in inside if name not in network],
        reshaped=[name for name in common if inside[name] != network[name]],
        ignored=dict(ignored),
    )


def network_shapes(family: type[Network], arch: str | dict[str, Any], plan: Plan | None) -> Shapes:
    """Names and shapes of a network's state; no memory is used for it."""
    with torch.device('meta'):
        network = family(arch, deploy=plan or False)
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def find_fit(file: Shapes, prefix: str | None = None, like: Network | None = None) -> Fit | None:
    """The network that a file fits, if there is one; `like` and its family are tried first."""
    stems = {k: s for k, s in file.items() if re.search(r'(^|\.)stem\.', k)}
    # A training form has norms in its stem, and no fused form has any there.
    trained = any(key.endswith('.running_mean') for key in stems)
    plans: tuple[Plan | None, ...] = (None,) if trained else PLANS
    # The stem's last convolution has the width of the first stage, which spares most variants.
    width = max((shape[0] for shape in stems.values() if len(shape) == 4), default=0)

    def forms() -> Iterator[tuple[type[Network], str | None, Plan | None, Shapes]]:
        if like is not None and like.arch not in like.arch_zoo:
            for plan in plans:
                yield type(like), None, plan, network_shapes(type(like), like.settings, plan)
        own = like and family_of(like)
        for family in sorted(families(), key=lambda family: family is not own):
            for arch, row in family.arch_zoo.items():
                if row['channels'][0] == width:
                    for plan in plans:
                        yield family, arch, plan, network_shapes(family, arch, plan)

    best: Fit | None = None
    for family, arch, plan, shapes in forms():
        match = match_keys(file, shapes, prefix)
        if match.fits and (best is None or match.ratio > best.match.ratio):
            best = Fit(family, arch, plan, match)
            if match.ratio == 1:
                break
    return best

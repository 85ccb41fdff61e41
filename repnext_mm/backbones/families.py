"""All networks by name, such as repnext_m4, recnext_a4 or inception_next_tiny."""

from __future__ import annotations

from typing import Any

from ..text import closest
from .base import PyramidBackbone
from .inception_next import InceptionNeXt
from .recnext import RecNeXt
from .repnext import RepNeXt

#: The families by the first part of their networks' names.
FAMILIES: dict[str, type[PyramidBackbone]] = {
    'repnext': RepNeXt,
    'recnext': RecNeXt,
    'inception_next': InceptionNeXt,
}


def names() -> dict[str, tuple[type[PyramidBackbone], str]]:
    """Every network by name: its family and its arch."""
    return {
        f'{prefix}_{arch}': (family, arch)
        for prefix, family in FAMILIES.items()
        for arch in family.arch_zoo
    }


def look_up(name: str) -> tuple[type[PyramidBackbone], str]:
    """Family and arch of the network with this name.

    Raises:
        ValueError: There is none.
    """
    known = names()
    if name in known:
        return known[name]
    close = closest(name, known)
    hint = f'Did you mean {close!r}?' if close else f'Choose one of {", ".join(known)}.'
    raise ValueError(f'{name!r} is no network of this package. {hint}')


def build(name: str, **options: Any) -> PyramidBackbone:
    """The network with this name; `options` are those of `PyramidBackbone`.

    Raises:
        ValueError: There is none of this name, or an option is not allowed.
    """
    family, arch = look_up(name)
    return family(arch, **options)

"""Whether timm, with what is registered in it, has a network of some name."""

from __future__ import annotations

import timm

from ..text import closest

#: Names that timm resolves elsewhere than in its registry.
ELSEWHERE = ('hf-hub:', 'hf_hub:', 'local-dir:')


def require_timm_name(name: str) -> None:
    """Refuse a name, with or without a tag, that `timm.create_model` does not know.

    Raises:
        ValueError: The message has the closest name.
    """
    bare = name.partition('.')[0]
    if timm.is_model(bare) or name.startswith(ELSEWHERE):
        return
    close = closest(bare, {known: known for known in timm.list_models()})
    hint = f'did you mean {close}?' if close else 'timm.list_models() lists those it has.'
    raise ValueError(f'timm has no model {name!r}; {hint}')

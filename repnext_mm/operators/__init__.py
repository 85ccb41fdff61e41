"""mmcv's operators by torchvision and torch, for an mmcv without its compiled module `mmcv._ext`.

`activate()`, which `import repnext_mm` calls, offers them to mmcv; a compiled module that is
installed comes first. They are imported only then, or by their names: `repnext_mm.operators.nms`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .finder import activate

if TYPE_CHECKING:
    from .installation import Operators, describe, explain

__all__ = ['Operators', 'activate', 'describe', 'explain']


def __getattr__(name: str) -> Any:
    """What is imported only when asked for: the three names above, and the operators."""
    if name in __all__:
        return getattr(importlib.import_module(f'{__name__}.installation'), name)
    if not name.startswith('_'):
        operators = importlib.import_module(f'{__name__}.ext').OPERATORS
        if name in operators:
            return operators[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

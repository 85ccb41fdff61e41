"""How `import mmcv._ext` comes to our operators where nothing else offers any.

Every `import repnext_mm` runs this, so that it imports little itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from .names import EXT


class _Finder:
    """The last to be asked for a module, so that a compiled one always comes first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == EXT:
            return ModuleSpec(name, self, origin='repnext_mm.operators')  # type: ignore[arg-type]
        if name.startswith('mmcv.'):
            from .installation import Mmcv

            mmcv = Mmcv.find()
            # A submodule that mmcv lacks is no business of ours, unless mmcv was half removed.
            if mmcv and mmcv.missing_parts():
                raise ImportError(mmcv.damage(), name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # a plain module

    def exec_module(self, module: ModuleType) -> None:
        """Fill `mmcv._ext`.

        Raises:
            ImportError: mmcv or torchvision is badly installed; one sentence with the fix.
        """
        from .installation import Mmcv

        mmcv = Mmcv.find()
        problem = mmcv and (mmcv.damage() or mmcv.foreign())
        if problem:
            raise ImportError(problem, name=EXT)
        ext = importlib.import_module('repnext_mm.operators.ext')
        vars(module).update({name: getattr(ext, name) for name in ext.__all__})


def activate() -> None:
    """Offer our operators to mmcv, from its first `import mmcv._ext` on. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

"""Makes installed modules as good as not installed, for Pythons that a test starts."""

from __future__ import annotations

from pathlib import Path

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
"""


def block(folder: Path, *modules: str) -> None:
    """Every Python that starts with `folder` on its PYTHONPATH fails to import `modules`."""
    (folder / 'sitecustomize.py').write_text(BLOCKER.format(blocked=modules))

"""Packages of two folders, and configs where mm's tools look for them; setup.cfg has the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Also copies `configs/` and `model-index.yml` into `repnext_mm/.mim`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has them
            return
        target = Path(self.build_lib, 'repnext_mm', '.mim')
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        shutil.copytree(
            ROOT / 'configs', target / 'configs', ignore=shutil.ignore_patterns('__pycache__')
        )
        shutil.copy(ROOT / 'model-index.yml', target)


setup(
    packages=[*find_packages(include=['repnext_mm*']), 'repnext_mm_cli'],
    package_dir={'repnext_mm_cli': 'tools/repnext_mm_cli'},
    cmdclass={'build_py': BuildWithConfigs},
)

"""What is installed as mmcv: found without importing it, and said in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from .names import EXT

LITE = 'mmcv-lite==2.1.0'
#: Distributions that install the package mmcv.
DISTRIBUTIONS = ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv')
#: The two ways to mmcv's own operators.
TO_COMPILED = (
    'uninstall mmcv-lite and either build mmcv with a C++ compiler (`MMCV_WITH_OPS=1 pip install '
    '--no-build-isolation --no-binary mmcv mmcv==2.1.0`), or use torch 2.1 and a wheel that '
    'OpenMMLab built for it (`pip install mmcv==2.1.0 -f '
    'https://download.openmmlab.com/mmcv/dist/cu121/torch2.1/index.html`)'
)
#: The content of the `_ext.py` that `repnext-mm operators --install` writes.
ONE_LINE = 'from repnext_mm.operators.ext import *  # by `repnext-mm operators --install`\n'
_COMPILED_SUFFIXES = ('.so', '.pyd', '.dylib')
# Parts that an uninstalled mmcv has lost, and an installed one cannot do without.
_PARTS = ('__init__.py', 'version.py', 'ops/__init__.py')


@dataclass(frozen=True)
class Operators:
    """The operators that `mmcv.ops` uses.

    Attributes:
        kind: `compiled` are mmcv's own, `torchvision` are ours, and with `none` mmcv.ops does not
            import.
        text: They and their versions, or '' for `none`.
        problem: What to fix, as one sentence, or ''.
        advice: What works and could be tidier, as one sentence, or ''.
    """

    kind: Literal['compiled', 'torchvision', 'none']
    text: str = ''
    problem: str = ''
    advice: str = ''

    def __str__(self) -> str:
        return ' '.join(filter(None, (self.text, self.problem, self.advice)))


@dataclass(frozen=True)
class Mmcv:
    """An installed mmcv, which may be damaged."""

    folder: Path
    version: str
    distributions: tuple[str, ...]

    @classmethod
    def find(cls) -> Mmcv | None:
        """The mmcv that `import mmcv` would import, or None."""
        spec = importlib.util.find_spec('mmcv')
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
        names, version = [], ''
        for name in DISTRIBUTIONS:
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            # One of an outer environment is hidden by this one.
            if Path(str(distribution.locate_file('mmcv'))).resolve() == folder.resolve():
                names.append(name)
                version = distribution.version
        return cls(folder, _version_in(folder) or version or 'of unknown version', tuple(names))

    def __str__(self) -> str:
        return f'{self.distributions[0] if self.distributions else "mmcv"} {self.version}'

    @property
    def ext(self) -> Path:
        return self.folder / '_ext.py'

    def compiled(self) -> list[Path]:
        """Files of compiled operators, of whichever Python and platform."""
        return sorted(
            path for path in self.folder.glob('_ext*') if path.suffix in _COMPILED_SUFFIXES
        )

    def foreign(self) -> str:
        """The sentence for compiled operators that this Python does not even find, or ''."""
        compiled = self.compiled()
        if not compiled:
            return ''
        return self.unloadable(f'{compiled[0].name} is of another Python or platform')

    def missing_parts(self) -> list[str]:
        """Files that an installed mmcv has and this one lacks."""
        return [part for part in _PARTS if not (self.folder / part).is_file()]

    def damage(self) -> str:
        """Why mmcv.ops cannot be used at all, as one sentence with the fix, or ''."""
        missing = self.missing_parts()
        if missing:
            return (
                f'mmcv in {self.folder} was removed or installed only in part ({", ".join(missing)}'
                f' missing): `pip uninstall -y {" ".join(DISTRIBUTIONS)}`, delete that folder, and '
                f'`pip install {LITE}`.'
            )
        if self.version.startswith(('0.', '1.')):
            return (
                f'{self} is installed, and mmdet 3 and mmseg 1 need mmcv 2: '
                f'`pip uninstall -y {" ".join(self.distributions)}` and `pip install {LITE}`.'
            )
        if len(self.distributions) > 1:
            return (
                f'{" and ".join(self.distributions)} are both installed as mmcv in {self.folder}, '
                'each over files of the other: '
                f'`pip uninstall -y {" ".join(self.distributions)}`, and install one of them, such '
                f'as `pip install {LITE}`.'
            )
        return ''

    def unloadable(self, reason: str) -> str:
        """The sentence for compiled operators that do not load; they are never replaced."""
        names = ' '.join(self.distributions) or 'mmcv'
        return (
            f"mmcv's compiled operators do not load ({reason}): build them again for the installed "
            'Python and torch (`pip install --force-reinstall --no-deps --no-cache-dir '
            f'--no-build-isolation --no-binary :all: {names}=={self.version}` with MMCV_WITH_OPS=1 '
            'in the environment), or use those of torchvision '
            f'(`pip uninstall -y {names}` and `pip install {LITE}`).'
        )


def _version_in(folder: Path) -> str | None:
    """The version that mmcv's files state, which may be computed when they are imported."""
    try:
        text = (folder / 'version.py').read_text(encoding='utf-8')
    except OSError:
        return None
    found = re.search(r'^__version__\s*=\s*[\'"]([^\'"]+)', text, re.MULTILINE)
    return found and found[1]


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback or advice on further lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')


def explain(error: BaseException) -> str | None:
    """The sentence for compiled operators that raised this when they were loaded, else None."""
    named = isinstance(error, ImportError) and error.name in (EXT, '_ext')
    mmcv = Mmcv.find() if named else None
    if mmcv is None or not mmcv.compiled():
        return None
    return mmcv.unloadable(first_line(error))


def describe() -> Operators:
    """Say which operators are in use, by importing them.

    A bad installation is described in `problem`; nothing is raised.
    """
    mmcv = Mmcv.find()
    if mmcv is None:
        return Operators('none', problem=f'mmcv is not installed: `pip install {LITE}`.')
    if mmcv.missing_parts():
        return Operators('none', problem=mmcv.damage())
    try:
        used = importlib.import_module(EXT)
    except Exception as error:
        return Operators('none', problem=explain(error) or f'{first_line(error)}.')
    import torch

    cuda = f'CUDA {used.get_compiling_cuda_version()}'
    compiler = used.get_compiler_version()
    after = f', torch {torch.__version__}.'
    if used.get_compiler_version.__module__ != f'{__package__}.ext':
        text = f'{mmcv} with its compiled operators ({compiler}, {cuda}){after}'
        return Operators('compiled', text, mmcv.damage())
    text = f'{mmcv} with the operators of {compiler.split(" (")[0]} ({cuda}){after}'
    problem, advice = mmcv.damage(), ''
    if torch.version.cuda and 'not available' in cuda:
        problem = (
            f'torch {torch.__version__} has CUDA, and its torchvision has not: install the '
            'torchvision of the index that torch came from.'
        )
    elif mmcv.distributions == ('mmcv',):
        advice = (
            'mmcv was installed without its operators, which is mmcv-lite by another name: '
            f'`pip uninstall -y mmcv && pip install mmcv-lite=={mmcv.version}`.'
        )
    return Operators('torchvision', text, problem, advice)

"""All that mmcv's Python files look for in their compiled module `mmcv._ext`.

Raises:
    ImportError: On import, where torchvision does not work with the installed torch; one sentence
        with the fix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NoReturn

import torch

from . import attention, boxes, convolution, losses, normalization, pooling, upsampling
from .installation import TO_COMPILED, first_line


def _import_torchvision() -> str:
    """Register torchvision's operators in torch and return its version."""
    try:
        import torchvision

        if not torchvision.extension._has_ops():
            raise RuntimeError('its operators are missing')
    except ModuleNotFoundError as error:
        if error.name != 'torchvision':
            raise
        problem = 'torchvision is not installed'
    except Exception as error:  # RuntimeError: operator torchvision::nms does not exist
        problem = f'torchvision does not work with torch {torch.__version__} ({first_line(error)})'
    else:
        return torchvision.__version__
    major, minor = torch.__version__.split('.')[:2]
    release = f'0.{int(minor) + 15}' if major == '2' else f'<release of torch {major}.{minor}>'
    raise ImportError(
        f"mmcv's operators need torchvision, and {problem}: "
        f'`pip install "torchvision=={release}.*"`, from the index that torch came from.'
    )


TORCHVISION = _import_torchvision()


def get_compiler_version() -> str:
    """What mmcv reports in place of a compiler."""
    return f'torchvision {TORCHVISION} (repnext_mm.operators)'


def get_compiling_cuda_version() -> str:
    """The CUDA release of torchvision's kernels."""
    version = torch.ops.torchvision._cuda_version()  # 12060 for 12.6, -1 for none
    return f'{version // 1000}.{version // 10 % 100}' if version > 0 else 'not available'


#: Every public function of the modules, by the name that mmcv calls.
OPERATORS: dict[str, Callable] = {
    name: function
    for module in (attention, boxes, convolution, losses, normalization, pooling, upsampling)
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    and function.__module__ == module.__name__
    and not name.startswith('_')
}
OPERATORS |= {f.__name__: f for f in (get_compiler_version, get_compiling_cuda_version)}
globals().update(OPERATORS)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """An operator that is not here: mmcv looks all of them up when it is imported."""
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"mmcv's operator {name!r} is not among those that repnext_mm computes with "
            f'torchvision: {TO_COMPILED}.'
        )

    missing.__name__ = missing.__qualname__ = name
    return missing


# `from ... import *` imports __getattr__ too, so that it works in a file of that one line.
__all__ = ['__getattr__', *OPERATORS]

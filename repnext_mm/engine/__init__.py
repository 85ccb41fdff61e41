"""Training and evaluation: the tools' work, checkpoints that survive a kill, running without a GPU.

What configs may name of it is registered by importing `repnext_mm`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .amp import PortableAmpOptimWrapper
    from .atomic_checkpoint import AtomicCheckpointHook
    from .compile import CompileBackbone
    from .device import CPUDistributedDataParallel
    from .errors import UserError, run_tool

__all__ = [
    'AtomicCheckpointHook',
    'CPUDistributedDataParallel',
    'CompileBackbone',
    'PortableAmpOptimWrapper',
    'UserError',
    'run_tool',
]

__getattr__ = lazy_attributes(
    __name__,
    {
        'AtomicCheckpointHook': '.atomic_checkpoint',
        'CPUDistributedDataParallel': '.device',
        'CompileBackbone': '.compile',
        'PortableAmpOptimWrapper': '.amp',
        'UserError': '.errors',
        'run_tool': '.errors',
    },
)

"""Training and evaluation: the tools' work, checkpoints that survive a kill, running without a GPU.

Importing this registers `AtomicCheckpointHook`, `CompileBackbone`, `CPUDistributedDataParallel` and
`PortableAmpOptimWrapper` with MMEngine.
"""

from .amp import PortableAmpOptimWrapper
from .atomic_checkpoint import AtomicCheckpointHook, AtomicLocalBackend
from .compile import CompileBackbone
from .device import CPUDistributedDataParallel
from .errors import UserError, run_tool

__all__ = [
    'AtomicCheckpointHook',
    'AtomicLocalBackend',
    'CPUDistributedDataParallel',
    'CompileBackbone',
    'PortableAmpOptimWrapper',
    'UserError',
    'run_tool',
]

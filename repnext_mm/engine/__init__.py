"""Training and evaluation: the tools' work, checkpoints that survive a kill, running without a GPU.

Importing this registers `AtomicCheckpointHook`, `CompileBackbone` and
`CPUDistributedDataParallel` with MMEngine.
"""

from .atomic_checkpoint import AtomicCheckpointHook, AtomicLocalBackend
from .compile import CompileBackbone
from .device import CPUDistributedDataParallel
from .errors import UserError, run_tool

__all__ = [
    'AtomicCheckpointHook',
    'AtomicLocalBackend',
    'CPUDistributedDataParallel',
    'CompileBackbone',
    'UserError',
    'run_tool',
]

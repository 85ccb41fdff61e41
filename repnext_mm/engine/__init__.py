"""Training and evaluation: the tools' work, checkpoints that survive a kill, running without a GPU.

Importing this registers `AtomicCheckpointHook` and `CPUDistributedDataParallel` with MMEngine.
"""

from .atomic_checkpoint import AtomicCheckpointHook, AtomicLocalBackend
from .device import CPUDistributedDataParallel
from .errors import UserError, run_tool

__all__ = [
    'AtomicCheckpointHook',
    'AtomicLocalBackend',
    'CPUDistributedDataParallel',
    'UserError',
    'run_tool',
]

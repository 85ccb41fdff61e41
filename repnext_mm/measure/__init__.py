"""Measuring: interleaved timing with a noise floor, memory, operators, the environment."""

from .environment import LoadWatch, describe, summary
from .memory import peak_bytes, saved_bytes, step_memory
from .rounds import (
    CallRunner,
    Comparison,
    Deadline,
    Floor,
    Ratio,
    Runner,
    Samples,
    Schedule,
    compare,
    interleave,
    paired_ratio,
    warm_up,
)

__all__ = [
    'CallRunner',
    'Comparison',
    'Deadline',
    'Floor',
    'LoadWatch',
    'Ratio',
    'Runner',
    'Samples',
    'Schedule',
    'compare',
    'describe',
    'interleave',
    'paired_ratio',
    'peak_bytes',
    'saved_bytes',
    'step_memory',
    'summary',
    'warm_up',
]

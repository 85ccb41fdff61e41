"""Measuring: interleaved timing with a noise floor, memory, operators, the environment."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
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

__getattr__ = lazy_attributes(
    __name__,
    {
        **dict.fromkeys(('LoadWatch', 'describe', 'summary'), '.environment'),
        **dict.fromkeys(('peak_bytes', 'saved_bytes', 'step_memory'), '.memory'),
        **dict.fromkeys(('CallRunner', 'Comparison', 'Deadline', 'Floor', 'Ratio'), '.rounds'),
        **dict.fromkeys(('Runner', 'Samples', 'Schedule', 'compare', 'interleave'), '.rounds'),
        **dict.fromkeys(('paired_ratio', 'warm_up'), '.rounds'),
    },
)

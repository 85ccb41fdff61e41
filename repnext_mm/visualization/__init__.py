"""Pictures of what a model predicts and curves of how it trained, for every task alike."""

from .curves import plot_curves, read_scalars
from .labels import Answer, classify, draw_answers
from .pictures import Comparison, Region, compare, draw_comparisons

__all__ = [
    'Answer',
    'Comparison',
    'Region',
    'classify',
    'compare',
    'draw_answers',
    'draw_comparisons',
    'plot_curves',
    'read_scalars',
]

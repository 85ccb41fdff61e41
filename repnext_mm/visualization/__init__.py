"""Pictures of what a model predicts and curves of how it trained, for every task alike."""

from .curves import plot_curves, read_scalars
from .pictures import Comparison, Region, compare, draw_comparisons

__all__ = ['Comparison', 'Region', 'compare', 'draw_comparisons', 'plot_curves', 'read_scalars']

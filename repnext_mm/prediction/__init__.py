"""Predictions of trained models and of exported files, on images, folders and videos."""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

if TYPE_CHECKING:
    from .predictor import Predictor

__all__ = ['Predictor']

__getattr__ = lazy_attributes(__name__, {'Predictor': '.predictor'})

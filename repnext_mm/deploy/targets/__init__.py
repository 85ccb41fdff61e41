"""What can be exported: a backbone, or a complete classifier, segmentor or detector."""

from .backbone import BackboneTarget
from .base import IMAGE_SIZE, INPUT, OUT_SIZE, Preprocess, Target, UnsupportedModel
from .classifier import ClassifierTarget
from .detector import DetectorTarget
from .segmentor import SegmentorTarget

__all__ = [
    'IMAGE_SIZE',
    'INPUT',
    'OUT_SIZE',
    'BackboneTarget',
    'ClassifierTarget',
    'DetectorTarget',
    'Preprocess',
    'SegmentorTarget',
    'Target',
    'UnsupportedModel',
]

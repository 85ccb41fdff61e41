"""Layers that the families share; each knows its training form and its fused form."""

from .conv_norm import ConvNorm
from .depthwise import BranchedDepthwise, DeinterleavedConv2d
from .fusible import Fusible, Note
from .metanext import Downsample, MetaNeXtBlock, Stage, channel_mixer, conv_stem
from .repconv import ChunkConv, CopyConv

__all__ = [
    'BranchedDepthwise',
    'ChunkConv',
    'ConvNorm',
    'CopyConv',
    'DeinterleavedConv2d',
    'Downsample',
    'Fusible',
    'MetaNeXtBlock',
    'Note',
    'Stage',
    'channel_mixer',
    'conv_stem',
]

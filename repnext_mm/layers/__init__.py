"""Layers that the families share; each knows its training form and its fused form."""

from .conv_norm import ConvNorm
from .depthwise import BranchedDepthwise, DeinterleavedConv2d
from .fusible import Fusible, Note
from .linear_attention import LinearAttention, RecursiveAttention
from .metanext import Downsample, MetaNeXtBlock, Stage, channel_mixer, conv_stem
from .recursive import RECURSIVE_CONVS, RecursiveConv
from .rep_mixer import RepMixer
from .repconv import ChunkConv, CopyConv

__all__ = [
    'RECURSIVE_CONVS',
    'BranchedDepthwise',
    'ChunkConv',
    'ConvNorm',
    'CopyConv',
    'DeinterleavedConv2d',
    'Downsample',
    'Fusible',
    'LinearAttention',
    'MetaNeXtBlock',
    'Note',
    'RecursiveAttention',
    'RecursiveConv',
    'RepMixer',
    'Stage',
    'channel_mixer',
    'conv_stem',
]

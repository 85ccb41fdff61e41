"""Layers that the families share; each knows its training form and its fused form."""

from .conv_norm import ConvChain, ConvNorm
from .depthwise import BranchedDepthwise, DeinterleavedConv2d
from .forms import TRAIN_FORMS, TrainForm, TrainingLayer, configure
from .fusible import Fusible, Note
from .gelu import GELU
from .linear_attention import LinearAttention, RecursiveAttention
from .metanext import Downsample, MetaNeXtBlock, Stage, channel_mixer, conv_stem
from .recursive import RECURSIVE_CONVS, RecursiveConv
from .rep_mixer import RepMixer
from .repconv import ChunkConv, CopyConv

__all__ = [
    'GELU',
    'RECURSIVE_CONVS',
    'TRAIN_FORMS',
    'BranchedDepthwise',
    'ChunkConv',
    'ConvChain',
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
    'TrainForm',
    'TrainingLayer',
    'channel_mixer',
    'configure',
    'conv_stem',
]

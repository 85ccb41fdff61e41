"""RepNeXt, RecNeXt and InceptionNeXt as MMEngine backbones: train, fuse, deploy."""

from typing import TYPE_CHECKING

import torch

from .version import __version__

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    # Not in install_requires, as two distributions provide it.
    raise ModuleNotFoundError(
        f'repnext_mm cannot import mmengine ({error}): `pip install mmengine` or '
        '`pip install onedl-mmengine`, whichever your other OpenMMLab packages come from; '
        '`repnext-mm doctor` checks the rest.',
        name=error.name,
    ) from error

from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPERS,
)

from . import (
    files,  # noqa: F401  registers its file backend
    operators,
)
from .checkpoints.safe_globals import allow_mmengine_checkpoints
from .lazy import lazy_attributes, register_lazily
from .network import Network

if TYPE_CHECKING:
    from .backbones import InceptionNeXt, RecNeXt, RepNeXt
    from .engine.exported_backbone import ExportedBackbone
    from .optimization import optimize
    from .prediction import Predictor
    from .reparam import prove, reparameterize

__all__ = [
    'ExportedBackbone',
    'InceptionNeXt',
    'Predictor',
    'RecNeXt',
    'RepNeXt',
    '__version__',
    'optimize',
    'prove',
    'reparameterize',
]

__getattr__ = lazy_attributes(
    __name__,
    {
        'ExportedBackbone': '.engine.exported_backbone',
        'InceptionNeXt': '.backbones',
        'Predictor': '.prediction',
        'RecNeXt': '.backbones',
        'RepNeXt': '.backbones',
        'optimize': '.optimization',
        'prove': '.reparam',
        'reparameterize': '.reparam',
    },
)

for _name in ('InceptionNeXt', 'RecNeXt', 'RepNeXt'):
    register_lazily(MODELS, _name, '.backbones', base=Network)
register_lazily(MODELS, 'TimmPyramid', '.backbones.timm_pyramid')
register_lazily(MODELS, 'SeparableConv2d', '.layers.separable')
register_lazily(MODELS, 'ExportedBackbone', '.engine.exported_backbone')
register_lazily(MODELS, 'ExportedModel', '.engine.exported_model')
register_lazily(MODELS, 'ExportedClassifier', '.engine.exported_model')
register_lazily(HOOKS, 'AtomicCheckpointHook', '.engine.atomic_checkpoint')
register_lazily(HOOKS, 'CompileBackbone', '.engine.compile')
register_lazily(HOOKS, 'EpochLines', '.engine.progress')
register_lazily(OPTIM_WRAPPERS, 'PortableAmpOptimWrapper', '.engine.amp')
register_lazily(
    MODEL_WRAPPERS,
    'CPUDistributedDataParallel',
    '.engine.device',
    # MMEngine's runner asks whether a wrapper is one, to set its device ids.
    base=torch.nn.parallel.DistributedDataParallel,
)
for _name in ('AdaptiveGradClip', 'KeepEMA', 'SeedEachEpoch', 'TimmCosine'):
    register_lazily(HOOKS, _name, '.classification.hooks')
register_lazily(MODELS, 'TimmClassifier', '.classification.model')
register_lazily(DATASETS, 'TimmDataset', '.classification.data')
register_lazily(DATA_SAMPLERS, 'RepeatedAugmentation', '.classification.data')
register_lazily(FUNCTIONS, 'seed_worker', '.classification.data')
register_lazily(METRICS, 'TopK', '.classification.metrics')
register_lazily(METRICS, 'FastCocoMetric', '.evaluation.coco')

# An mmcv without its compiled operators uses ours.
operators.activate()
# mmengine reads its own checkpoints with torch's safe default, which needs to know their classes.
allow_mmengine_checkpoints()

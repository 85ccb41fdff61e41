"""RepNeXt, RecNeXt and InceptionNeXt as MMEngine backbones: train, fuse, deploy."""

import sys

from . import operators
from .version import __version__

operators.activate()

# `python -m repnext_mm.doctor` must start where torch or mmengine do not import.
if 'repnext_mm.doctor' not in sys.orig_argv:
    try:
        import mmengine  # noqa: F401
    except ModuleNotFoundError as error:
        # Not in install_requires, as two distributions provide it.
        raise ModuleNotFoundError(
            f'repnext_mm cannot import mmengine ({error}): `pip install mmengine` or '
            '`pip install onedl-mmengine`, whichever your other OpenMMLab packages come from; '
            '`python -m repnext_mm.doctor` checks the rest.',
            name=error.name,
        ) from error

    from . import engine  # noqa: F401  registers its checkpoint hook and CPU wrapper
    from .backbones import InceptionNeXt, RecNeXt, RepNeXt
    from .checkpoints.safe_globals import allow_mmengine_checkpoints
    from .deploy.exported_backbone import ExportedBackbone
    from .optimize import optimize
    from .reparam import prove, reparameterize

    # mmengine reads its own checkpoints with torch's safe default, which needs to know their
    # classes.
    allow_mmengine_checkpoints()

__all__ = [
    'ExportedBackbone',
    'InceptionNeXt',
    'RecNeXt',
    'RepNeXt',
    '__version__',
    'optimize',
    'prove',
    'reparameterize',
]

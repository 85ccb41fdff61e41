"""RepNeXt, RecNeXt and InceptionNeXt as MMEngine backbones: train, fuse, deploy."""

from .backbones import RepNeXt
from .checkpoints.safe_globals import allow_mmengine_checkpoints
from .reparam import prove, reparameterize
from .version import __version__

# mmengine reads its own checkpoints with torch's safe default, which needs to know their classes.
allow_mmengine_checkpoints()

__all__ = ['RepNeXt', '__version__', 'prove', 'reparameterize']

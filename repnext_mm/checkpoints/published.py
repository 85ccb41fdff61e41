"""Weight files that others have published, by name. A new family adds rows to `RELEASES`.

Sources, as of their READMEs: https://github.com/suous/RepNeXt (release v1.0; no weights are linked
for M0E to M2E, nor for training without distillation other than by StarNet's recipe).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..reparam.plans import Plan

_M0_TO_M5 = ('m0', 'm1', 'm2', 'm3', 'm4', 'm5')
_M0_TO_M2 = _M0_TO_M5[:3]
_M3_TO_M5 = _M0_TO_M5[3:]
_REPNEXT = 'https://github.com/suous/RepNeXt/releases/download/v1.0/repnext_{arch}_'

#: Family, its variants, where their files lie, and how those are fused (None: training form).
RELEASES: tuple[tuple[str, tuple[str, ...], str, Plan | None], ...] = (
    # ImageNet-1k, 300 epochs, RepViT's recipe with distillation; and the same, fused.
    ('RepNeXt', _M0_TO_M5, _REPNEXT + 'distill_300e.pth', None),
    ('RepNeXt', _M0_TO_M5, _REPNEXT + 'distill_300e_fused.pt', 'branches'),
    # ImageNet-1k, 300 epochs, StarNet's recipe without and with distillation.
    ('RepNeXt', _M0_TO_M2, _REPNEXT + 'sz224_4xbs512_ep300.pth.tar', None),
    ('RepNeXt', _M0_TO_M2, _REPNEXT + 'sz224_4xbs256_ep300_distill.pth.tar', None),
    # Whole detectors (MMDetection 2.28) and segmentors (MMSegmentation 0.30).
    ('RepNeXt', _M3_TO_M5, _REPNEXT + 'coco.pth', None),
    ('RepNeXt', _M3_TO_M5, _REPNEXT + 'ade20k.pth', None),
)


@dataclass(frozen=True)
class Published:
    """One published file: which backbone it holds, in which form, and where it lies."""

    family: str
    arch: str
    plan: Plan | None
    url: str

    @property
    def filename(self) -> str:
        return self.url.rsplit('/', 1)[-1]

    @property
    def name(self) -> str:
        """The file's name without its suffix, by which it is asked for."""
        stem = self.filename
        for suffix in ('.tar', '.pth', '.pt'):
            stem = stem.removesuffix(suffix)
        return stem


PUBLISHED: dict[str, Published] = {
    row.name: row
    for family, archs, url, plan in RELEASES
    for arch in archs
    for row in [Published(family, arch, plan, url.format(arch=arch))]
}

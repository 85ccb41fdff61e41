"""Weight files that others have published, by name. A new family adds rows to `RELEASES`.

Sources, as of their READMEs: https://github.com/suous/RepNeXt (release v1.0; no weights are linked
for M0E to M2E, nor for training without distillation other than by StarNet's recipe),
https://github.com/suous/RecNeXt (releases v1.0 and v2.0, https://huggingface.co/suous), and timm's
https://huggingface.co/timm for InceptionNeXt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..network import Plan

#: Where the hub's files are, unless `HF_ENDPOINT` names a mirror.
HUB = 'https://huggingface.co'

_M0_TO_M5 = ('m0', 'm1', 'm2', 'm3', 'm4', 'm5')
_M0_TO_M2 = _M0_TO_M5[:3]
_M3_TO_M5 = _M0_TO_M5[3:]
_A0_TO_A5 = ('a0', 'a1', 'a2', 'a3', 'a4', 'a5')
_A3_TO_A5 = _A0_TO_A5[3:]
_LARGE = ('t', 's', 'b', 't_share_channel', 's_share_channel', 'b_share_channel')

_REPNEXT = 'https://github.com/suous/RepNeXt/releases/download/v1.0/repnext_{arch}_'
_RECNEXT_1 = 'https://github.com/suous/RecNeXt/releases/download/v1.0/recnext_{arch}_'
_RECNEXT_2 = 'https://github.com/suous/RecNeXt/releases/download/v2.0/recnext_{arch}_'
_RECNEXT_HUB = HUB + '/suous/recnext_{arch}.'
_INCEPTION_NEXT = HUB + '/timm/inception_next_{arch}.'
_HUB_FILE = '/resolve/main/model.safetensors'
_FORMS: tuple[tuple[str, Plan | None], ...] = (('.pth', None), ('_fused.pt', 'upstream'))

#: Family, its variants, where their files are, and how those are fused (None: training form).
RELEASES: tuple[tuple[str, tuple[str, ...], str, Plan | None], ...] = (
    # ImageNet-1k, 300 epochs, RepViT's recipe with distillation; and the same, fused.
    ('RepNeXt', _M0_TO_M5, _REPNEXT + 'distill_300e.pth', None),
    ('RepNeXt', _M0_TO_M5, _REPNEXT + 'distill_300e_fused.pt', 'upstream'),
    # ImageNet-1k, 300 epochs, StarNet's recipe without and with distillation.
    ('RepNeXt', _M0_TO_M2, _REPNEXT + 'sz224_4xbs512_ep300.pth.tar', None),
    ('RepNeXt', _M0_TO_M2, _REPNEXT + 'sz224_4xbs256_ep300_distill.pth.tar', None),
    # Whole detectors (MMDetection 2.28) and segmentors (MMSegmentation 0.30).
    ('RepNeXt', _M3_TO_M5, _REPNEXT + 'coco.pth', None),
    ('RepNeXt', _M3_TO_M5, _REPNEXT + 'ade20k.pth', None),
    # The same kinds of RecNeXt; its releases split by series.
    *(
        ('RecNeXt', archs, f'{release}{recipe}_300e{form}', plan)
        for archs, release in ((_M0_TO_M5, _RECNEXT_1), (_A0_TO_A5 + _LARGE, _RECNEXT_2))
        for recipe in ('distill', 'without_distill')
        for form, plan in _FORMS
    ),
    *(
        ('RecNeXt', archs, f'{release}{data}.pth', None)
        for archs, release in ((_M3_TO_M5, _RECNEXT_1), (_A3_TO_A5, _RECNEXT_2))
        for data in ('coco', 'ade20k')
    ),
    # timm's layout: with (dist) and without (base) distillation.
    *(
        ('RecNeXt', _M0_TO_M5 + _A0_TO_A5 + _LARGE, f'{_RECNEXT_HUB}{tag}{_HUB_FILE}', None)
        for tag in ('dist_300e_in1k', 'base_300e_in1k')
    ),
    (
        'InceptionNeXt',
        ('atto', 'tiny', 'small', 'base'),
        f'{_INCEPTION_NEXT}sail_in1k{_HUB_FILE}',
        None,
    ),
    ('InceptionNeXt', ('base',), f'{_INCEPTION_NEXT}sail_in1k_384{_HUB_FILE}', None),
)


@dataclass(frozen=True)
class Published:
    """One published file: which backbone it holds, in which form, and where it is."""

    family: str
    arch: str
    plan: Plan | None
    url: str

    @property
    def repository(self) -> str:
        """Owner and name on the hub, or nothing for a file elsewhere."""
        found = re.search('([^/]+/[^/]+)/resolve/', self.url)
        return found[1] if found else ''

    @property
    def filename(self) -> str:
        """What it is kept as: on the hub all are called model.safetensors."""
        path = f'{self.repository}.safetensors' if self.repository else self.url
        return path.rsplit('/', 1)[-1]

    @property
    def name(self) -> str:
        """The file's name without its suffix, by which it is asked for."""
        return strip_suffix(self.filename)


def strip_suffix(filename: str) -> str:
    """`filename` without the suffixes of weight files; a hub name's own dot stays."""
    return re.sub(r'(\.(pth|pt|tar|safetensors|bin))+$', '', filename)


#: Every published file by its name.
PUBLISHED: dict[str, Published] = {
    row.name: row
    for family, archs, url, plan in RELEASES
    for arch in archs
    for row in [Published(family, arch, plan, url.format(arch=arch))]
}


def find_published(name: str) -> Published | None:
    """The published file of that name, if there is one.

    A hub name may come with its owner (`suous/...`), as timm writes it (`hf-hub:suous/...`), and
    timm's own without its tag (`inception_next_tiny`).
    """
    text = re.sub('^hf[-_]hub:', '', name)
    owner, _, name = text.rpartition('/')
    row = PUBLISHED.get(name) or PUBLISHED.get(f'{name}.sail_in1k')
    return row if row and (not owner or row.repository == f'{owner}/{row.name}') else None


def names_for(family: str, arch: str, fused: bool = True) -> list[str]:
    """Names of the files published for a network; `fused=False` leaves the fused ones out."""
    return [
        row.name
        for row in PUBLISHED.values()
        if (row.family, row.arch) == (family, arch) and (fused or row.plan is None)
    ]

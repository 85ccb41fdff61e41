"""The classifiers in timm's registry: `import repnext_mm.timm`, then `timm.create_model`.

RepNeXt and RecNeXt under their published names; InceptionNeXt is timm's own. Importing timm takes
seconds, so that `import repnext_mm` alone does not do it.

Preprocessing, as published: RepViT's recipe resizes to 256 and crops 224 (crop_pct 0.875),
StarNet's, of the E forms and of some files of M0 to M2, has crop_pct 0.9.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn

from .backbones.classifier import CLASSIFIERS, FIRST_CONV, LINEARS, Classifier
from .checkpoints.published import PUBLISHED, Published

#: Before a name that timm has taken.
PREFIX = 'repnext_mm_'
#: What the published files' names end with, the tag of their recipe, and its crop.
RECIPES = (
    ('.dist_300e_in1k', 'dist_300e_in1k', 0.875),
    ('.base_300e_in1k', 'base_300e_in1k', 0.875),
    ('_distill_300e', 'dist_300e_in1k', 0.875),
    ('_sz224_4xbs512_ep300', 'base_300e_in1k', 0.9),
    ('_sz224_4xbs256_ep300_distill', 'starnet_dist_300e_in1k', 0.9),
)


def preprocessing(crop_pct: float = 0.875, **settings: Any) -> dict[str, Any]:
    """A `pretrained_cfg` of timm."""
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=crop_pct,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=FIRST_CONV,
        classifier=LINEARS,
        license='apache-2.0',
        custom_load=True,  # by `Classifier.load_pretrained`
        **settings,
    )


def _location(row: Published) -> dict[str, Any]:
    return dict(hf_hub_id=row.repository) if row.repository else dict(url=row.url)


def pretrained_cfgs(name: str) -> dict[str, dict[str, Any]]:
    """What timm knows of the published files of a network, the default first.

    The hub's file of a recipe comes before that of a release. A network without a published file
    has one entry without an address, which timm refuses to load by name.
    """
    found: dict[str, dict[str, Any]] = {}
    for ending, tag, crop in RECIPES:
        row = PUBLISHED.get(name + ending)
        if row is not None and tag not in found:
            found[tag] = preprocessing(crop, **_location(row))
    if not found:
        found[''] = preprocessing(0.9)
    return {f'{name}.{tag}' if tag else name: cfg for tag, cfg in found.items()}


def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The classifier `name`, such as repnext_m1, as `timm.create_model` builds it."""
    family, _, arch = name.partition('_')
    overlay = kwargs.get('pretrained_cfg_overlay')
    if overlay:  # timm would read a file that it names, and prefer the averages in it
        kwargs['pretrained_cfg_overlay'] = {'custom_load': True, **overlay}
    return build_model_with_cfg(
        _Build(family, arch),
        registered_name(name),
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **kwargs,
    )


class _Build:
    """Builds one variant of a family."""

    def __init__(self, family: str, arch: str) -> None:
        self.family, self.arch = family, arch

    def __call__(self, arch: Mapping[str, Any] | None = None, **kwargs: Any) -> Classifier:
        """The network; `arch` has what differs from its row, as in the papers' ablations."""
        family = CLASSIFIERS[self.family]
        if arch is None:
            return family(self.arch, **kwargs)
        return family({**family.arch_zoo[self.arch], **arch}, **kwargs)


#: The names that this package has registered, and under which.
REGISTERED: dict[str, str] = {}


def registered_name(name: str) -> str:
    """The name of a network in timm's registry."""
    return REGISTERED.get(name, name)


def names() -> list[str]:
    """The classifiers of this package as timm knows them."""
    return list(REGISTERED.values())


def _register(name: str) -> None:
    own = name
    if is_model(name):
        own = PREFIX + name
        warnings.warn(
            f'timm has a model {name} of its own; that of repnext_mm is {own}.', stacklevel=2
        )
    REGISTERED[name] = own

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = own
    entrypoint.__module__ = __name__
    cfgs = {own + key.removeprefix(name): cfg for key, cfg in pretrained_cfgs(name).items()}
    default_cfgs.update(generate_default_cfgs(cfgs))
    register_model(entrypoint)


#: Where timm looks for the settings of the models of a module.
default_cfgs: dict[str, Any] = {}

for _family, _classifier in CLASSIFIERS.items():
    for _arch in _classifier.arch_zoo:
        _register(f'{_family}_{_arch}')

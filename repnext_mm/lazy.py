"""Names that are imported, and classes that are registered, before their modules are.

timm, and MMEngine's models, optimizers and runner, take longer to import than torch itself. They
load with the first network, hook or export, not with this package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from mmengine.registry import Registry


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that exports each name from its module, on first use."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def register_lazily(registry: Registry, name: str, module: str, base: type = object) -> None:
    """Register a class whose module is imported when the first instance is built.

    Until then the registry contains a stand-in: a subclass of `base` that builds the real thing.
    The module replaces it: its class is registered under the same name with `force=True`.
    """

    def import_class() -> Any:
        return getattr(import_module(module, __package__), name)

    def build(stand_in: type, *args: Any, **kwargs: Any) -> Any:
        return import_class()(*args, **kwargs)

    members = {
        '__new__': build,
        '__module__': __name__,
        'import_class': staticmethod(import_class),
    }
    stand_in = type(name, (base,), members)
    registry.register_module(name=name, module=stand_in)

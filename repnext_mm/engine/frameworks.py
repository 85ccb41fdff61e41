"""mmdet and mmseg, imported where a config asks for them."""

from __future__ import annotations

from importlib import import_module

from ..operators import explain
from .errors import UserError


def import_framework(scope: str | None) -> None:
    """Fill the registries of the framework that a config is written for.

    Raises:
        UserError: It is not installed, or does not work.
    """
    if scope in (None, 'mmengine'):
        return
    try:
        module = import_module(f'{scope}.utils')
        module.register_all_modules(init_default_scope=False)
    except (ImportError, AssertionError) as error:
        reason = explain(error) or ' '.join(str(error).split())
        raise UserError(
            f'{scope} cannot be used: {reason.rstrip(".")}; '
            '`repnext-mm doctor` says what to install.'
        ) from error

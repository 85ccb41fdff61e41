"""What can go wrong in tools/deploy.py, each with its exit code."""

from __future__ import annotations

from ..engine.errors import UserError


class UsageError(UserError):
    """The command line asks for what does not exist or does not go together."""

    exit_code = 2


class ModelError(UserError):
    """There is no such model, or its checkpoint cannot be used."""

    exit_code = 3


class DependencyError(UserError):
    """A package that a named format needs is missing, or cannot do what is asked."""

    exit_code = 4


class ExportError(UserError):
    """A format could not be written."""

    exit_code = 5


class ParityError(UserError):
    """An artifact does not compute what the model computes."""

    exit_code = 6


class SomeFailedError(UserError):
    """Of several formats, some were written and some failed."""

    exit_code = 7

"""`repnext-mm operators`: say which operators mmcv uses, or write them into mmcv-lite.

mm's own tools import mmcv's operators before they read a config, so they never import repnext_mm.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

from ..files import write_text
from ..program import program
from .installation import LITE, ONE_LINE, Mmcv, describe


class _Refusal(Exception):
    """One sentence with what, why and the fix."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog=program('operators'),
        description='Say which operators mmcv uses: its compiled ones, or those of torchvision.',
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--install',
        action='store_true',
        help="write torchvision's operators into mmcv-lite, for tools that do not import "
        'repnext_mm, such as those of mmdet and mmseg',
    )
    action.add_argument('--remove', action='store_true', help='remove them')
    args = parser.parse_args(argv)
    try:
        if args.install:
            _install()
        elif args.remove:
            _remove()
        else:
            return _show()
    except _Refusal as refusal:
        print(f'error: {refusal}', file=sys.stderr)
        return 1
    return 0


def _show() -> int:
    operators = describe()
    if operators.text:
        print(operators.text)
    if operators.problem:
        kind = 'error' if operators.kind == 'none' else 'warning'
        print(f'{kind}: {operators.problem}', file=sys.stderr)
    if operators.advice:
        print(f'note: {operators.advice}', file=sys.stderr)
    return int(operators.kind == 'none')


def _found() -> Mmcv:
    mmcv = Mmcv.find()
    if mmcv is None:
        raise _Refusal(f'mmcv is not installed: `pip install {LITE}`.')
    return mmcv


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == ONE_LINE.encode()


def _install() -> None:
    mmcv = _found()
    if mmcv.damage():
        raise _Refusal(mmcv.damage())
    if mmcv.compiled():
        raise _Refusal(
            f'mmcv has compiled operators ({mmcv.compiled()[0]}), which are never replaced: '
            f'to use those of torchvision, uninstall it and `pip install {LITE}`.'
        )
    if _is_ours(mmcv.ext):
        print(f'{mmcv.ext} is installed already.')
        return
    if mmcv.ext.exists():
        raise _Refusal(
            f'{mmcv.ext} was not written by this command: move it away, and run this again.'
        )
    try:
        write_text(mmcv.ext, ONE_LINE)
    except OSError as error:
        raise _Refusal(_not_allowed('write', mmcv.ext, error)) from error
    print(
        f'{mmcv.ext} written: every program that imports mmcv.ops now uses the operators of '
        'torchvision; `repnext-mm operators --remove` removes it, also before you uninstall '
        'mmcv-lite.'
    )


def _remove() -> None:
    path = _found().ext
    if not path.exists():
        print(f'{path} is not there: nothing to remove.')
        return
    if not _is_ours(path):
        raise _Refusal(
            f'{path} was not written by `repnext-mm operators --install`: delete it yourself if '
            'you know that you do not need it.'
        )
    try:
        path.unlink()
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    except OSError as error:
        raise _Refusal(_not_allowed('remove', path, error)) from error
    print(f'{path} removed.')
    # Where mmcv-lite itself is gone by now, an empty folder would still import as mmcv.
    for folder in (path.parent / '__pycache__', path.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _not_allowed(verb: str, path: Path, error: OSError) -> str:
    return (
        f'cannot {verb} {path} ({error.strerror}): run this as the owner of that folder, or use a '
        'virtual environment of your own (`python -m venv`).'
    )

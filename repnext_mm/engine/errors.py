"""Errors that a user can fix: one sentence on stderr, no traceback, a non-zero exit."""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import FULL
from ..text import printable
from .quiet import quiet

PACKAGE = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = Path(os.__file__).parent
#: What to do with a bug.
PLEASE = (
    'please report it where you got repnext_mm from (CONTRIBUTING.md), with the lines above and '
    'what `repnext-mm doctor` prints.'
)
#: torchrun ends all processes when it sees one end: the first one says before what happened.
GRACE_S = 2.0
TRACEBACK_VARIABLE = 'REPNEXT_MM_TRACEBACK'
#: Lines with which torch tells how to load a file that it refused.
ADVICE = re.compile(r'weights_only|Weights only load failed|arbitrary code execution')

#: What other packages raise for a mistake of the user, deep inside their code, and what to say.
#: A group of the pattern fills the sentence.
KNOWN_ERRORS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        ModuleNotFoundError,
        r"No module named 'faster_coco_eval",
        'FastCocoMetric needs faster-coco-eval, not installed here; run: pip install '
        "faster-coco-eval, or give val_evaluator and test_evaluator type='CocoMetric'.",
    ),
    (
        FileNotFoundError,
        r"No such file or directory: '(.+?)'",
        'the file {0} is missing; restore it, or remove it from the annotations.',
    ),
    (
        AssertionError,
        r'failed to load image: (\S+)',
        'the image {0} cannot be decoded; replace the file, or remove it from the annotations.',
    ),
    (
        KeyError,
        r'([\w.]+) is not in the (\S+) registry',
        'the config asks for type={0!r}, which is not registered in {1}; correct the name, or add '
        'the package that defines it to custom_imports.',
    ),
    (
        ValueError,
        r'Expected more than 1 value per channel when training, got input size torch.Size(\(.+?\))',
        'a BatchNorm layer got a single value of each channel, an input of {0}; set '
        'train_dataloader.batch_size=2 or more, larger images, or norm_eval=True of the backbone.',
    ),
    (
        RuntimeError,
        r'Expected to have (finished) reduction in the prior iteration',
        'parameters of the model got no gradient, which DistributedDataParallel must know: their '
        'part was not {0}, as it is built and never run; take it out of the model, freeze it, or '
        'add --cfg-options find_unused_parameters=True.',
    ),
    (
        torch.cuda.OutOfMemoryError,
        r'(?s)^(.+?\.)\s',
        'the GPU ran out of memory ({0}); lower train_dataloader.batch_size together with '
        '--auto-scale-lr, add --amp, or set model.backbone.with_cp=True with --cfg-options.',
    ),
)


class UserError(Exception):
    """Something the user can fix; the message is one sentence with what, why and the fix."""

    #: What a tool exits with.
    exit_code = 1


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), as by a scheduler, and does so in order."""


def is_first() -> bool:
    """Whether this is the first process, as launchers say before the process group exists."""
    return int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0) == 0


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """In this context, SIGTERM ends this process as Ctrl-C does: in order, and results are kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a data worker, which inherits this
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_wait() -> Iterator[None]:
    """In this context, Ctrl-C and SIGTERM wait for its end, and are raised there.

    For code of others that takes what they raise for an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def run_tool(main: Callable[[], None]) -> int:
    """Run the body of a command line tool and return its exit code.

    An error that the user can fix is printed as one sentence. Any other is a bug and keeps its
    traceback, and with REPNEXT_MM_TRACEBACK=1 in the environment so does every one. Known messages
    of other packages that are no help are left out, see `quiet`.
    """
    try:
        with quiet():
            main()
    except Terminated:
        if is_first():
            print('terminated', file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get(TRACEBACK_VARIABLE):
            print(_trace(error), file=sys.stderr)
        rank = os.environ.get('RANK')
        where = f'error{f" [rank {rank}]" if rank else ""}'
        print(f'{where}: {printable(sentence or _report(error))}', file=sys.stderr, flush=True)
        if rank and not is_first():
            time.sleep(GRACE_S)
        return error.exit_code if isinstance(error, UserError) else 1
    return 0


def _trace(error: BaseException) -> str:
    """The traceback, without torch's advice to load files unsafely."""
    text = ''.join(traceback.format_exception(error))
    return printable('\n'.join(line for line in text.splitlines() if not ADVICE.search(line)))


def _report(error: BaseException) -> str:
    """What to do about a bug: whose it is, by the last code that is not Python's own."""
    text = _one_line(error)[:200]
    said = type(error).__name__ + ('' if ADVICE.search(text) else f': {text}')
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if PACKAGE in path.resolve().parents:
            break
        if 'site-packages' in path.parts:
            library = path.parts[path.parts.index('site-packages') + 1]
            return f'this is an error in {library} that nobody expected ({said}); {PLEASE}'
        if path.is_file() and not path.is_relative_to(STANDARD_LIBRARY):
            return f'this is an error of {path}, line {frame.lineno} ({said}); correct it there.'
    return f'this is a bug of repnext_mm ({said}); {PLEASE}'


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the user can fix, or None for a bug."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in FULL:
            return (
                f'{link.filename or "a file"} cannot be written ({link.strerror}); free space on '
                'its disk, or give another folder.'
            )
        if isinstance(link, UserError) or _is_ours(link):
            return _one_line(link)
        for kind, pattern, sentence in KNOWN_ERRORS:
            # An error that crossed from a data worker quotes the code that raised it first.
            if isinstance(link, kind) and (found := list(re.finditer(pattern, str(link)))):
                return sentence.format(*found[-1].groups())
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_ours(error: BaseException) -> bool:
    """Whether this package's own code raised `error` about a value or a file it was given.

    Python's own errors about values, as of calling None, come from a statement that raises
    nothing, and are bugs.
    """
    if not isinstance(error, ValueError | TypeError | OSError) or error.__traceback__ is None:
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if PACKAGE not in Path(frame.filename).resolve().parents:
        return False
    return isinstance(error, OSError) or _raises(frame.filename, frame.lineno or 0)


def _raises(filename: str, line: int) -> bool:
    """Whether the statement at `line` is a `raise`."""
    try:
        tree = ast.parse(Path(filename).read_text('utf-8'))
    except (OSError, SyntaxError):
        return False
    return any(
        isinstance(node, ast.Raise) and node.lineno <= line <= (node.end_lineno or node.lineno)
        for node in ast.walk(tree)
    )


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())

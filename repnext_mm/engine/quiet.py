"""What other packages print that nobody can act on, quoted text by text, and left out by the tools.

Each row quotes one complete message, as a regular expression, with the reason why it is no help. An
unknown text, an error and whatever this package or the user's code says always show. A user's own
program that imports this package keeps its warnings as they are; log files keep every line.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast

#: What mmengine names its loggers, which no other part of a program can ask for by name.
MMENGINE = 'mmengine'


@dataclass(frozen=True)
class Warned:
    """A warning: the module that it is attributed to, its category, and its text."""

    module: str
    category: type[Warning]
    text: str
    reason: str


@dataclass(frozen=True)
class Logged:
    """A message of a logger: its level, its text, and the logger's name."""

    level: int
    text: str
    reason: str
    logger: str = MMENGINE


@dataclass(frozen=True)
class Printed:
    """A printed line. One that announces work shows after all if the work takes long."""

    text: str
    reason: str
    announces: bool = False


def _torchscript(module: str, function: str, instead: str) -> Warned:
    return Warned(
        f'torch.jit.{module}',
        FutureWarning,
        rf'`torch\.jit\.{function}` is deprecated\. Please {instead}\.',
        'the formats torchscript and coreml are made of it',
    )


WARNINGS = (
    Warned(
        'mmseg.models.builder',
        UserWarning,
        r'``build_loss`` would be deprecated soon, please use '
        r'``mmseg\.registry\.MODELS\.build\(\)`` ',
        "mmseg's own heads call it",
    ),
    Warned(
        'mmseg.models.losses.cross_entropy_loss',
        UserWarning,
        r'Default ``avg_non_ignore`` is False, if you would like to ignore the certain label and '
        r'average loss over non-ignore labels, which is the same with PyTorch official '
        r'cross_entropy, set ``avg_non_ignore=True``\.',
        'False is what the published recipes trained with, and saying so in a config warns too',
    ),
    Warned(
        'mmseg.engine.hooks.visualization_hook',
        UserWarning,
        r'The draw is False, it means that the hook for visualization will not take effect\. The '
        r'results will NOT be visualized or stored\.',
        'the hook waits in every config for --show-dir',
    ),
    Warned(
        'mmengine.visualization.visualizer',
        UserWarning,
        r'Warning: The bbox is out of bounds, the drawn bbox may not be in the image',
        'a predicted box may reach to the very border, which counts as outside',
    ),
    Warned(
        'mmengine.visualization.visualizer',
        UserWarning,
        r'Warning: The polygon is out of bounds, the drawn polygon may not be in the image',
        'as for a box',
    ),
    _torchscript('_trace', 'trace', r'switch to `torch\.compile` or `torch\.export`'),
    _torchscript('_trace', 'trace_method', r'switch to `torch\.compile` or `torch\.export`'),
    _torchscript('_freeze', 'freeze', r'use `torch\.compile` instead'),
    _torchscript('_serialization', 'save', r'switch to `torch\.export`'),
    _torchscript('_serialization', 'load', r'switch to `torch\.export`'),
)
LOGGED = (
    Logged(
        logging.INFO,
        r'\n-+\nSystem environment:\n.*',
        'for a bug report, which contains the log file',
    ),
    Logged(logging.INFO, r'Config:\n.*', 'hundreds of lines that the work dir has as a file'),
    Logged(
        logging.INFO,
        r'Hooks will be executed in the following order:\n.*',
        'what the config says, for whoever debugs a hook with the log file',
    ),
    Logged(
        logging.INFO,
        r'Distributed training is not used, all SyncBatchNorm \(SyncBN\) layers in the model will '
        r'be automatically reverted to BatchNormXd layers if they are used\.',
        'meant by the configs, which train on one device and on several',
    ),
    Logged(
        logging.INFO,
        r'paramwise_options -- \S+:(?:lr|weight_decay|lr_mult|decay_mult)=\S+',
        'one line for each setting of each parameter, from the config',
    ),
    Logged(logging.INFO, r'Exp name: \S+', 'the name of the config and the time of the start'),
    Logged(
        logging.INFO,
        r'(?:bbox|segm)_mAP_copypaste: [-\d. ]+',
        'the figures of the next line, without their names',
    ),
    Logged(
        logging.WARNING,
        r'"FileClient" will be deprecated in future\. Please use io functions in \S+',
        "mmengine's own checkpoint hook uses it",
    ),
    Logged(
        logging.WARNING,
        r'"HardDiskBackend" is the alias of "LocalBackend" and the former will be deprecated in '
        r'future\.',
        "mmengine's own checkpoint hook uses it",
    ),
    Logged(
        logging.WARNING,
        r'The prefix is not set in metric class IoUMetric\.',
        'the names mIoU, mAcc and aAcc are meant to have none',
    ),
    Logged(
        logging.WARNING,
        r"No CUDA runtime is found, using CUDA_HOME='.*'",
        'nncf imports what compiles extensions, and none is compiled',
        'torch.utils.cpp_extension',
    ),
)
PRINTED = (
    Printed(r'loading annotations into memory\.\.\.', 'over in no time or shown', announces=True),
    Printed(r'creating index\.\.\.', 'over in no time or shown', announces=True),
    Printed(r'Loading and preparing results\.\.\.', 'over in no time or shown', announces=True),
    Printed(r'Running per image evaluation\.\.\.', 'over in no time or shown', announces=True),
    Printed(r'Accumulating evaluation results\.\.\.', 'over in no time or shown', announces=True),
    Printed(
        r'Evaluate annotation type \*(?:bbox|segm)\*',
        'mmdet has logged it; over in no time or shown',
        announces=True,
    ),
    Printed(r'(?:Done|DONE) \(t=[01]\.\d\ds\)\.?', 'the end of what took no time'),
    Printed(r'index created!', 'the end of what took no time'),
    Printed(
        r'Loads checkpoint by local backend from path: .+',
        "the tool's own line names the file",
    ),
)
#: What is left out of the output of exporters and quantizers, which `muffled` catches.
CHATTER = (
    Printed(
        r'scikit-learn version \S+ is not supported\. Minimum required version: \S+ Maximum '
        r'required version: \S+ Disabling scikit-learn conversion API\.',
        'nothing here converts from scikit-learn',
    ),
    Printed(
        r'Torch version \S+ has not been tested with coremltools\. You may run into unexpected '
        r'errors\. Torch \S+ is the most recent version that has been tested\.',
        "the tool's own warning says it",
    ),
    Printed(
        r"Failed to load _ML\w+Proxy: No module named 'coremltools\.libcoremlpython'",
        'only macOS has it; elsewhere the tool reports what it wrote as unverified',
    ),
    Printed(
        r'Tuple detected at graph output\. This will be flattened in the converted model\.',
        'the outputs are the stages, one by one',
    ),
    Printed(
        r'(?:Converting PyTorch Frontend ==> MIL Ops|Running MIL \w+ pipeline): .+'
        r' (?:ops|passes)/s\]',
        'a progress bar of a part of the work',
    ),
    Printed(r'Statistics collection .+', "nncf's progress bar; the tool has named the step"),
    Printed(
        r'INFO:nncf:\d+ ignored nodes were found by (?:names?|types) in the NNCFGraph',
        'the tool has said how many layers stay in float',
    ),
    Printed(
        r'INFO:nncf:Not adding activation input quantizer for operation: .+',
        'the tool has said how many layers stay in float',
    ),
)
#: Work that is announced shows after this time. What took less is in the row about its end.
PATIENCE_S = 2.0


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the rows of `WARNINGS` and of `PRINTED`, also in data workers that fork inside."""
    screen = _Screen(sys.stdout)
    with _without_known(), redirect_stdout(cast(TextIO, screen)):
        try:
            yield
        finally:
            screen.release()


@contextmanager
def muffled() -> Iterator[None]:
    """Hold back what is printed, and pass it on at the end, less `WARNINGS` and `CHATTER`.

    For exporters and quantizers, whose output is made for a terminal of their own.
    """
    stdout, stderr = _Held('stdout'), _Held('stderr')
    try:
        with _without_known(), redirect_stdout(stdout), redirect_stderr(stderr):
            yield
    finally:
        stdout.release()
        stderr.release()


@contextmanager
def _without_known() -> Iterator[None]:
    loggers = [logging.getLogger(row.logger) for row in LOGGED if row.logger != MMENGINE]
    with warnings.catch_warnings():
        for row in WARNINGS:
            warnings.filterwarnings('ignore', rf'{row.text}\Z', row.category, rf'{row.module}\Z')
        for logger in loggers:
            logger.addFilter(_is_wanted)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_wanted)


def mute(on: bool) -> None:
    """Leave out all that is printed, in the tools, until it is switched off."""
    if isinstance(sys.stdout, _Screen):
        sys.stdout.muted = on


def announce(text: str) -> None:
    """Print what the tool does from now on, if the next line is not there in a moment."""
    if isinstance(sys.stdout, _Screen):
        sys.stdout.announce(f'{text}\n')


def quiet_log(logger: logging.Logger) -> None:
    """Leave out the rows of `LOGGED` on the screen; files that `logger` writes keep them."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(
        (row.level, row.logger) == (record.levelno, record.name)
        and re.fullmatch(row.text, text, re.DOTALL)
        for row in LOGGED
    )


class _Screen:
    """A text stream that passes on what is written to it, except for the rows of `PRINTED`.

    Args:
        stream: Where to.
        patience_s: Seconds after which announced work shows; a later line cancels it.
    """

    def __init__(self, stream: TextIO, patience_s: float = PATIENCE_S) -> None:
        self._stream = stream
        self._patience_s = patience_s
        self._held = ''  # the text of a row, of which it is open whether its line ends there
        self._inside = False  # a line of which the beginning is passed on
        self._timer: threading.Timer | None = None
        self.muted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Pass on `text`, but for what is or may become a row."""
        if self.muted:
            return len(text)
        for part in re.findall(r'[^\n]*\n|[^\n]+', text):
            self._write(part)
        return len(text)

    def release(self) -> None:
        """Pass on what is held back, and forget the announced work."""
        self._forget()
        held, self._held = self._held, ''
        if held:
            self._stream.write(held)

    def announce(self, line: str) -> None:
        """Show `line` after `patience_s`, unless something is written before."""
        self._forget()
        self._timer = threading.Timer(self._patience_s, self._show, [line])
        self._timer.daemon = True
        self._timer.start()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _write(self, part: str) -> None:
        self._forget()
        line = self._held + part
        row = None if self._inside else _row(line.removesuffix('\n'), PRINTED)
        if row is None:
            self._held = ''
            self._inside = not line.endswith('\n')
            self._stream.write(line)
        elif not line.endswith('\n'):
            self._held = line
        else:
            self._held = ''
            if row.announces:
                self.announce(line)

    def _show(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a stream that is closed by now
            self._stream.write(line)
            self._stream.flush()


class _Held(io.StringIO):
    """What is written while `muffled` keeps it; afterwards it goes where `sys` writes.

    Loggers that are set up meanwhile keep writing to it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(newline='')
        self._name = name
        self._holds = True

    def write(self, text: str) -> int:
        return super().write(text) if self._holds else getattr(sys, self._name).write(text)

    def release(self) -> None:
        """Pass on the lines that are no row; of one that was drawn repeatedly, the last state."""
        self._holds = False
        for line in self.getvalue().split('\n'):
            last = line.rstrip('\r').rpartition('\r')[2]
            if last and not _row(last, CHATTER):
                self.write(f'{last}\n')


def _row(line: str, rows: Iterable[Printed]) -> Printed | None:
    return next((row for row in rows if re.fullmatch(row.text, line)), None)

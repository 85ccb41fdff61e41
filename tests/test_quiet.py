"""What the tools print: everything a user can act on, and nothing else of other packages."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runs import CONFIGS, environment, options, run, tiny_shapes
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader, Dataset

from repnext_mm.engine import run_tool
from repnext_mm.engine.quiet import (
    CHATTER,
    LOGGED,
    MMENGINE,
    PRINTED,
    WARNINGS,
    Logged,
    Printed,
    Warned,
    _Screen,
    announce,
    muffled,
    quiet,
    quiet_log,
)

STAMP = r'\d\d/\d\d \d\d:\d\d:\d\d - mmengine - '
#: Every kind of line that a training prints.
EXPECTED = (
    r'No GPU \(.+\): running on the CPU with .+',
    r'Data +Data set +Images .+',
    r'(?:train|val) +\w+ +\d.+',
    r'(?:train|val): (?:objects|pixels) .+',
    r'schedule: .+',
    STAMP + r'INFO - Checkpoints will be saved to .+',
    STAMP + r'INFO - (?:Epoch|Iter)\(train\) .+ loss: .+',
    STAMP + r'INFO - Saving checkpoint at \d+ (?:epochs|iterations)',
    STAMP + r'INFO - Evaluating (?:bbox|segm)\.\.\.',
    r' Average (?:Precision|Recall) .+ = -?\d\.\d+',
    STAMP + r'INFO - per class results:',
    STAMP + r'INFO - ',  # a table follows
    r'[+|].+[+|]',
    STAMP + r'INFO - (?:Epoch|Iter)\(val\) .+',
    r'Wrote .+; next: python tools/test\.py .+',
)
#: Without the schedules, which are for longer runs.
SHORT = {
    'det': ['train_cfg.max_epochs=1', 'param_scheduler=[]'],
    'seg': ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'param_scheduler=[]'],
}
#: Modules that warn in words which no row quotes: someone's own, ours, and a quoted one.
PLANTED_IN = ('planted', 'repnext_mm.layers.gelu', 'mmseg.models.builder')
PLANTED = f"""
import warnings

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Planted(Hook):
    def before_train(self, runner):
        for module in {PLANTED_IN}:
            warnings.warn_explicit(f'from {{module}}', UserWarning, 'file.py', 1, module=module)
        runner.logger.warning('in the log')
"""


# --- a real training


@dataclass
class Training:
    stdout: list[str]
    stderr: list[str]
    log: str  # the log file


@pytest.fixture(scope='module')
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """A detector's as it is, and a segmentor's during which the planted hook warns."""
    found = {}
    for task in SHORT:
        folder = tmp_path_factory.mktemp(task)
        (folder / 'planted.py').write_text(PLANTED)
        config = folder / 'config.py'
        config.write_text(f'_base_ = {str(CONFIGS[task])!r}\n')
        if task == 'seg':
            config.write_text(
                f'{config.read_text()}'
                "custom_imports = dict(imports=['repnext_mm', 'planted'])\n"
                "custom_hooks = [dict(type='Planted')]\n"
            )
        data = tiny_shapes(folder / 'data', train=4, val=2)
        given = [config, '--work-dir=out', *options(task, data, *SHORT[task])]
        path = os.pathsep.join([str(folder), environment()['PYTHONPATH']])
        done = run('train.py', *given, cwd=folder, PYTHONWARNINGS='', PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        (log,) = folder.glob('out/*/*.log')
        found[task] = Training(
            done.stdout.splitlines(), done.stderr.splitlines(), log.read_text('utf-8')
        )
    return found


def unexpected(lines: list[str]) -> list[str]:
    return [line for line in lines if not any(re.fullmatch(kind, line) for kind in EXPECTED)]


def test_a_normal_training_prints_only_what_a_user_can_act_on(
    trainings: dict[str, Training],
) -> None:
    training = trainings['det']
    assert training.stderr == []
    assert unexpected(training.stdout) == []
    assert any('Epoch(val)' in line for line in training.stdout)


def test_unknown_warnings_of_a_training_show(trainings: dict[str, Training]) -> None:
    training = trainings['seg']
    assert training.stderr == [f'file.py:1: UserWarning: from {module}' for module in PLANTED_IN]
    (line,) = unexpected(training.stdout)
    assert re.fullmatch(STAMP + 'WARNING - in the log', line)


def test_every_line_that_is_left_out_is_in_the_log_file(trainings: dict[str, Training]) -> None:
    """It also proves that mmengine still has each of the texts."""
    records = [
        (level, text)
        for training in trainings.values()
        for level, text in re.findall(
            r'^\d{4}/\d\d/\d\d [\d:]+ - mmengine - (\w+) - (.*?)(?=^\d{4}/\d\d/\d\d |\Z)',
            training.log,
            re.DOTALL | re.MULTILINE,
        )
    ]
    for row in LOGGED:
        if row.logger != MMENGINE:
            continue
        assert any(
            level == logging.getLevelName(row.level)
            # mmengine appends how weights were initialized to whatever record came last.
            and re.match(rf'(?s:{row.text})$', text, re.MULTILINE)
            for level, text in records
        ), f'nothing logs {row.text}'


# --- the tables


def _build_loss() -> None:
    from mmseg.models.builder import build_loss
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    build_loss(dict(type='mmseg.FocalLoss'))


def _average_loss() -> None:
    from mmseg.models.losses import CrossEntropyLoss

    CrossEntropyLoss()


def _hook_without_drawing() -> None:
    from mmengine.visualization import Visualizer
    from mmseg.engine.hooks import SegVisualizationHook

    Visualizer.get_instance('test_quiet')
    SegVisualizationHook()


def _draw(shape: str, points: list) -> None:
    from mmengine.visualization import Visualizer

    visualizer = Visualizer(image=np.zeros((8, 8, 3), np.uint8))
    getattr(visualizer, f'draw_{shape}')(np.array(points))


def _traced() -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.trace(nn.Identity(), torch.zeros(1)).eval()


def _load_torchscript() -> None:
    buffer = io.BytesIO(_traced().save_to_buffer())
    torch.jit.load(buffer)


#: One for each row of WARNINGS.
TRIGGERS: tuple[Callable[[], object], ...] = (
    _build_loss,
    _average_loss,
    _hook_without_drawing,
    lambda: _draw('bboxes', [1, 1, 9, 9]),
    lambda: _draw('polygons', [[1, 1], [9, 9], [1, 9]]),
    lambda: torch.jit.trace(nn.Identity(), torch.zeros(1)),
    lambda: torch.jit.trace_module(nn.Identity(), {'forward': torch.zeros(1)}),
    lambda: torch.jit.freeze(_traced()),
    lambda: torch.jit.save(_traced(), io.BytesIO()),
    _load_torchscript,
)
PAIRS = list(zip(WARNINGS, TRIGGERS, strict=True))
NAMES = [f'{row.module}-{i}' for i, row in enumerate(WARNINGS)]


@pytest.mark.compat
@pytest.mark.parametrize('row, trigger', PAIRS, ids=NAMES)
def test_a_quoted_warning_occurs_and_is_left_out(
    row: Warned, trigger: Callable[[], object]
) -> None:
    if row.module.startswith('torch.jit') and TorchVersion(torch.__version__) < (2, 14):
        pytest.skip(f'torch {torch.__version__} does not deprecate TorchScript yet')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.simplefilter('error', row.category)
        with pytest.raises(row.category):
            trigger()
        with quiet():
            trigger()


@pytest.mark.parametrize('row', WARNINGS, ids=NAMES)
def test_nothing_but_the_quoted_warning_is_left_out(row: Warned) -> None:
    quoted = row.text.replace('\\', '')
    others = [
        (quoted, RuntimeWarning, row.module),
        (quoted, row.category, 'someone.elses'),
        (quoted, row.category, f'{row.module}.more'),
        (f'{quoted}, and more', row.category, row.module),
        (f'before {quoted}', row.category, row.module),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with quiet():
            warnings.warn_explicit(quoted, row.category, 'file.py', 1, module=row.module)
            for text, category, module in others:
                with pytest.raises(category):
                    warnings.warn_explicit(text, category, 'file.py', 1, module=module)


@pytest.mark.compat
def test_the_quoted_lines_are_printed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmengine.runner import load_checkpoint
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ann_file = tiny_shapes(tmp_path / 'data') / 'coco/annotations/instances_val2017.json'
    objects = json.loads(ann_file.read_text())['annotations']
    weights = tmp_path / 'weights.pth'
    torch.save(torch.nn.Linear(1, 1).state_dict(), weights)

    def evaluate() -> None:
        truth = COCO(str(ann_file))
        evaluation = COCOeval(truth, truth.loadRes([o | {'score': 1.0} for o in objects]), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        load_checkpoint(torch.nn.Linear(1, 1), str(weights))

    evaluate()
    lines = capsys.readouterr().out.splitlines()
    for row in PRINTED:
        assert any(re.fullmatch(row.text, line) for line in lines), f'nothing prints {row.text}'
    with quiet():
        evaluate()
    assert capsys.readouterr().out == ''


#: Where the source has it: package, and a piece of the text as it is written there.
SOURCES = (
    ('coremltools/_deps/__init__.py', 'Disabling scikit-learn conversion API.'),
    ('coremltools/_deps/__init__.py', ' has not been tested with coremltools. You may run into '),
    ('coremltools/models/model.py', 'Failed to load _MLModelProxy: '),
    (
        'coremltools/converters/mil/frontend/torch/torchir_passes.py',
        'Tuple detected at graph output. This will be flattened in the converted model.',
    ),
    ('coremltools/converters/mil/frontend/torch/ops.py', 'Converting PyTorch Frontend ==> MIL Ops'),
    ('nncf/common/tensor_statistics/aggregator.py', 'Statistics collection'),
    ('nncf/scopes.py', ' ignored nodes were found by '),
    (
        'nncf/common/quantization/quantizer_propagation/solver.py',
        'Not adding activation input quantizer for operation: ',
    ),
    ('torch/utils/cpp_extension.py', 'No CUDA runtime is found, using CUDA_HOME='),
)
QUOTING = (*CHATTER, *(row for row in LOGGED if row.logger != MMENGINE))


@pytest.mark.parametrize('row, source', list(zip(QUOTING, SOURCES, strict=True)))
def test_what_is_quoted_is_in_the_source(row: Printed | Logged, source: tuple[str, str]) -> None:
    path, text = source
    package = path.split('/')[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f'{package} is not installed')
    assert text in (Path(spec.origin).parents[1] / path).read_text()
    anything = re.sub(r'\\([.()*])|\\[wSd]\+', lambda m: m[1] or 'Model', row.text)
    assert text in anything, 'the row quotes something else'


def test_every_row_has_its_reason() -> None:
    assert all(row.reason for row in (*WARNINGS, *LOGGED, *PRINTED, *CHATTER))


# --- what exporters print


@pytest.fixture
def _shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warnings go to stderr, as outside of pytest."""

    def show(message: Warning, category: type, filename: str, lineno: int, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(str(message), category, filename, lineno, ''))

    with warnings.catch_warnings():
        warnings.simplefilter('default')
        monkeypatch.setattr(warnings, 'showwarning', show)
        yield


def _chatter() -> None:
    with muffled():
        print('Tuple detected at graph output. This will be flattened in the converted model.')
        print('Tuple detected at graph output. This will be dropped.')
        bar = 'Running MIL default pipeline: {} 9/9 [00:01<00:00,  7.75 passes/s]'
        print(f'\r{bar.format(" 50%|")}\r{bar.format("100%|")}', file=sys.stderr)
        print('\rother: 50%\rother: 100%', file=sys.stderr)
        warnings.warn_explicit('unknown', UserWarning, 'file.py', 1, module='coremltools')
        warnings.warn_explicit(
            WARNINGS[-1].text.replace('\\', ''), FutureWarning, 'f.py', 1, WARNINGS[-1].module
        )
        raise RuntimeError('broken')


@pytest.mark.usefixtures('_shown')
def test_muffled_passes_on_what_no_row_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match='broken'):
        _chatter()
    out, err = capsys.readouterr()
    assert out == 'Tuple detected at graph output. This will be dropped.\n'
    assert err == 'other: 100%\nfile.py:1: UserWarning: unknown\n'


def test_a_logger_set_up_while_muffled_is_heard_later(capsys: pytest.CaptureFixture[str]) -> None:
    with muffled():
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({'msg': 'first'}))
    handler.emit(logging.makeLogRecord({'msg': 'second'}))
    with muffled():
        handler.emit(logging.makeLogRecord({'msg': 'Statistics collection 100%'}))
    assert capsys.readouterr().err == 'first\nsecond\n'


# --- what stays


def test_importing_the_package_leaves_warnings_and_stdout_alone() -> None:
    code = (
        'import sys, warnings, repnext_mm.engine.cli\n'
        'from repnext_mm.engine.quiet import WARNINGS\n'
        'texts = [f[1].pattern for f in warnings.filters if f[1] is not None]\n'
        'assert not any(row.text in text for row in WARNINGS for text in texts), texts\n'
        'assert sys.stdout is sys.__stdout__\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=environment())


def test_a_tool_leaves_warnings_and_stdout_as_they_were() -> None:
    before, stdout = list(warnings.filters), sys.stdout
    assert run_tool(lambda: None) == 0
    assert warnings.filters == before
    assert sys.stdout is stdout


def test_an_error_shows(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RuntimeError(WARNINGS[0].text)

    assert run_tool(main) == 1
    assert f'RuntimeError: {WARNINGS[0].text}' in capsys.readouterr().err


def test_errors_of_a_log_show_whatever_they_say() -> None:
    logger = logging.Logger(MMENGINE)
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    quiet_log(logger)
    text = 'Exp name: some'
    logger.info(text)
    assert handler.stream.getvalue() == ''
    logger.warning(text)
    logger.error(text)
    logger.info(f'{text} more')
    assert handler.stream.getvalue().splitlines() == [text, text, f'{text} more']


class Warner(Dataset):
    """Warns once as a row quotes it, and once otherwise, where an item is read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        row = WARNINGS[2]
        for text in (row.text.replace('\\', ''), 'unknown'):
            warnings.warn_explicit(text, row.category, 'file.py', 1, module=row.module)
        return index


@pytest.mark.usefixtures('_shown')
def test_data_workers_leave_out_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        list(DataLoader(Warner(), num_workers=1, multiprocessing_context='fork'))
    assert capfd.readouterr().err.splitlines() == ['file.py:1: UserWarning: unknown']


# --- the screen


def test_the_screen_passes_on_at_once_what_is_no_row() -> None:
    stream = io.StringIO()
    screen = _Screen(stream)
    for text in ('a', 'b\n', '\r50 %', '\r100 %', '\n', '', 'creating index... not yet\n', 'x'):
        before = stream.getvalue()
        assert screen.write(text) == len(text)
        assert stream.getvalue() == before + text
    screen.write('creating index...\n')
    assert stream.getvalue().endswith('xcreating index...\n'), 'the end of a line is no row'
    assert screen.isatty() is False


def test_the_screen_holds_a_row_until_its_line_ends() -> None:
    stream = io.StringIO()
    screen = _Screen(stream, patience_s=1000)
    print('creating index...', file=screen)
    assert stream.getvalue() == ''
    screen.write('creating index...')
    screen.write(' and more\n')
    assert stream.getvalue() == 'creating index... and more\n'
    screen.write('index created!')
    screen.release()
    assert stream.getvalue() == 'creating index... and more\nindex created!'


def test_announced_work_shows_only_if_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    screen = _Screen(stream, patience_s=0)
    print('Running per image evaluation...', file=screen)
    assert screen._timer is not None
    screen._timer.join()
    assert stream.getvalue() == 'Running per image evaluation...\n'
    print('DONE (t=61.02s).', file=screen)
    assert stream.getvalue().endswith('...\nDONE (t=61.02s).\n')

    with quiet():
        announce('Counting the files ...')
        assert isinstance(sys.stdout, _Screen)
        timer = sys.stdout._timer
        print('done')
    assert timer is not None and timer.finished.is_set(), 'it is cancelled'
    assert capsys.readouterr().out == 'done\n'

"""Checkpoints of real MMEngine runs load with torch's safe default; hostile ones do not."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

import repnext_mm  # noqa: F401  (importing it is what allows MMEngine's classes)
from repnext_mm.checkpoints import CheckpointError, read_run
from repnext_mm.checkpoints.safe_globals import allow_mmengine_checkpoints, statistics_method

pytestmark = pytest.mark.compat


class Line(BaseModel):
    """y = w x + b, fitted by a real runner."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x: Tensor, y: Tensor, mode: str = 'tensor') -> dict[str, Tensor]:
        return {'loss': (self.fc(x) - y).square().mean()}


def make_runner(work_dir: Path, epochs: int, **kwargs: object) -> Runner:
    x = torch.linspace(0, 1, 16)[:, None]
    dataset = torch.utils.data.TensorDataset(x, 2 * x)
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dataset,
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=dict(type='MultiStepLR', milestones=[1], end=9, by_epoch=True),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1), logger=dict(type='LoggerHook')
        ),
        experiment_name=f'{work_dir.name}-{epochs}',
        **kwargs,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Work folder of a finished one-epoch run."""
    make_runner(tmp_path / 'run', 1).train()
    return tmp_path / 'run'


def test_run_checkpoint_loads_with_the_safe_default(run: Path) -> None:
    checkpoint = torch.load(run / 'epoch_1.pth', weights_only=True)
    losses = checkpoint['message_hub']['log_scalars']['train/loss']
    assert isinstance(losses, HistoryBuffer)
    assert len(losses.data[0]) == 4
    assert losses.statistics('mean') == pytest.approx(losses.data[0].mean())


def test_loading_again_still_works(run: Path) -> None:
    """The onedl stack clears its own allow-list after each load; ours must outlive that."""
    from mmengine.runner.checkpoint import load_checkpoint

    for _ in range(2):
        load_checkpoint(Line(), str(run / 'epoch_1.pth'))
        assert 'optimizer' in torch.load(run / 'epoch_1.pth', weights_only=True)


def test_runner_resumes(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = torch.load(run / 'epoch_1.pth', weights_only=True)
    runner = make_runner(run, 3, resume=True)
    with caplog.at_level(logging.WARNING):
        runner.load_or_resume()
    assert runner.iter == 4
    assert runner.epoch == 1
    assert runner.optim_wrapper.get_lr() == {'lr': [pytest.approx(0.01)]}
    momentum = runner.optim_wrapper.state_dict()['state'][0]['momentum_buffer']
    torch.testing.assert_close(momentum, saved['optimizer']['state'][0]['momentum_buffer'])
    torch.testing.assert_close(runner.model.fc.weight, saved['state_dict']['fc.weight'])
    runner.train()
    assert runner.iter == 12
    assert (run / 'epoch_3.pth').exists()
    logs = ''.join(path.read_text() for path in run.rglob('*.log'))
    assert 'resumed epoch: 1' in logs
    assert 'weights_only=False' not in logs + caplog.text


def test_numpy_values_of_old_runs_load(tmp_path: Path) -> None:
    """mm 2.x kept scores and class names as NumPy scalars; NumPy 1 named its module otherwise."""
    meta = {
        'best_score': np.float32(0.5),
        'iter': np.int64(7),
        'name': np.str_('wall'),
        'done': np.bool_(True),
        'dtype': np.dtype('float16'),
        'palette': np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    path = tmp_path / 'new.pth'
    torch.save({'meta': meta}, path)
    old = tmp_path / 'old.pth'
    with zipfile.ZipFile(path) as archive:
        content = archive.read('new/data.pkl')
    modern = b'numpy._core.multiarray' in content
    other = content.replace(
        *((b'numpy._core.', b'numpy.core.') if modern else (b'numpy.core.', b'numpy._core.'))
    )
    assert other != content
    write_torch_file(old, other)
    for file in (path, old):
        loaded = torch.load(file, weights_only=True)['meta']
        assert (loaded['best_score'], loaded['iter'], loaded['name']) == (0.5, 7, 'wall')
        assert loaded['done']
        assert loaded['dtype'] == np.float16
        np.testing.assert_array_equal(loaded['palette'], meta['palette'])


def test_allowing_twice_changes_nothing() -> None:
    before = set(torch.serialization.get_safe_globals())
    allow_mmengine_checkpoints()
    assert set(torch.serialization.get_safe_globals()) == before


def test_getattr_itself_is_not_allowed() -> None:
    allowed = torch.serialization.get_safe_globals()
    assert getattr not in allowed
    assert (statistics_method, 'builtins.getattr') in allowed


def test_statistics_method_reaches_public_methods_only() -> None:
    buffer = HistoryBuffer()
    buffer.update(2.0)
    assert statistics_method(HistoryBuffer, 'mean') is HistoryBuffer.mean
    assert statistics_method(buffer, 'max')() == 2.0
    buffer.__dict__['mean'] = os.system  # what a file could put there
    assert statistics_method(buffer, 'mean').__func__ is HistoryBuffer.mean


# --- hostile files -----------------------------------------------------------------------------


def write_torch_file(path: Path, content: bytes) -> Path:
    """A file as `torch.save` writes it, with this pickle in it."""
    empty = path.with_suffix('.empty')
    torch.save({}, empty)
    with zipfile.ZipFile(empty) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            data = content if name.endswith('data.pkl') else source.read(name)
            target.writestr(name.replace('empty', path.stem, 1), data)
    return path


def name_op(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def text_op(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text)) + text.encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b'(' + b''.join(args) + b'tR'


GETATTR = name_op('__builtin__', 'getattr')
BUFFER = name_op('mmengine.logging.history_buffer', 'HistoryBuffer')
INSTANCE = BUFFER + b')\x81'
ARRAY = name_op('numpy', 'ndarray')
HOSTILE = {
    'os.system': call(name_op('os', 'system'), text_op('touch {marker}')),
    'eval': call(name_op('__builtin__', 'eval'), text_op('open("{marker}", "w")')),
    'getattr of another class': call(GETATTR, ARRAY, text_op('tofile')),
    'getattr of an array': call(GETATTR, ARRAY + b'K\x01\x85\x85\x81', text_op('tofile')),
    'getattr of itself': call(GETATTR, GETATTR, text_op('__globals__')),
    'globals of a method': call(
        GETATTR, call(GETATTR, BUFFER, text_op('mean')), text_op('__globals__')
    ),
    '__init__': call(GETATTR, BUFFER, text_op('__init__')),
    '__class__': call(GETATTR, INSTANCE, text_op('__class__')),
    '__reduce__': call(GETATTR, INSTANCE, text_op('__reduce__')),
    '__subclasses__': call(GETATTR, BUFFER, text_op('__subclasses__')),
    'private method': call(GETATTR, BUFFER, text_op('_set_default_statistics')),
    'class method': call(GETATTR, BUFFER, text_op('register_statistics')),
    'dotted path': call(GETATTR, BUFFER, text_op('mean.__globals__')),
    'no text': call(GETATTR, BUFFER, b'K\x01'),
    'default value': call(GETATTR, BUFFER, text_op('missing'), name_op('os', 'system')),
    'calling a method': call(call(GETATTR, BUFFER, text_op('update')), INSTANCE, b'K\x01'),
    'calling statistics': call(
        call(GETATTR, INSTANCE + b'}b', text_op('statistics')), text_op('mean')
    ),
    'building a method': call(GETATTR, BUFFER, text_op('mean')) + b'}b',
    'building a class': BUFFER + b'}' + text_op('mean') + b'Nsb',
}


@pytest.mark.parametrize('content', HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(content: bytes, tmp_path: Path) -> None:
    marker = tmp_path / 'ran'
    methods = dict(vars(HistoryBuffer))
    content = content.replace(b'{marker}', str(marker).encode())
    # Lengths of the texts that were replaced above.
    for text in (f'touch {marker}', f'open("{marker}", "w")'):
        content = replace_length(content, text)
    path = write_torch_file(tmp_path / 'hostile.pth', b'\x80\x02' + content + b'.')
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r'hostile\.pth'):
        read_run(path)
    assert not marker.exists()
    assert dict(vars(HistoryBuffer)) == methods


def replace_length(content: bytes, text: str) -> bytes:
    at = content.find(text.encode())
    if at < 0:
        return content
    return content[: at - 4] + struct.pack('<I', len(text.encode())) + content[at:]


def test_smuggled_statistics_reach_nothing(tmp_path: Path) -> None:
    """A file can rename statistics among themselves, but can bring in no function to call."""
    state = b'}' + text_op('statistics_methods') + b'}' + text_op('mean')
    path = write_torch_file(
        tmp_path / 'smuggle.pth',
        b'\x80\x02' + INSTANCE + state + name_op('os', 'system') + b'ssb.',
    )
    with pytest.raises(CheckpointError, match='smuggle'):
        read_run(path)
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean


def test_refused_attribute_is_not_retried_without_protection(tmp_path: Path) -> None:
    """onedl answers an UnpicklingError by an unsafe load; the refusal must not be one."""
    with pytest.raises(CheckpointError, match="attribute 'tofile'") as caught:
        statistics_method(np.empty(0), 'tofile')
    assert not isinstance(caught.value, pickle.UnpicklingError)


def test_a_run_is_read(run: Path) -> None:
    path = run / 'epoch_1.pth'
    assert read_run(path).path == str(path)


def test_a_run_refuses_a_half_written_checkpoint(run: Path) -> None:
    path = run / 'epoch_1.pth'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match='cut short'):
        read_run(path)

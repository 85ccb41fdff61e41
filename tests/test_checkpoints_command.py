"""python -m repnext_mm.checkpoints: what a file contains, and the list of published names."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from weight_files import (
    save_mm2,
)

from repnext_mm.checkpoints import (
    PUBLISHED,
)
from repnext_mm.checkpoints.__main__ import main


def test_command_says_what_a_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, 'argv', ['checkpoints', str(save_mm2(tmp_path / 'a.pth'))])
    monkeypatch.delitem(sys.modules, 'repnext_mm.checkpoints.__main__')
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('repnext_mm.checkpoints', run_name='__main__')
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "torch checkpoint, 661 tensors under 'state_dict'" in output
    assert "fits RepNeXt(arch='m0'): 657 of 657 keys match" in output
    assert "under 'backbone.'" in output


def test_command_lists_the_published_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['--list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PUBLISHED)
    assert all(row.url in line for line, row in zip(lines, PUBLISHED.values(), strict=True))
    with pytest.raises(SystemExit, match='2'):
        main([])


def test_command_fails_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['repnext_m9']) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.count('\n') == 1
    assert 'did you mean' in err


def test_command_on_a_strange_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({'conv1.weight': torch.zeros(2)}, tmp_path / 'a.pth')
    assert main([str(tmp_path / 'a.pth')]) == 0
    assert 'fits no backbone of this package' in capsys.readouterr().out

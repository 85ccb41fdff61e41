"""The page of measurements, and the comparison of two of them; results here are written by hand."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

from repnext_mm.measure import page
from repnext_mm.measure.cli import main

BENCHMARKS = REPO / 'docs' / 'benchmarks'


def row(variant: str, ms: float, ratio: float, verdict: str) -> dict[str, Any]:
    interval = [0.98 * ratio, 1.02 * ratio]
    return dict(variant=variant, p50_ms=ms, ratio=ratio, interval=interval, verdict=verdict)


def result(ratio: float = 0.5, **environment: Any) -> dict[str, Any]:
    machine = dict(cpu='one', architecture='x86_64', isa=['avx2'], threads=2, cores=2, gpu=None)
    return {
        'command': 'train-step',
        'settings': {'dtype': 'float32', 'norm_eval': True},
        'environment': {**machine, 'versions': {'torch': '2.9'}, **environment},
        'load': {'headline': True, 'reason': None},
        'invocation': 'repnext-mm benchmark train-step repnext_m0 --norm-eval',
        'comparisons': [
            {
                'subject': 'repnext_m0',
                'shape': [2, 3, 64, 64],
                'reference': 'branches',
                'floor': {'limit': 1.03},
                'rows': [
                    row('branches', 8.0, 1.0, 'reference'),
                    row('merged', 4.0, ratio, 'faster'),
                ],
            }
        ],
    }


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_page_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / 'train-m0.json', result())
    written(tmp_path / 'other.json', {'no': 'result'})
    (tmp_path / 'broken.json').write_text('{')
    assert main(['page', str(tmp_path)]) == 0
    assert str(tmp_path / 'README.md') in capsys.readouterr().out
    text = (tmp_path / 'README.md').read_text()
    assert '## Training steps' in text
    assert '### repnext_m0, 2x3x64x64, float32, frozen norm statistics' in text
    assert '[train-m0.json](train-m0.json): one (avx2), 2 threads on 2 cores; torch 2.9.' in text
    assert 'Command: `repnext-mm benchmark train-step repnext_m0 --norm-eval`.' in text
    assert (
        '| <a id="train-m0-merged"></a>merged | 4 | 0.500 [0.490, 0.510] | 2.00x | faster |' in text
    )
    assert 'Noise floor: 0.971 to 1.030.' in text
    assert 'other.json' not in text


def test_the_page_of_this_repository_is_that_of_its_results(tmp_path: Path) -> None:
    out = tmp_path / 'README.md'
    page.write(BENCHMARKS, out)
    links = r'\]\([^)]*?([^/)]+)\)'  # which are relative to the page
    drawn, kept = (
        re.sub(links, r'](\1)', path.read_text()) for path in (out, BENCHMARKS / 'README.md')
    )
    skip = 'Drawn by'
    assert [line for line in drawn.splitlines() if not line.startswith(skip)] == [
        line for line in kept.splitlines() if not line.startswith(skip)
    ]


def test_figures_in_the_readme_link_to_their_rows() -> None:
    anchors = set(re.findall(r'<a id="([^"]+)">', (BENCHMARKS / 'README.md').read_text()))
    links = re.findall(r'docs/benchmarks/README\.md#([^)\s]+)', (REPO / 'README.md').read_text())
    assert len(links) >= 3
    assert set(links) <= anchors


@pytest.mark.parametrize(
    'ratio, code, word',
    [
        (0.5, 0, 'no measurable difference'),
        (0.6, 1, 'slower'),
        (0.4, 0, 'faster'),
        (0.512, 0, 'no measurable difference'),
    ],
)
def test_two_results(
    ratio: float, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(tmp_path / 'before.json', result())
    after = written(tmp_path / 'after.json', result(ratio))
    assert main(['compare', str(before), str(after)]) == code
    out, err = capsys.readouterr()
    assert word in out
    assert ('is slower than' in err) == (code == 1)


def test_within_the_noise_of_either_is_no_change(tmp_path: Path) -> None:
    noisy = result(0.6)
    noisy['comparisons'][0]['floor']['limit'] = 1.3
    before, after = (
        page.read(written(tmp_path / f'{i}.json', content))
        for i, content in enumerate((result(), noisy))
    )
    assert [c.verdict for c in page.changes(before, after)] == ['no measurable difference']


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / 'before.json', result())
    other = copy.deepcopy(result())
    other['comparisons'][0]['subject'] = 'repnext_m4'
    cases = {
        'are of two machines (isa, threads differ)': result(isa=['neon'], threads=4),
        'have no variant in common': other,
        'is no result of `repnext-mm benchmark': {'a': 1},
    }
    for message, content in cases.items():
        after = written(tmp_path / 'after.json', content)
        assert main(['compare', str(before), str(after)]) != 0
        assert message in capsys.readouterr().err
    machine = written(tmp_path / 'machine.json', result(isa=['neon']))
    assert main(['compare', str(before), str(machine), '--any-machine']) == 0
    assert main(['compare', str(before), str(tmp_path / 'none.json')]) != 0
    assert main(['page', str(tmp_path / 'none')]) != 0
    assert 'contains no result' in capsys.readouterr().err

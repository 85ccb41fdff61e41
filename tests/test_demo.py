"""The demo end to end, and the pictures and curves that it draws."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from tool_runs import environment, run_here

from repnext_mm.demo import demo_main
from repnext_mm.visualization import Comparison, Region, draw_comparisons, plot_curves, read_scalars

ENV = environment()


def run_demo(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / 'tools/demo.py'), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENV)


# --- the demo


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize(
    'run, args, work_dir, rows, bar',
    [
        (run_demo, [], 'work_dirs/demo_quick', ('box', 'mask'), '--min-ap=1'),
        (
            partial(run_here, demo_main),
            ['--seg'],
            'work_dirs/demo_seg_quick',
            ('all classes',),
            '--min-miou=1',
        ),
        (
            partial(run_here, demo_main),
            ['--cls'],
            'work_dirs/demo_cls_quick',
            ('trained', 'fused'),
            '--min-top1=1',
        ),
    ],
    ids=['detection', 'segmentation', 'classification'],
)
def test_the_quick_demo(
    run: Callable[..., subprocess.CompletedProcess],
    args: list[str],
    work_dir: str,
    rows: tuple[str, ...],
    bar: str,
    tmp_path: Path,
) -> None:
    done = run('--quick', *args, bar, cwd=tmp_path)
    # A few iterations learn nothing, so the bar of 1 is missed, after everything was written.
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    assert 'below the 1.00 asked for' in done.stderr.strip().splitlines()[-1]
    for row in rows:
        # Its line is drawn in ASCII where the locale has nothing better.
        assert re.search(rf'^\W {row} ', done.stdout, re.MULTILINE)
    *_, pictures, curves, checkpoint = done.stdout.strip().splitlines()
    for line in (pictures, curves, checkpoint):
        assert (tmp_path / line.split(': ')[1]).is_file()
    assert Path(tmp_path, work_dir, 'predictions.png').is_file()
    assert Path(tmp_path, work_dir, 'curves.png').is_file()
    assert len(read_scalars(tmp_path / work_dir).val) == 2
    for name in ('predictions', 'curves'):
        picture = np.asarray(Image.open(tmp_path / work_dir / f'{name}.png').convert('RGB'))
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 10, 'it is blank'


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / 'tools/demo.py'), '--data-root', 'data/s']
    demo = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: a shell's background jobs, and so this test in one, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # While the images are drawn: a scratch folder beside the data set is there.
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob('data/.s-*/new/ade')):
            assert demo.poll() is None, demo.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=120)
    finally:
        demo.kill()
    assert demo.returncode == 130, err
    assert 'Traceback' not in err
    assert err.strip().splitlines()[-1] == 'interrupted'
    assert list((tmp_path / 'data').iterdir()) == [], 'a scratch folder is left'


@pytest.mark.parametrize(
    'args, code, words',
    [
        (['--min-ap', '40'], 2, 'must be from 0 to 1, not 40'),
        (['--min-ap', 'high'], 2, "'high'"),
        (['--quick', '--data-root', 'taken'], 1, 'not a sample data set'),
        (['--quick', '--work-dir', 'taken/mine.txt'], 1, 'taken/mine.txt cannot be written'),
    ],
)
def test_the_demo_explains_in_one_sentence(
    tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/mine.txt').touch()
    done = run_here(demo_main, *args, cwd=tmp_path)
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert words in last
    assert 'Traceback' not in done.stderr


# --- curves


def write_log(work_dir: Path, stamp: str, records: list[dict | str]) -> None:
    folder = work_dir / stamp / 'vis_data'
    folder.mkdir(parents=True)
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    (folder / 'scalars.json').write_text('\n'.join(lines))


def train(step: int, loss: float = 1.0, **more: float) -> dict:
    return {'loss': loss, 'loss_cls': loss / 2, 'lr': 0.1, 'iter': step, 'step': step, **more}


def test_scalars_of_a_run_by_iterations(tmp_path: Path) -> None:
    write_log(tmp_path, '1', [train(10), train(20), {'mIoU': 40.0, 'step': 20}, '{"loss": 0.'])
    scalars = read_scalars(tmp_path)
    assert [i for i, _ in scalars.train] == [10, 20]
    assert scalars.val == [(20, {'mIoU': 40.0, 'step': 20})]


def test_evaluations_after_epochs_are_placed_by_iterations(tmp_path: Path) -> None:
    records = [train(50, epoch=1), train(100, epoch=1), {'coco/bbox_mAP': 0.1, 'step': 1}]
    records += [train(150, epoch=2), train(200, epoch=2), {'coco/bbox_mAP': 0.2, 'step': 2}]
    write_log(tmp_path, '1', records)
    assert [i for i, _ in read_scalars(tmp_path).val] == [100, 200]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    write_log(tmp_path, '1', [train(10, 5), train(20, 4), {'mIoU': 1.0, 'step': 20}, train(30, 3)])
    write_log(tmp_path, '2', [train(20, 2), {'mIoU': 2.0, 'step': 20}, train(30, 1)])
    scalars = read_scalars(tmp_path)
    assert [(i, r['loss']) for i, r in scalars.train] == [(10, 5), (20, 2), (30, 1)]
    assert [(i, r['mIoU']) for i, r in scalars.val] == [(20, 2.0)]


def test_a_new_run_in_the_same_folder_replaces_the_old_one(tmp_path: Path) -> None:
    write_log(tmp_path, '1', [train(10), train(20), {'mIoU': 1.0, 'step': 20}])
    write_log(tmp_path, '2', [train(10)])
    scalars = read_scalars(tmp_path)
    assert [i for i, _ in scalars.train] == [10]
    assert scalars.val == []


def test_curves_are_drawn_for_both_tasks(tmp_path: Path) -> None:
    both = {'coco/bbox_mAP': 0.3, 'coco/segm_mAP': 0.25, 'mIoU': 50.0, 'step': 20}
    write_log(tmp_path, '1', [train(10), train(20), both])
    out = plot_curves(tmp_path, tmp_path / 'new' / 'curves.png')
    assert Image.open(out).size[0] > 600
    assert [p.name for p in out.parent.iterdir()] == ['curves.png'], 'a temporary file is left'


def test_curves_without_a_log_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='give the work dir of a training run'):
        plot_curves(tmp_path, tmp_path / 'curves.png')


# --- pictures


def test_regions_are_painted_in_the_colour_of_their_class(tmp_path: Path) -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    half = np.zeros((32, 32), bool)
    half[:, :16] = True
    none: list[Region] = []
    rows = [
        Comparison(grey, [Region(0, half)], [Region(1, half)]),
        Comparison(grey, [Region(0, half, np.array([0, 0, 16, 32]), 0.9)], none),
        Comparison(grey, none, none),
    ]
    out = draw_comparisons(rows, ['a', 'b'], tmp_path / 'p.png', per_row=1)
    pixels = np.asarray(Image.open(out).convert('RGB')).astype(int)
    blue, orange = (
        np.abs(pixels - 0.45 * 128 - 0.55 * np.array(colour)).max(axis=-1) < 3
        for colour in ((31, 119, 180), (255, 127, 14))  # tab10's first two
    )
    assert blue.sum() > 2 * orange.sum() * 0.9 > 0, 'two truths, one prediction'


@pytest.mark.parametrize('classes', [3, 150])
def test_any_number_of_classes_and_images(tmp_path: Path, classes: int) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [Comparison(image, [Region(classes - 1, image[..., 0] == 0)], [])] * 3
    names = [f'class {i}' for i in range(classes)]
    assert draw_comparisons(rows, names, tmp_path / 'p.png').is_file()

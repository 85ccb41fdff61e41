"""`repnext-mm predict` and `repnext_mm.Predictor`: mm's own predictions, from and to files."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import labeled_folders as made
import numpy as np
import own_models
import pytest
import torch
from conftest import REPO
from PIL import Image
from tool_runs import environment

import repnext_mm
from repnext_mm.checkpoints import read_run
from repnext_mm.datasets.folders import LabeledFolder, read_folder
from repnext_mm.engine.errors import UserError
from repnext_mm.engine.inference import config_of
from repnext_mm.prediction import command
from repnext_mm.prediction.command import predict_main
from repnext_mm.prediction.sources import find_sources

KINDS = {
    'boxes': 'rtmdet',
    'polygons': 'mask_rcnn',
    'masks': 'semantic_fpn',
    'classes': 'classifier',
}


@pytest.fixture(scope='module')
def folders(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    real = made.real(data_root)
    root = tmp_path_factory.mktemp('own')
    examples = own_models.eight(real)[:3]
    return {kind: own_models.write(real, examples, root / kind, kind) for kind in KINDS}


@pytest.fixture(scope='module')
def checkpoints(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A network with random weights for each kind of labels, as a run stores it."""
    root = tmp_path_factory.mktemp('checkpoints')
    found = {}
    for kind, folder in folders.items():
        lite = ['--lite'] if kind != 'classes' else []
        path = own_models.config(folder, root / kind, '--size=128', *lite)
        found[kind] = own_models.checkpoint(path, root / f'{kind}.pth')
    return found


def images(folder: Path) -> list[Path]:
    found = read_folder(folder)
    return [found.root / example.file for example in found.examples()]


def run(capsys: pytest.CaptureFixture[str], *command: Any) -> tuple[int, str, str]:
    code = predict_main([str(part) for part in command])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- equal to mm's own


@pytest.mark.compat
@pytest.mark.parametrize('kind', ['boxes', 'polygons'])
def test_detections_are_those_of_mmdet(
    kind: str, folders: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    from mmdet.apis import inference_detector, init_detector

    path = checkpoints[kind]
    model = init_detector(path.with_suffix('') / f'{kind}.py', str(path), device='cpu')
    predictor = repnext_mm.Predictor(path, device='cpu')
    assert predictor.task == 'detection'
    for image in images(folders[kind]):
        wanted = inference_detector(model, str(image)).pred_instances
        order = torch.argsort(wanted.scores, descending=True, stable=True)
        found = predictor(image)
        assert len(found['scores']) > 0
        np.testing.assert_array_equal(found['boxes'], wanted.bboxes[order].numpy())
        np.testing.assert_array_equal(found['scores'], wanted.scores[order].numpy())
        np.testing.assert_array_equal(found['labels'], wanted.labels[order].numpy())
        if kind == 'polygons':
            np.testing.assert_array_equal(found['masks'], wanted.masks[order].numpy())


@pytest.mark.compat
def test_label_maps_are_those_of_mmseg(
    folders: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    from mmseg.apis import inference_model, init_model

    path = checkpoints['masks']
    model = init_model(str(path.with_suffix('') / 'masks.py'), str(path), device='cpu')
    predictor = repnext_mm.Predictor(path, device='cpu')
    for image in images(folders['masks']):
        wanted = inference_model(model, str(image)).pred_sem_seg.data[0].numpy()
        np.testing.assert_array_equal(predictor(image)['classes'], wanted)


def test_classes_are_those_of_the_test_tool(
    folders: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    cfg = Config.fromfile(checkpoints['classes'].with_suffix('') / 'classes.py')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    predictor = repnext_mm.Predictor(checkpoints['classes'], device='cpu')
    assert predictor.trained
    for i in range(len(dataset)):
        with torch.no_grad():
            logits = predictor.trained.model(dataset[i]['inputs'][None])[0]
        found = predictor(dataset.filename(i))['probabilities']
        np.testing.assert_allclose(found, logits.softmax(0).numpy(), atol=1e-6)


def test_batches_change_nothing(folders: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    predictor = repnext_mm.Predictor(checkpoints['polygons'], device='cpu')
    paths = [*images(folders['polygons'])] * 2
    together = predictor.batch(paths)
    for path, found in zip(paths, together, strict=True):
        alone = predictor(path)
        np.testing.assert_allclose(found['boxes'], alone['boxes'], atol=1e-3)
        np.testing.assert_array_equal(found['labels'], alone['labels'])


def test_a_checkpoint_of_others_without_a_config_asks_for_one(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    content = torch.load(checkpoints['boxes'], weights_only=True)
    bare = tmp_path / 'bare.pth'
    torch.save({'state_dict': content['state_dict']}, bare)
    with pytest.raises(UserError, match='does not store the config of its model'):
        repnext_mm.Predictor(bare)
    config = checkpoints['boxes'].with_suffix('') / 'boxes.py'
    assert repnext_mm.Predictor(bare, str(config), device='cpu').task == 'detection'


def test_no_code_of_a_checkpoint_is_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    content = torch.load(checkpoints['boxes'], weights_only=True)
    marker = tmp_path / 'ran'
    content['meta']['cfg'] += f'\nimport pathlib\npathlib.Path({str(marker)!r}).touch()\n'
    content['meta']['cfg'] += f'x = pathlib.Path({str(marker)!r}).touch()\n'
    path = tmp_path / 'code.pth'
    torch.save(content, path)
    assert config_of(read_run(path)).model.type == 'RTMDet'
    assert not marker.exists()


def test_wrong_arrays_are_refused(checkpoints: dict[str, Path]) -> None:
    predictor = repnext_mm.Predictor(checkpoints['boxes'], device='cpu')
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), None):
        with pytest.raises(ValueError, match=r'give .H, W, 3. uint8'):
            predictor(array)  # type: ignore[arg-type]


# --- what is written


def test_results_are_read_by_pycocotools(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from pycocotools import mask as coco_masks

    data = folders['polygons']
    code, out, err = run(
        capsys, checkpoints['polygons'], data, '--out', tmp_path / 'out', '--threshold', 0.05,
        '--save', 'pictures,json,masks,yolo',
    )  # fmt: skip
    assert (code, err) == (0, '')
    assert '3 images, ' in out
    predictor = repnext_mm.Predictor(checkpoints['polygons'])
    records = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    names = sorted(path.relative_to(data).as_posix() for path in images(data))
    for number, name in enumerate(names, 1):
        found = predictor(data / name)
        keep = found['scores'] >= 0.05
        rows = [row for row in records if row['file_name'] == name]
        assert {row['image_id'] for row in rows} == {number}
        assert len(rows) == keep.sum() > 0
        for row, box, score, label, mask in zip(
            rows, found['boxes'], found['scores'], found['labels'], found['masks'], strict=False
        ):
            x, y, w, h = row['bbox']
            np.testing.assert_allclose([x, y, x + w, y + h], box, atol=2e-3)
            assert row['score'] == pytest.approx(score, abs=1e-6)
            assert row['category_name'] == predictor.classes[label]
            np.testing.assert_array_equal(coco_masks.decode(row['segmentation']), mask)
        picture = Image.open(tmp_path / 'out' / name)
        assert picture.size == Image.open(data / name).size
        numbers = np.asarray(Image.open((tmp_path / 'out' / 'masks' / name).with_suffix('.png')))
        assert numbers.max() <= len(found['masks'])
        lines = (tmp_path / 'out' / 'labels' / name).with_suffix('.txt').read_text().splitlines()
        assert len(lines) == keep.sum()


def test_labels_of_yolo_are_read_back(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = Path(shutil.copytree(folders['boxes'], tmp_path / 'data'))
    out = tmp_path / 'out'
    command = [checkpoints['boxes'], data / 'images' / 'train', '--out', out, '--save=yolo']
    assert run(capsys, *command, '--threshold=0')[0] == 0
    shutil.rmtree(data / 'labels')
    shutil.copytree(out / 'labels', data / 'labels' / 'train')
    predictor = repnext_mm.Predictor(checkpoints['boxes'])
    folder: LabeledFolder = read_folder(data)
    for example in folder.examples():
        found = predictor(data / example.file)
        assert len(found['boxes']) > 0
        boxes = np.clip(found['boxes'], 0, [example.width, example.height] * 2)
        got = np.array([item.box for item in example.objects])
        np.testing.assert_allclose(got[:, :2], boxes[:, :2], atol=2e-3)
        np.testing.assert_allclose(got[:, :2] + got[:, 2:], boxes[:, 2:], atol=2e-3)


def test_label_maps_are_written_as_they_are(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (path, *_) = images(folders['masks'])
    out = tmp_path / 'out'
    command = [checkpoints['masks'], path, '--out', out, '--save=masks']
    assert run(capsys, *command)[0] == 0
    found = np.asarray(Image.open(out / 'masks' / f'{path.stem}.png'))
    np.testing.assert_array_equal(
        found, repnext_mm.Predictor(checkpoints['masks'])(path)['classes']
    )


def test_the_truth_beside(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for kind in KINDS:
        out = tmp_path / kind
        command = [checkpoints[kind], folders[kind], '--show-truth', '--out', out]
        code, _, err = run(capsys, *command)
        assert (code, err) == (0, '')
        for path in images(folders[kind]):
            drawn = Image.open(out / path.relative_to(folders[kind]))
            assert drawn.width == 2 * max(Image.open(path).width, 160) + 8
    code, _, err = run(capsys, checkpoints['masks'], folders['boxes'], '--show-truth')
    assert code == 1
    assert 'which the model does not have' in err


def test_classes_are_filtered(
    folders: dict[str, Path], checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = repnext_mm.Predictor(checkpoints['boxes'])
    (path, *_) = images(folders['boxes'])
    label = int(np.bincount(predictor(path)['labels']).argmax())
    command = [checkpoints['boxes'], path, '--json', '--classes', predictor.classes[label]]
    code, out, _ = run(capsys, *command)
    (record,) = json.loads(out)
    assert code == 0
    assert {row['label'] for row in record['detections']} == {label}
    code, _, err = run(capsys, checkpoints['boxes'], path, '--classes=nonsense')
    assert code == 1
    assert "no class 'nonsense'" in err


# --- sources


def test_names_of_outputs_are_those_of_the_files(tmp_path: Path) -> None:
    for name in ('a/x.jpg', 'a/sub/y.png', 'b/x.jpg', 'c.jpg', 'd.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name, format='PNG')

    def names(*given: str) -> list[str]:
        return [source.name for source in find_sources([str(tmp_path / g) for g in given])]

    assert names('a') == ['sub/y.png', 'x.jpg']
    assert names('c.jpg', 'a') == ['c.jpg', 'sub/y.png', 'x.jpg']
    assert names('a', 'b') == ['sub/y.png', 'a/x.jpg', 'b/x.jpg']
    assert names('b/*.jpg') == ['x.jpg']
    assert names('**/*.png') == ['y.png']
    (tmp_path / 'd.txt').write_text('a/x.jpg\nc.jpg\n')
    assert [s.path for s in find_sources([str(tmp_path / 'd.txt')])] == [
        tmp_path / 'a/x.jpg', tmp_path / 'c.jpg',
    ]  # fmt: skip
    for wrong, said in (('e*', 'no image and no video matches'), ('empty', 'contains no image')):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        with pytest.raises(UserError, match=said):
            names(wrong)


def test_a_list_on_standard_input(
    folders: dict[str, Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = images(folders['classes'])
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(map(str, paths))))
    code, out, _ = run(capsys, checkpoints['classes'], '-', '--json')
    assert code == 0
    assert [record['file'] for record in json.loads(out)] == [str(path) for path in paths]


def test_what_is_broken_is_named_and_skipped(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (good, *_) = images(folders['boxes'])
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(good.read_bytes()[:300])
    (tmp_path / 'text.png').write_text('no image')
    absent = tmp_path / 'absent.jpg'
    out = tmp_path / 'out'
    command = [checkpoints['boxes'], cut, good, tmp_path / 'text.png', absent, '--out', out]
    code, printed, err = run(capsys, *command, '--threshold=0')
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith('skipped: ') for line in lines)
    for name in ('cut.jpg', 'text.png', 'absent.jpg'):
        assert sum(name in line for line in lines) == 1
    assert '1 images, ' in printed
    assert (out / good.name).is_file()
    assert json.loads((out / 'predictions.json').read_text())


def test_nothing_is_written_over(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (path, *_) = images(folders['classes'])
    mine = Path(shutil.copy(path, tmp_path / 'mine.jpg'))
    before = mine.read_bytes()
    code, _, err = run(capsys, checkpoints['classes'], mine, '--out', mine)
    assert (code, 'is one of the images' in err) == (1, True)
    code, out, _ = run(capsys, checkpoints['classes'], mine, '--out', tmp_path)
    assert code == 0
    assert 'has files already, so this run writes to' in out
    assert mine.read_bytes() == before
    assert (tmp_path.with_name(f'{tmp_path.name}_2') / 'mine.jpg').is_file()


def video(path: Path, frames: list[np.ndarray]) -> Path:
    height, width = frames[0].shape[:2]
    code = cv2.VideoWriter_fourcc(*'MJPG')  # type: ignore[attr-defined]
    writer = cv2.VideoWriter(str(path), code, 5, (width, height))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def test_videos(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = cv2.imread(str(images(folders['boxes'])[0]))
    frames = [np.roll(first, 9 * i, 1) for i in range(6)]
    path = video(tmp_path / 'clip.avi', frames)
    out = tmp_path / 'out'
    command = [checkpoints['boxes'], path, '--out', out, '--threshold=0', '--stride=2']
    code, printed, err = run(capsys, *command)
    assert (code, err) == (0, '')
    assert '3 images, ' in printed
    records = json.loads((out / 'predictions.json').read_text())
    assert {record['frame'] for record in records} == {0, 2, 4}
    drawn = cv2.VideoCapture(str(out / 'clip.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    predictor = repnext_mm.Predictor(checkpoints['boxes'])
    read = cv2.VideoCapture(str(path)).read()[1]
    even = [side + side % 2 for side in read.shape[:2]]
    assert drawn.read()[1].shape == (*even, 3)  # as its codec requires
    best = next(record for record in records if record['frame'] == 0)
    assert best['score'] == pytest.approx(float(predictor(read)['scores'][0]), abs=1e-6)


def test_a_video_that_ends_early(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = cv2.imread(str(images(folders['boxes'])[0]))
    path = video(tmp_path / 'clip.avi', [np.roll(first, 9 * i, 1) for i in range(8)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    out = tmp_path / 'out'
    code, _, err = run(capsys, checkpoints['boxes'], path, '--out', out, '--threshold=0')
    assert code == 1
    assert 'of 8 frames' in err
    assert (out / 'clip.mp4').is_file()
    frames = {r['frame'] for r in json.loads((out / 'predictions.json').read_text())}
    assert 1 <= len(frames) < 8
    (tmp_path / 'no.mp4').write_text('nothing')
    code, _, err = run(capsys, checkpoints['boxes'], tmp_path / 'no.mp4')
    assert (code, 'is not a video that can be read' in err) == (1, True)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_there(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (path, *_) = images(folders['boxes'])
    many = tmp_path / 'many'
    many.mkdir()
    for i in range(2000):
        os.link(path, many / f'{i:04}.jpg') if i else shutil.copy(path, many / '0000.jpg')
        path = many / '0000.jpg'
    out = tmp_path / 'out'
    with open(tmp_path / 'output.txt', 'w') as output:
        process = subprocess.Popen(
            [sys.executable, '-m', 'repnext_mm_cli', 'predict', str(checkpoints['boxes']),
             str(many), '--out', str(out), '--threshold=0'],
            env=environment() | {'PYTHONPATH': f'{REPO}:{REPO / "tools"}'},
            stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / '0002.jpg').exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    text = (tmp_path / 'output.txt').read_text()
    assert 'Traceback' not in text
    written = {r['file_name'] for r in json.loads((out / 'predictions.json').read_text())}
    pictures = {path.name for path in out.glob('*.jpg')}
    assert written <= pictures | {max(written)}
    assert 3 <= len(written) < 2000


def test_a_checkpoint_on_the_cpu_keeps_freed_memory(
    folders: dict[str, Path],
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(command, 'keep_freed_memory', lambda: asked.append(True))
    image = images(folders['boxes'])[0]
    assert run(capsys, checkpoints['boxes'], image, '--device', 'cpu')[0] == 0
    assert asked == [True]

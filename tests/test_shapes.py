"""The generated sample data set: what is drawn, what is written, and what is left alone."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from mmengine.config import Config
from PIL import Image
from tool_runs import run_here, script, succeed_here

from repnext_mm.datasets import shapes
from repnext_mm.datasets.shapes import Scene, ShapesError, Spec

SPEC = Spec(train=24, val=8)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.generate(tmp_path_factory.mktemp('sample') / 'shapes', SPEC)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob('*')) if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def coco(root: Path, split: str) -> dict:
    return json.loads((root / f'coco/annotations/instances_{split}2017.json').read_text())


def scenes(count: int, size: int = 128) -> list[Scene]:
    return [shapes.draw_scene(np.random.default_rng((7, i)), size) for i in range(count)]


# --- scenes


def test_equal_generators_draw_equal_scenes() -> None:
    one, two = (shapes.draw_scene(np.random.default_rng(3), 96) for _ in range(2))
    other = shapes.draw_scene(np.random.default_rng(4), 96)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert not np.array_equal(one.image, other.image)


def test_version_2_draws_these_scenes() -> None:
    # If it fails because the drawing was changed: raise VERSION, so that old folders are renewed.
    assert shapes.VERSION == 2
    drawn = [shapes.draw_scene(np.random.default_rng((0, i)), 128) for i in range(3)]
    found = [[instance.label for instance in scene.instances] for scene in drawn]
    assert found == [[0, 2, 1, 4, 4], [3, 1], [2, 2, 1, 2]]
    # Not to the last digit: sines differ between processors.
    assert [scene.image.mean() for scene in drawn] == pytest.approx([100.0, 147.6, 95.3], abs=0.2)
    areas = [sum(instance.mask.sum() for instance in scene.instances) for scene in drawn]
    assert areas == pytest.approx([3035, 1976, 5016], abs=5)


def test_masks_are_disjoint_and_agree_with_the_label_map() -> None:
    for scene in scenes(20):
        from_masks = np.zeros_like(scene.labels)
        for instance in scene.instances:
            assert not from_masks[instance.mask].any(), 'a pixel belongs to two instances'
            from_masks[instance.mask] = instance.label + 1
        things = (scene.labels > 0) & (scene.labels <= len(shapes.THINGS))
        np.testing.assert_array_equal(from_masks, np.where(things, scene.labels, 0))


def test_a_shape_in_front_takes_the_pixels_of_the_one_behind() -> None:
    painter = shapes._Painter(np.random.default_rng(0), 128)
    disc, square = shapes.THINGS.index('disc'), shapes.THINGS.index('square')
    assert painter.add(disc, [(np.array([50.0, 64.0]), 28.0)])
    whole = painter.scene().instances[0].mask
    assert painter.add(square, [(np.array([80.0, 64.0]), 22.0)])
    behind, front = (instance.mask for instance in painter.scene().instances)
    assert front[64, 72]
    assert whole[64, 72]
    np.testing.assert_array_equal(behind, whole & ~front)
    assert 0 < behind.sum() < whole.sum()


def test_a_shape_that_would_hide_another_is_not_painted() -> None:
    painter = shapes._Painter(np.random.default_rng(0), 128)
    assert painter.add(0, [(np.array([64.0, 64.0]), 12.0)])
    before = painter.image.copy()
    assert not painter.add(0, [(np.array([64.0, 64.0]), 40.0)])
    np.testing.assert_array_equal(painter.image, before)
    assert len(painter.scene().instances) == 1


def test_a_ring_has_a_hole_and_a_star_five_tips() -> None:
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    assert shapes.OUTLINES['ring'](x, y, 0.5)[100, 100] > 0
    rim = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    inside = shapes.OUTLINES['star'](0.8 * np.cos(rim), 0.8 * np.sin(rim), 0.5) < 0
    assert np.count_nonzero(inside & ~np.roll(inside, 1)) == 5


def test_scenes_vary_in_class_size_and_occlusion() -> None:
    drawn = [instance for scene in scenes(60) for instance in scene.instances]
    assert {instance.label for instance in drawn} == set(range(len(shapes.THINGS)))
    areas = [instance.mask.sum() for instance in drawn if not instance.crowd]
    assert max(areas) > 15 * min(areas)
    assert min(areas) >= shapes.MIN_AREA * 128**2


def test_scenes_scale_with_their_size() -> None:
    small, large = scenes(8, 64), scenes(8, 256)
    share = [
        np.mean([i.mask.mean() for scene in many for i in scene.instances])
        for many in (small, large)
    ]
    assert share[0] == pytest.approx(share[1], rel=0.5)


# --- files


def test_the_same_parameters_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    script = (
        'from repnext_mm.datasets import shapes\n'
        f'shapes.generate({str(tmp_path / "again")!r}, shapes.Spec(train=24, val=8))'
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=REPO)
    assert digests(tmp_path / 'again') == digests(root)


def test_another_seed_gives_other_images(root: Path, tmp_path: Path) -> None:
    other = shapes.generate(tmp_path / 'other', Spec(train=2, val=1, seed=1))
    ours, theirs = (
        {d for name, d in digests(r).items() if name.endswith('.jpg')} for r in (root, other)
    )
    assert not ours & theirs


def test_a_scene_does_not_depend_on_how_many_there_are(root: Path, tmp_path: Path) -> None:
    fewer = digests(shapes.generate(tmp_path / 'fewer', Spec(train=3, val=2)))
    whole = digests(root)
    for name in (
        'images/training/ADE_train_00000003.jpg',
        'images/validation/ADE_val_00000002.jpg',
    ):
        assert fewer[f'ade/{name}'] == whole[f'ade/{name}']


def test_no_image_repeats_within_or_across_the_splits(root: Path) -> None:
    pixels = [
        np.asarray(Image.open(path)).tobytes() for path in sorted((root / 'coco').rglob('*.jpg'))
    ]
    assert len(pixels) == SPEC.train + SPEC.val
    assert len(set(pixels)) == len(pixels)
    ids = [image['id'] for split in ('train', 'val') for image in coco(root, split)['images']]
    assert len(set(ids)) == len(ids)


def test_both_layouts_hold_the_same_images(root: Path) -> None:
    for coco_name, ade_name in shapes.SPLITS.values():
        ours = sorted((root / 'coco' / coco_name).iterdir())
        theirs = sorted((root / 'ade/images' / ade_name).iterdir())
        assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_follow_from_the_masks(root: Path, split: str) -> None:
    from pycocotools.coco import COCO

    coco_name, ade_name = shapes.SPLITS[split]
    api = COCO(str(root / f'coco/annotations/instances_{coco_name}.json'))
    assert [c['name'] for c in api.loadCats(sorted(api.getCatIds()))] == list(shapes.THINGS)
    label_files = sorted((root / 'ade/annotations' / ade_name).iterdir())
    image_ids = sorted(api.getImgIds())
    assert len(label_files) == len(image_ids) == getattr(SPEC, split)
    for image_id, label_file in zip(image_ids, label_files, strict=True):
        labels = np.asarray(Image.open(label_file))
        assert labels.dtype == np.uint8
        assert labels.shape == (SPEC.size, SPEC.size)
        rebuilt = np.zeros_like(labels)
        for annotation in api.loadAnns(api.getAnnIds(image_id)):
            mask = api.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert annotation['area'] == mask.sum() > 0
            rebuilt[mask] = annotation['category_id']
        things = labels <= len(shapes.THINGS)
        np.testing.assert_array_equal(rebuilt, np.where(things, labels, 0))
        assert labels.max() <= len(shapes.CLASSES)


def test_crowds_are_marked() -> None:
    # About every 25th scene has one.
    crowds = [i for scene in scenes(120) for i in scene.instances if i.crowd]
    assert crowds
    assert all(shapes._annotation(crowd)['iscrowd'] == 1 for crowd in crowds)


@pytest.mark.parametrize('pattern', ['zeros', 'ones', 'noise', 'ring'])
def test_run_lengths_survive_pycocotools(pattern: str) -> None:
    from pycocotools import mask as mask_api

    y, x = np.mgrid[:13, :9]
    mask = {
        'zeros': np.zeros((13, 9), bool),
        'ones': np.ones((13, 9), bool),
        'noise': np.random.default_rng(0).random((13, 9)) > 0.5,
        'ring': np.abs(np.hypot(x - 4, y - 6) - 3) < 1,
    }[pattern]
    encoded = shapes.encode_rle(mask)
    decoded = mask_api.decode(mask_api.frPyObjects(encoded, *mask.shape))
    np.testing.assert_array_equal(decoded.astype(bool), mask)
    json.dumps(encoded)


# --- what the frameworks make of it


def build_dataset(config: str, root: Path, loader: str = 'train_dataloader') -> object:
    from mmengine.registry import DATASETS, DefaultScope

    cfg = Config.fromfile(REPO / 'configs' / config)
    dataset = cfg[loader].dataset
    dataset.data_root = str(root)
    scope = cfg.default_scope
    __import__(f'{scope}.utils', fromlist=['register_all_modules']).register_all_modules(False)
    with DefaultScope.overwrite_default_scope(scope):
        return DATASETS.build(dataset)


@pytest.mark.compat
def test_mmdet_reads_it(root: Path) -> None:
    dataset = build_dataset('mask_rcnn_repnext_m0_shapes.py', root / 'coco')
    assert dataset.metainfo['classes'] == shapes.THINGS
    content = coco(root, 'train')
    annotated = {a['image_id'] for a in content['annotations'] if not a['iscrowd']}
    assert len(dataset) == len(annotated) > SPEC.train / 2
    wanted = {
        i: sum(a['image_id'] == i and not a['iscrowd'] for a in content['annotations'])
        for i in annotated
    }
    for item in dataset:
        instances = item['data_samples'].gt_instances
        assert len(instances) == wanted[item['data_samples'].img_id]
        for mask, box in zip(instances.masks.masks, instances.bboxes.tensor.tolist(), strict=True):
            rows, columns = np.nonzero(mask)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == pytest.approx(found, abs=1), 'boxes and masks are flipped alike'


@pytest.mark.compat
def test_mmseg_reads_it(root: Path) -> None:
    dataset = build_dataset('semantic_fpn_repnext_m0_shapes.py', root / 'ade', 'val_dataloader')
    assert tuple(dataset.metainfo['classes']) == shapes.CLASSES
    assert len(dataset) == SPEC.val
    for number, item in enumerate(dataset):
        sample = item['data_samples']
        name = f'ADE_val_{number + 1:08d}.png'
        written = np.asarray(Image.open(root / 'ade/annotations/validation' / name))
        # 0, the void, becomes 255, and classes start from 0.
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), written - np.uint8(1))


# --- ensure


def test_ensure_makes_what_is_absent_and_keeps_what_is_there(tmp_path: Path) -> None:
    root, spec = tmp_path / 'deep' / 'shapes', Spec(train=2, val=1)
    assert shapes.ensure(root, spec) == root
    stamp = (root / shapes.MARKER).stat().st_mtime_ns
    shapes.ensure(root, spec)
    shapes.ensure(root)  # any parameters will do
    assert (root / shapes.MARKER).stat().st_mtime_ns == stamp
    assert [p.name for p in root.parent.iterdir()] == ['shapes'], 'no scratch folder is left'


def test_ensure_follows_the_parameters(tmp_path: Path) -> None:
    root = shapes.ensure(tmp_path / 'shapes', Spec(train=2, val=1))
    shapes.ensure(root, Spec(train=3, val=1, size=64))
    assert shapes.read_marker(root) == Spec(train=3, val=1, size=64)
    assert len(list((root / 'coco/train2017').iterdir())) == 3
    assert {Image.open(p).size for p in (root / 'coco').rglob('*.jpg')} == {(64, 64)}
    assert {Image.open(p).size for p in (root / 'imagenet').rglob('*.jpg')} == {(72, 72)}


def test_ensure_renews_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(train=2, val=1)
    root = shapes.ensure(tmp_path / 'shapes', spec)
    monkeypatch.setattr(shapes, 'VERSION', shapes.VERSION + 1)
    assert shapes.read_marker(root) is None
    shapes.ensure(root, spec)
    assert json.loads((root / shapes.MARKER).read_text())['version'] == shapes.VERSION


@pytest.mark.parametrize(
    'victim',
    [
        'coco/train2017/000000000001.jpg',
        'coco/annotations/instances_val2017.json',
        'ade/annotations',
    ],
)
def test_ensure_mends_what_was_damaged(tmp_path: Path, victim: str) -> None:
    spec = Spec(train=2, val=1)
    root = shapes.ensure(tmp_path / 'shapes', spec)
    whole = digests(root)
    target = root / victim
    if target.is_dir():
        target.rename(tmp_path / 'taken')
    else:
        target.unlink()
    assert shapes.read_marker(root) is None
    shapes.ensure(root)
    assert digests(root) == whole


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    shapes.ensure(tmp_path, Spec(train=1, val=1))
    assert shapes.read_marker(tmp_path) == Spec(train=1, val=1)


@pytest.mark.parametrize('marker', [None, 'not json', '{"generator": "another"}', '[]'])
def test_a_folder_of_others_is_left_alone(tmp_path: Path, marker: str | None) -> None:
    root = tmp_path / 'shapes'
    root.mkdir()
    (root / 'thesis.txt').write_text('years of work')
    if marker is not None:
        (root / shapes.MARKER).write_text(marker)
    before = digests(root)
    for action in (shapes.ensure, shapes.generate):
        with pytest.raises(ShapesError, match='not a sample data set'):
            action(root, Spec(train=1, val=1))
    assert digests(root) == before


def test_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'shapes').write_text('text')
    with pytest.raises(ShapesError, match='is a file'):
        shapes.ensure(tmp_path / 'shapes')
    with pytest.raises(ShapesError, match='cannot be written'):
        shapes.ensure(tmp_path / 'shapes' / 'below')


def test_a_failure_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(train=2, val=1)
    root = shapes.ensure(tmp_path / 'shapes', spec)
    before = digests(root)

    def full_disk(*args: object, **kwargs: object) -> bytes:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(shapes, '_encode', full_disk)
    with pytest.raises(ShapesError, match='No space left on device'):
        shapes.ensure(root, Spec(train=3, val=1))
    assert digests(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']


def test_a_failure_of_the_last_step_puts_the_old_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shapes.ensure(tmp_path / 'shapes', Spec(train=2, val=1))
    before = digests(root)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == 'new':
            raise OSError(5, 'Input/output error')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', failing)
    with pytest.raises(ShapesError, match='Input/output error'):
        shapes.ensure(root, Spec(train=3, val=1))
    assert digests(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']


def _ensure(root: Path) -> None:
    shapes.ensure(root, Spec(train=6, val=2))


def test_processes_that_ensure_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    jobs = [context.Process(target=_ensure, args=(tmp_path / 'shapes',)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert shapes.read_marker(tmp_path / 'shapes') == Spec(train=6, val=2)
    assert [p.name for p in tmp_path.iterdir()] == ['shapes']


@pytest.mark.parametrize(
    'given', [{'size': 3}, {'size': 10**6}, {'train': 0}, {'val': -1}, {'seed': -1}, {'size': 1.5}]
)
def test_wrong_parameters_are_refused(given: dict) -> None:
    name = next(iter(given))
    with pytest.raises(ShapesError, match=rf'{name} must be a whole number from .* not'):
        Spec(**given)


# --- the tool


make_shapes = script('make_shapes.py')


def test_the_tool_writes_to_its_default_place(tmp_path: Path) -> None:
    output = succeed_here(make_shapes, '--train', 3, '--val', 2, '--size', 64, cwd=tmp_path)
    assert shapes.read_marker(tmp_path / 'data/shapes') == Spec(train=3, val=2, size=64)
    assert 'next: python tools/train.py' in output


@pytest.mark.parametrize(
    'args, words',
    [
        (['--size', '7'], 'size must be a whole number from 64 to 2048, not 7'),
        (['--root', '{taken}'], 'not a sample data set'),
        (['--root', '{file}/shapes'], 'cannot be written'),
    ],
)
def test_the_tool_explains_in_one_sentence(tmp_path: Path, args: list[str], words: str) -> None:
    places = {'taken': tmp_path / 'taken', 'file': tmp_path / 'file'}
    places['taken'].mkdir()
    (places['taken'] / 'mine.txt').touch()
    places['file'].touch()
    arguments = (arg.format(**places) for arg in args)
    done = run_here(make_shapes, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

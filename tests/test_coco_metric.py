"""FastCocoMetric has the values of mmdet's CocoMetric, of results drawn from real annotations."""

from __future__ import annotations

import copy
import gc
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import METRICS, DefaultScope
from pycocotools import mask as coco_masks

from repnext_mm.engine.errors import explain
from repnext_mm.evaluation.coco import STATS, FastCocoMetric

pytestmark = pytest.mark.compat

CocoMetric: Any = FastCocoMetric.__base__


@pytest.fixture(scope='module')
def truth(data_root: Path) -> Path:
    return data_root / 'coco' / 'annotations' / 'instances_val2017.json'


def results(truth: Path, seed: int = 0) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each image, shifted objects, some of another class, some none, as models return them."""
    coco = json.loads(truth.read_text())
    labels = {row['id']: number for number, row in enumerate(coco['categories'])}
    generator = np.random.default_rng(seed)
    found = []
    for image in coco['images']:
        height, width = image['height'], image['width']
        boxes, own, masks = [], [], []
        for note in coco['annotations']:
            if note['image_id'] != image['id']:
                continue
            runs = coco_masks.frPyObjects(note['segmentation'], height, width)
            runs = coco_masks.merge(runs) if isinstance(runs, list) else runs
            moved = {
                shift: coco_masks.encode(
                    np.asfortranarray(np.roll(coco_masks.decode(runs), shift, axis=1))
                )
                for shift in (0, 2, 5, 9)
            }
            # Of the first object more than are looked at of one class.
            for shift in [*moved] * (1 if boxes else 40):
                masks.append(moved[shift])
                x, y, w, h = note['bbox'] + generator.normal(0, 0.05, 4) * max(note['bbox'][2:])
                boxes.append([x + shift, y, x + shift + abs(w), y + abs(h)])
                kept = generator.random() < 0.8
                own.append(labels[note['category_id']] if kept else generator.integers(80))
        count = len(boxes)
        result = {
            'img_id': image['id'],
            'bboxes': np.array(boxes, np.float32).reshape(-1, 4),
            'labels': np.array(own, np.int64),
            'scores': generator.random(count).astype(np.float32),
            'mask_scores': generator.random(count).astype(np.float32),
            'masks': masks,
        }
        found.append(({'img_id': image['id'], 'width': width, 'height': height}, result))
    return found


def values(kind: Any, truth: Path, found: Any, **settings: Any) -> dict[str, float]:
    metric = kind(ann_file=str(truth), **settings)
    names = [row['name'] for row in json.loads(truth.read_text())['categories']]
    metric.dataset_meta = {'classes': names}
    return dict(metric.compute_metrics(copy.deepcopy(found)))


@pytest.mark.parametrize(
    'settings',
    [
        dict(metric=['bbox', 'segm']),
        dict(metric='bbox', classwise=True),
        dict(metric='proposal'),
        dict(metric='segm', metric_items=['mAP_50', 'AR@1000', 'AR_s@1000']),
        dict(metric='bbox', iou_thrs=np.array([0.5, 0.6])),
        dict(metric='bbox', proposal_nums=(1, 10, 100)),
    ],
    ids=str,
)
def test_values_are_those_of_mmdet(settings: dict[str, Any], truth: Path) -> None:
    found = results(truth)
    expected = values(CocoMetric, truth, found, **settings)
    assert values(FastCocoMetric, truth, found, **settings) == pytest.approx(
        expected, abs=1e-6, nan_ok=True
    )
    assert any(0 < value < 1 for value in expected.values())


@pytest.mark.parametrize('metric', ['bbox', 'segm'])
def test_all_digits_are_equal(metric: str, truth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are rounded."""
    seen: list[Any] = []
    for module, name in (
        ('repnext_mm.evaluation.coco', 'COCOeval_faster'),
        ('mmdet.evaluation.metrics.coco_metric', 'COCOeval'),
    ):
        base = getattr(importlib.import_module(module), name)

        class Kept(base):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                seen.append(self)

        monkeypatch.setattr(f'{module}.{name}', Kept)
    for kind in (FastCocoMetric, CocoMetric):
        values(kind, truth, results(truth, 1), metric=metric)
    fast, exact = seen
    for key in ('precision', 'recall', 'scores'):
        np.testing.assert_allclose(fast.eval[key], exact.eval[key], rtol=0, atol=1e-6)


def test_truth_from_the_samples_and_files_of_results(truth: Path, tmp_path: Path) -> None:
    found = results(truth)
    for image, result in found:
        instances = zip(result['bboxes'][::4].tolist(), result['labels'][::4].tolist())
        image['anns'] = [{'bbox': box, 'bbox_label': label} for box, label in instances]
    both = []
    for kind in (CocoMetric, FastCocoMetric):
        metric = kind(metric='bbox', outfile_prefix=str(tmp_path / kind.__name__))
        metric.dataset_meta = {'classes': [str(number) for number in range(80)]}
        both.append(dict(metric.compute_metrics(copy.deepcopy(found))))
    assert both[1] == pytest.approx(both[0], abs=1e-6)
    assert both[0]['bbox_mAP'] > 0.1
    written = [
        json.loads((tmp_path / f'{name}.bbox.json').read_text())
        for name in ('CocoMetric', 'FastCocoMetric')
    ]
    assert written[0] == written[1] != []


def test_nothing_found_is_an_ap_of_zero(truth: Path) -> None:
    found = results(truth)
    for _, result in found:
        for key in ('bboxes', 'labels', 'scores', 'mask_scores', 'masks'):
            result[key] = result[key][:0]
    assert values(FastCocoMetric, truth, found, metric=['bbox', 'segm']) == {
        f'{metric}_{item}': 0.0 for metric in ('bbox', 'segm') for item in STATS[:6]
    }


def test_results_alone_are_written_by_mmdet(truth: Path, tmp_path: Path) -> None:
    settings = dict(metric='bbox', format_only=True, outfile_prefix=str(tmp_path / 'a'))
    assert values(FastCocoMetric, truth, results(truth), **settings) == {}
    assert len(json.loads((tmp_path / 'a.bbox.json').read_text())) > 100


def test_what_cannot_be_measured_is_refused(truth: Path) -> None:
    found = results(truth)
    for _, result in found:
        del result['masks']
    with pytest.raises(KeyError, match='segm is not in results'):
        values(FastCocoMetric, truth, found, metric='segm')
    with pytest.raises(KeyError, match="'mAP_90' is not one of mAP, mAP_50"):
        values(FastCocoMetric, truth, found, metric='bbox', metric_items=['mAP_90'])


def test_two_evaluations_of_one_metric_and_the_garbage_collector(truth: Path) -> None:
    """As after each epoch of training."""
    metric = FastCocoMetric(ann_file=str(truth), metric=['bbox', 'segm'])
    names = [row['name'] for row in json.loads(truth.read_text())['categories']]
    metric.dataset_meta = {'classes': names}
    first, second = (metric.compute_metrics(results(truth, seed)) for seed in (0, 0))
    assert first == second
    assert gc.isenabled()


def test_configs_evaluate_with_it(truth: Path) -> None:
    config = Config.fromfile('configs/mask_rcnn_repnext_m4_coco.py')
    settings = config.val_evaluator | {'ann_file': str(truth)}
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert type(METRICS.build(settings)) is FastCocoMetric


def test_a_class_has_more_results_in_an_image_than_the_first_ap_counts(truth: Path) -> None:
    assert max(np.bincount(result['labels']).max() for _, result in results(truth)) > 100


def test_who_lacks_the_package_learns_its_name() -> None:
    sentence = explain(ModuleNotFoundError("No module named 'faster_coco_eval'"))
    assert 'pip install faster-coco-eval' in (sentence or '')
    assert explain(ModuleNotFoundError("No module named 'other'")) is None

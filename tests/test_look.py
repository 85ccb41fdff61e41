"""What the page says: errors by kind, confusions, attention, receptive fields, near-duplicates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import labeled_folders as made
import numpy as np
import own_models
import pytest
import torch
from conftest import DATA
from PIL import Image
from torch import Tensor, nn

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt
from repnext_mm.datasets.folders import Example
from repnext_mm.look import cam
from repnext_mm.look.classes import compare_maps
from repnext_mm.look.command import look_main
from repnext_mm.look.data import near_duplicates, picture_hash
from repnext_mm.look.detection import Scene, evaluate
from repnext_mm.look.network import (
    branch_maps,
    extent,
    receptive_fields,
    recursive_fields,
    token_mixers,
    untrained,
)
from repnext_mm.look.page import Page


def result(boxes: Any, labels: Any, scores: Any = None) -> dict[str, np.ndarray]:
    found = {
        'boxes': np.array(boxes, float).reshape(-1, 4),
        'labels': np.array(labels, int),
    }
    return found if scores is None else {**found, 'scores': np.array(scores, float)}


NONE = result([], [])
OBJECT = [10, 10, 50, 50]


def scene(boxes: Any, labels: Any, scores: Any, truth: Any = (OBJECT,), kinds: Any = (0,)) -> Scene:
    return Scene((100, 100), result(truth, kinds), NONE, result(boxes, labels, scores))


@pytest.mark.parametrize(
    'boxes, labels, kinds',
    [
        ([OBJECT], [0], ['right']),
        ([OBJECT], [1], ['cls']),
        ([[10, 10, 50, 25]], [0], ['loc']),
        ([[10, 10, 50, 25]], [1], ['both', 'miss']),
        ([OBJECT, [11, 11, 51, 51]], [0, 0], ['right', 'dupe']),
        ([[60, 60, 90, 90]], [0], ['bkg', 'miss']),
        ([], [], ['miss']),
    ],
)
def test_each_kind_of_error(boxes: Any, labels: Any, kinds: list[str]) -> None:
    scores = [0.9 - 0.1 * i for i in range(len(boxes))]
    found = evaluate([scene(boxes, labels, scores)], ['a', 'b'], 0.3, False).found
    assert [item.kind for item in found] == kinds


def test_detections_of_groups_are_ignored() -> None:
    crowd = Scene((100, 100), NONE, result([[0, 0, 90, 90]], [0]), result([OBJECT], [0], [0.9]))
    assert [item.kind for item in evaluate([crowd], ['a'], 0.3, False).found] == ['ignored']


def test_errors_are_counted_and_weighed_as_tide_does() -> None:
    """Against the figures of tidecv 1.0.1, TIDE's published code, on 40 random scenes."""
    stored = json.loads((DATA / 'tide.json').read_text())
    scenes = [
        Scene((200, 200), result(s['gt'], s['tl']), NONE, result(s['p'], s['pl'], s['ps']))
        for s in stored['scenes']
    ]
    evaluation = evaluate(scenes, list('abcd'), 0.3, False)
    counts = {k: sum(item.kind == k for item in evaluation.found) for k in stored['counts']}
    assert counts == stored['counts']
    assert evaluation.summary['AP50'] == pytest.approx(stored['AP50'], abs=1e-9)
    assert evaluation.gains == pytest.approx(stored['gains'], abs=1e-9)


def test_confusions() -> None:
    scenes = [
        scene([OBJECT], [1], [0.9]),
        scene([OBJECT, [60, 60, 90, 90]], [0, 1], [0.9, 0.8]),
        scene([OBJECT], [0], [0.2]),
    ]
    table = evaluate(scenes, ['a', 'b'], 0.3, False).confusion
    assert table.tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 0]]


def test_label_maps_are_compared() -> None:
    truth = np.zeros((20, 20), int)
    truth[:, 10:] = 1
    truth[0] = 255
    predicted = truth.copy()
    predicted[1:, 9] = 1  # beside the edge
    predicted[5, 2] = 1  # far from it
    found = compare_maps([(truth, predicted)], ['a', 'b', 'c'])
    assert found.confusion.tolist() == [[170, 20, 0], [0, 190, 0], [0, 0, 0]]
    np.testing.assert_allclose(found.iou[:2], [170 / 190, 190 / 210])
    assert np.isnan(found.iou[2])
    assert found.border == 19 / 20
    np.testing.assert_allclose(found.images[0], found.iou)


# --- inside a network


def test_branches_are_those_of_the_papers() -> None:
    image = torch.rand(1, 3, 64, 64)
    repnext = branch_maps(RepNeXt('m0').eval(), image)
    assert list(repnext) == [f'stage {i}' for i in range(1, 5)]
    assert list(repnext['stage 1']) == ['identity', 'small', 'medium', 'large']
    assert repnext['stage 1']['large'].shape == (16, 16)
    assert repnext['stage 2']['small'].min() == 0
    assert repnext['stage 2']['small'].max() == 1
    inception = branch_maps(InceptionNeXt('atto').eval(), image)
    assert list(inception['stage 3']) == ['identity', 'square', '1 x k', 'k x 1']
    for network in (RecNeXt('m0'), RecNeXt('a0')):
        assert set(branch_maps(network.eval(), image)['stage 1']) == {'output'}


def test_looking_changes_nothing() -> None:
    network = RepNeXt('m0').eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = network(image)
    branch_maps(network, image)
    receptive_fields(network, [image])
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(m._forward_hooks for m in token_mixers(network).values())
    with torch.no_grad():
        for one, other in zip(before, network(image), strict=True):
            assert torch.equal(one, other)


class Chain(nn.Module):
    """Convolutions with ones: how far the last one sees is known."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, k, padding=k // 2, bias=False) for k in sizes)
        for conv in self.convs:
            nn.init.ones_(conv.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        for conv in self.convs:
            x = conv(x)
        return [x]


def test_a_receptive_field_with_a_known_answer() -> None:
    (field,) = receptive_fields(Chain(5, 3), [torch.rand(1, 3, 41, 41)]).values()
    assert field.sum() == pytest.approx(1)
    rows = np.flatnonzero(field.sum(1))
    assert rows.tolist() == list(range(17, 24))  # 5 + 3 - 1 = 7 around the middle
    assert extent(field, 1.0) == 7
    # A 5x5 of ones and a 3x3 of ones: of 225 ways, 81 stay within the middle 3x3 pixels.
    assert field[19:22, 19:22].sum() == pytest.approx(81 / 225)
    assert extent(field, 81 / 225 - 1e-9) == 3
    assert extent(field, 81 / 225 + 1e-2) == 5


def test_what_the_paper_gives_for_recursive_convolutions() -> None:
    assert recursive_fields(RecNeXt('m0')) == {
        'stage 1': '5 x 2^4 = 80 cells, 320 pixels',
        'stage 2': '5 x 2^3 = 40 cells, 320 pixels',
        'stage 3': '5 x 2^2 = 20 cells, 320 pixels',
        'stage 4': '5 x 2^1 = 10 cells, 320 pixels',
    }
    assert recursive_fields(RepNeXt('m0')) == {}


def test_an_untrained_copy_has_other_weights() -> None:
    torch.manual_seed(7)
    network = RepNeXt('m0')
    copy = untrained(network)
    pairs = zip(network.named_parameters(), copy.parameters(), strict=True)
    same = [name for (name, one), other in pairs if one.dim() == 4 and torch.equal(one, other)]
    assert not same
    assert list(copy.state_dict()) == list(network.state_dict())


def test_networks_of_others_are_looked_into() -> None:
    class Silent(Chain):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            """As that of mmdet's ResNet, which returns nothing."""
            super().train(mode)

    copy = untrained(Silent(3))
    assert isinstance(copy, Silent)
    assert branch_maps(copy, torch.rand(1, 3, 16, 16)) == {}
    assert list(receptive_fields(copy, [torch.rand(1, 3, 16, 16)])) == ['stage 1']


# --- attention


class Corner(nn.Module):
    """Class 1 is the brightness of the upper left quarter, class 0 that of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.constant_(self.features.weight, 1.0)

    def network(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        inside = torch.zeros_like(maps)
        half = maps.shape[2] // 2
        inside[:, :, :half, :half] = 1
        return torch.stack(
            [(maps * (1 - inside)).sum((1, 2, 3)), (maps * inside).sum((1, 2, 3))], 1
        )


@pytest.fixture
def package() -> None:
    pytest.importorskip('pytorch_grad_cam', reason='grad-cam is not installed')


@pytest.mark.usefixtures('package')
def test_grad_cam_marks_what_decides() -> None:
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, 2:5, 2:5] = 1  # in the quarter of class 1
    model = Corner()
    marked = cam.grad_cam(model, model.features, x, cam.class_score(model, 1))
    assert marked[2:5, 2:5].min() > 0.9
    assert marked[8:, 8:].max() < 0.1


@pytest.mark.usefixtures('package')
def test_eigen_cam_marks_the_object_and_not_the_background() -> None:
    """The package leaves the sign open; both signs of the same maps must mark the same place."""
    torch.manual_seed(0)
    direction = torch.randn(1, 6, 1, 1)
    place = torch.zeros(1, 1, 12, 12)
    place[:, :, 3:7, 4:9] = 1
    for sign in (1.0, -1.0):
        marked = cam.eigen_cam(sign * (direction * place) + 0.01 * torch.randn(1, 6, 12, 12))
        assert marked[3:7, 4:9].min() > 0.8
        outside = marked[place[0, 0].numpy() == 0]
        assert outside.max() < 0.2


# --- data


def test_near_duplicates_are_found(data_root: Path, tmp_path: Path) -> None:
    paths = sorted((data_root / 'coco' / 'train2017').glob('*.jpg'))[:20]
    for path in paths:
        with Image.open(path) as picture:
            rgb = picture.convert('RGB')
            rgb.save(tmp_path / path.name)
            small = rgb.resize((rgb.width // 2, rgb.height // 2))
            small.point(lambda v: min(255, int(v * 1.1))).save(
                tmp_path / f'copy_{path.name}', quality=60
            )
    train = [Example(path.name) for path in paths]
    val = [Example(f'copy_{path.name}') for path in paths]
    found = near_duplicates(tmp_path, {'train': train, 'val': val})
    assert {(a.file, b.file) for a, b, _ in found} == {(p.name, f'copy_{p.name}') for p in paths}
    assert near_duplicates(tmp_path, {'train': train[:10], 'val': train[10:]}) == []
    assert near_duplicates(tmp_path, {'train': train, 'val': train}) == []
    assert picture_hash(paths[0]).shape == (8,)


def test_a_page_escapes_and_is_complete(tmp_path: Path) -> None:
    page = Page(tmp_path / 'look', '<script>x</script>', 'a & b')
    page.section('One')
    page.text('<b>')
    page.table(['<i>'], [['<u>', 1]])
    page.pictures([('p', np.zeros((9, 9, 3), np.uint8), '"quoted"')])
    page.section('Empty')
    text = page.write().read_text()
    assert '<script>' not in text
    assert '&lt;b&gt;' in text
    assert 'Empty' not in text
    assert (tmp_path / 'look' / 'pictures' / 'p.jpg').is_file()
    assert not re.search(r'(src|href)="(?!data:|#)', text)


@pytest.fixture(scope='module')
def random_weights(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of boxes, and a checkpoint for it that has learned nothing."""
    root = tmp_path_factory.mktemp('look')
    real = made.real(data_root)
    data = own_models.write(real, own_models.eight(real)[:4], root / 'data', 'boxes')
    config = own_models.config(data, root / 'run', '--size=96')
    return data, own_models.checkpoint(config, root / 'run' / 'epoch_1.pth')


def test_a_page_of_a_model_that_has_learned_nothing(
    random_weights: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint = random_weights
    out = tmp_path / 'look'
    command = [str(checkpoint), str(data), '--val-share=0.25', f'--out={out}']
    assert look_main([*command, f'--against={checkpoint}']) == 0
    page = (out / 'index.html').read_text()
    assert 'There is no log of a training' in page
    assert 'evaluated on 1 images of val' in page
    assert look_main(command) == 0
    assert (tmp_path / 'look_2' / 'index.html').is_file()
    capsys.readouterr()
    (tmp_path / 'empty').mkdir()
    for wrong, said in (
        ([*command[:2], '--split=test'], 'has no split test; there are train, val'),
        ([command[0], str(tmp_path / 'empty')], 'no image in a format that is known'),
        ([*command[:2], '--limit=0'], '--limit 0 must be at least 1'),
    ):
        assert look_main(wrong) == 1
        assert said in capsys.readouterr().err

"""What the README shows is true: its snippets run and its table is that of the code."""

from __future__ import annotations

import re

import pytest
from conftest import REPO

from repnext_mm import RepNeXt
from repnext_mm.checkpoints import PUBLISHED

README = (REPO / 'README.md').read_text('utf-8')


def snippet(words: str) -> str:
    """The one Python block that holds `words`."""
    found = [b for b in re.findall(r'```python\n(.*?)```', README, re.S) if words in b]
    assert len(found) == 1, f'{len(found)} snippets hold {words!r}'
    return found[0]


def table_rows(header: str) -> list[list[str]]:
    """Cells of the table whose header line holds `header`."""
    lines = README[README.index(header) :].split('\n\n')[0].splitlines()[2:]
    return [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in lines]


def test_every_argument_is_documented():
    import inspect

    arguments = list(inspect.signature(RepNeXt).parameters)
    assert [row[0] for row in table_rows('| argument | meaning')] == arguments


def test_published_names_exist():
    listed = re.search(r'a published name: (.*?); downloaded', README, re.S)
    assert listed
    names = set()
    for pattern in re.findall(r'`(repnext_.*?)`', listed[1]):
        head, inner, tail = re.match(r'(.*)\{(.*)\}(.*)', pattern).groups()
        archs = ['m0', 'm1', 'm2', 'm3', 'm4', 'm5'] if '..' in inner else inner.split(',')
        names |= {head + arch + tail for arch in archs}
    assert names
    assert names <= set(PUBLISHED)


@pytest.mark.compat
def test_the_custom_data_config_builds(tmp_path):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    text = snippet("classes = ('cat', 'dog')").replace('./configs/', f'{REPO}/configs/')
    path = tmp_path / 'pets.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    assert cfg.train_dataloader.dataset.data_root == 'data/pets/'
    assert cfg.test_evaluator.ann_file.startswith('data/pets/')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.fc_cls.out_features == 2 + 1


@pytest.mark.compat
@pytest.mark.parametrize('base', ['mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'])
def test_the_backbone_drops_into_a_config_of_mmdet(tmp_path, base):
    import mmdet
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    source = f'{mmdet.__path__[0]}/.mim/configs/{base}'
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {source!r}\n' + snippet('_delete_=True'))
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, RepNeXt)
    assert tuple(cfg.model.neck.in_channels) == model.backbone.out_channels


def test_the_fuse_snippet_runs(capsys):
    scope = {'model': RepNeXt(dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1)))}
    code = snippet('reparameterize(model.eval())').replace('(512, 512)', '(64, 64)')
    exec(code, scope)
    assert 'plan full' in capsys.readouterr().out
    assert scope['fused'].plan == 'full'

"""What the README and the documentation show is true: snippets run, tables and links are right."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from conftest import REPO

from repnext_mm import RepNeXt
from repnext_mm.backbones import FAMILIES
from repnext_mm.checkpoints import PUBLISHED
from repnext_mm.published_results import published, top1

README = (REPO / 'README.md').read_text('utf-8')
PAGES = [REPO / 'README.md', *(REPO / 'docs').rglob('*.md')]
DOCS = '\n\n'.join(page.read_text('utf-8') for page in PAGES)


def snippet(words: str) -> str:
    """The one Python block that contains `words`."""
    found = [b for b in re.findall(r'```python\n(.*?)```', DOCS, re.S) if words in b]
    assert len(found) == 1, f'{len(found)} snippets contain {words!r}'
    return found[0]


def table_rows(text: str, header: str) -> list[list[str]]:
    """Cells of the table whose header line contains `header`."""
    lines = text[text.index(header) :].split('\n\n')[0].splitlines()[2:]
    return [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in lines]


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def anchors(page: Path) -> set[str]:
    text = page.read_text('utf-8')
    titles = re.findall(r'^#+ (.*)$', text, re.M)
    named = re.findall(r'<a id="([^"]+)">', text)
    return {re.sub(r'[^\w -]', '', title).lower().replace(' ', '-') for title in titles} | {*named}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)]+)\)', page.read_text('utf-8')):
        path, _, anchor = link.partition('#')
        if '://' in link:
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_ranges_of_accuracies_are_the_published_ones():
    rows = table_rows(README, '| type | `arch` |')
    for (kind, _, shown), (prefix, family) in zip(rows, FAMILIES.items(), strict=True):
        assert kind == family.__name__
        values = [top1(published('imagenet', f'{prefix}_{arch}')) for arch in family.arch_zoo]
        assert shown == f'{min(values)} to {max(values)}'


def test_every_argument_is_documented():
    arguments = list(inspect.signature(RepNeXt).parameters)
    assert [row[0] for row in table_rows(DOCS, '| argument | meaning')] == arguments


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

"""A whole trained model with its backbone fused: the same figures, from a config of its own."""

from __future__ import annotations

from pathlib import Path

import mm_models
import pytest
import tool_runs
import torch
from evaluations import ONE_POINT, Trained, small_models
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm

from repnext_mm.checkpoints import read_run
from repnext_mm.deploy.errors import ModelError, UsageError
from repnext_mm.deploy.whole_model import derived_config, save_whole_model


@pytest.fixture(scope='module')
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return small_models(tmp_path_factory.mktemp('models'))


def load(config: Path, checkpoint: Path) -> torch.nn.Module:
    model = mm_models.build(Config.fromfile(config))
    model.load_state_dict(read_run(checkpoint).content['state_dict'])
    return model.eval()


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_the_same_model_without_norms_in_its_backbone(
    task: str, models: dict[str, Trained], tmp_path: Path
) -> None:
    model = models[task]
    checkpoint, config = save_whole_model(model.config, model.checkpoint, tmp_path / 'out')
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        f'{task}_full.pth',
        f'{task}_full.py',
    ]
    before, after = load(model.config, model.checkpoint), load(config, checkpoint)
    assert any(isinstance(m, _BatchNorm) for m in before.backbone.modules())
    assert not any(isinstance(m, _BatchNorm) for m in after.backbone.modules())
    assert after.backbone.plan == 'full'
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for one, other in zip(before.extract_feat(x), after.extract_feat(x)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    # mm's own evaluation takes the two files as they are.
    expected = model.evaluate().metric
    found = model.evaluate(config=config, checkpoint=checkpoint).metric
    assert expected > 90 * ONE_POINT[task]
    assert abs(found - expected) < 0.1 * ONE_POINT[task]


@pytest.mark.parametrize('plan, deploy', [('full', True), ('upstream', 'upstream')])
def test_the_derived_config_stands_alone(plan: str, deploy: bool | str, tmp_path: Path) -> None:
    config = tmp_path / 'trained.py'
    config.write_text(
        f'_base_ = {str(tool_runs.CONFIGS["seg"])!r}\n'
        'load_from = "before.pth"\nresume = True\nwork_dir = "there"\n'
        'model = dict(pretrained="weights.pth", backbone=dict(type="repnext_mm.RepNeXt", '
        'init_cfg=dict(type="Pretrained", checkpoint="repnext_m0_distill_300e")))\n'
    )
    given = Config.fromfile(config)
    derived_config(given, plan).dump(tmp_path / 'derived.py')
    assert given.model.backbone.init_cfg is not None  # is left as it was
    derived = Config.fromfile(tmp_path / 'derived.py')
    assert '_base_' not in (tmp_path / 'derived.py').read_text()
    assert derived.model.backbone.deploy == deploy
    assert derived.model.backbone.init_cfg is None
    assert (derived.model.pretrained, derived.load_from, derived.resume) == (None, None, False)
    assert 'work_dir' not in derived
    assert derived.test_dataloader == given.test_dataloader
    mm_models.build(derived)


def test_other_plans(models: dict[str, Trained], tmp_path: Path) -> None:
    """Loading is strict: names and shapes are those that the config builds."""
    for plan in ('upstream', 'single'):
        checkpoint, config = save_whole_model(
            models['seg'].config, models['seg'].checkpoint, tmp_path, plan
        )
        assert load(config, checkpoint).backbone.plan == plan
    with pytest.raises(ValueError, match="plan='all' is not a fusion plan"):
        save_whole_model(models['seg'].config, models['seg'].checkpoint, tmp_path, 'all')


def test_what_is_refused(models: dict[str, Trained], tmp_path: Path) -> None:
    det, seg = models['det'], models['seg']

    def refused(kind: type[Exception], pattern: str, *arguments: Path) -> None:
        with pytest.raises(kind, match=pattern):
            save_whole_model(*arguments)

    out = tmp_path / 'out'
    refused(ModelError, r'does not fit the config: \d+ of the', seg.config, det.checkpoint, out)
    refused(ModelError, r'there is no config .*none\.py', Path('none.py'), det.checkpoint, out)
    partial = tmp_path / 'partial.pth'
    state = read_run(seg.checkpoint).content['state_dict']
    del state['decode_head.conv_seg.weight']
    torch.save({'state_dict': state}, partial)
    refused(ModelError, r'decode_head\.conv_seg\.weight .+ is missing', seg.config, partial, out)
    partial.write_bytes(seg.checkpoint.read_bytes()[:5000])
    refused(ModelError, r'cut short, damaged', seg.config, partial, out)
    foreign = tmp_path / 'foreign.py'
    foreign.write_text(
        f'_base_ = {str(seg.config)!r}\n'
        'model = dict(backbone=dict(_delete_=True, type="ResNet", depth=18))\n'
    )
    torch.save({'state_dict': mm_models.build(Config.fromfile(foreign)).state_dict()}, partial)
    refused(ModelError, 'holds no backbone of repnext_mm', foreign, partial, out)
    assert not out.exists()

    checkpoint, config = save_whole_model(seg.config, seg.checkpoint, out)
    refused(ModelError, "already fused with plan 'full'", config, checkpoint, tmp_path / 'again')
    refused(UsageError, 'seg_full.pth exists already; add --force', seg.config, seg.checkpoint, out)
    save_whole_model(seg.config, seg.checkpoint, out, force=True)
    blocked = tmp_path / 'file'
    blocked.touch()
    refused(UsageError, 'file cannot be written', seg.config, seg.checkpoint, blocked)


def test_interrupted_it_leaves_nothing(
    models: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Config, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Config, 'dump', interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_whole_model(models['seg'].config, models['seg'].checkpoint, tmp_path / 'out')
    assert list((tmp_path / 'out').iterdir()) == []

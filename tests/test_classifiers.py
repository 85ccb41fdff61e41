"""The classifiers under timm's names, by the checks that timm's own suite makes of every model."""

import copy
import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from weight_files import save_release

import repnext_mm.timm
from repnext_mm import RepNeXt, reparameterize
from repnext_mm.backbones.classifier import Classifier
from repnext_mm.checkpoints import CheckpointError, load_pretrained

NAMES = repnext_mm.timm.names()
SAMPLED = (
    'repnext_m0',
    'repnext_m0e',
    'recnext_m0',
    'recnext_a3',
    'recnext_t',
    'recnext_t_share_channel',
)
#: `n_parameters` of the published logs, with both heads.
LOGGED = {'repnext_m1': 5_323_316}
#: Parameters in millions of the published tables: everything folded, one linear head.
PUBLISHED = {'repnext_m1': 4.82, 'recnext_a3': 9.03, 'recnext_t': 12.11, 'repnext_m0e': 2.54}


def drawn(name: str, **options: object) -> Classifier:
    """A classifier in eval mode whose norms are not those of a new network."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def test_every_network_is_registered() -> None:
    assert len(NAMES) == 27
    assert set(NAMES) <= set(timm.list_models())
    assert not any('inception_next' in name for name in NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_settings_are_those_of_the_published_files(name: str) -> None:
    with torch.device('meta'):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert isinstance(model, Classifier)
    assert model.num_classes == cfg['num_classes'] == 1000
    assert cfg['architecture'] == name
    assert model.get_submodule(cfg['first_conv']).in_channels == 3
    for linear in cfg['classifier']:
        assert model.get_submodule(linear).out_features == 1000
    assert 'classifier' in cfg and model.get_classifier() is model.head
    tags = {m.rpartition('.')[2] for m in timm.list_pretrained(f'{name}.*')}
    if re.search('m[012]e$', name):
        assert not tags, 'no file is published'
        assert not cfg.get('url') and not cfg.get('hf_hub_id')
    else:
        assert 'dist_300e_in1k' in tags
        assert cfg.get('url') or cfg.get('hf_hub_id') == f'suous/{name}.dist_300e_in1k'
    assert ('base_300e_in1k' in tags) == (name[:3] == 'rec' or name[-2:] in ('m0', 'm1', 'm2'))


@pytest.mark.parametrize(
    'name, resized', [('repnext_m1', 256), ('repnext_m1.base_300e_in1k', 248), ('repnext_m1e', 248)]
)
def test_preprocessing_is_the_published_one(name: str, resized: int) -> None:
    settings = resolve_model_data_config(timm.create_model(name))
    assert settings['mean'] == (0.485, 0.456, 0.406)
    resize, crop, *_ = create_transform(**settings, is_training=False).transforms
    assert (resize.size, resize.interpolation.value, tuple(crop.size)) == (
        resized,
        'bicubic',
        (224, 224),
    )


@pytest.mark.parametrize('name', SAMPLED)
def test_forward_and_gradients(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 7)
    out.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    assert not any(p.grad.isnan().any() for p in model.parameters())


@pytest.mark.parametrize('name', SAMPLED)
def test_features(name: str) -> None:
    image = torch.randn(1, 3, 128, 128)
    model = drawn(name)
    pyramid = timm.create_model(name, features_only=True).eval()
    assert pyramid.feature_info.channels() == list(model.channels)
    assert pyramid.feature_info.reduction() == list(model.strides)
    pyramid.model.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        final, found = model.forward_intermediates(image)
        assert torch.equal(final, model.forward_features(image))
        assert torch.equal(final, found[-1])
        for a, b, width, stride in zip(
            pyramid(image), found, model.channels, model.strides, strict=True
        ):
            assert torch.equal(a, b)
            assert a.shape == (1, width, 128 // stride, 128 // stride)
        pooled = model.forward_head(final, pre_logits=True)
        assert pooled.shape == (1, model.num_features)
        assert torch.equal(model.forward_head(final), model(image))
        early = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
        assert len(early(image)) == 2
        assert not hasattr(early.model.stages, '3'), 'a stage that is not used'


@pytest.mark.parametrize('name', SAMPLED)
def test_the_heads_can_be_replaced(name: str) -> None:
    image = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name).eval()
    assert model.get_classifier() is model.head
    with torch.no_grad():
        model.reset_classifier(0)
        assert model(image).shape == (2, model.num_features)
        model.reset_classifier(11)
        assert model(image).shape == (2, 11) and model.num_classes == 11
        bare = timm.create_model(name, num_classes=0).eval()
        assert bare(image).shape == (2, model.num_features)


@pytest.mark.parametrize('name', SAMPLED)
def test_torchscript_by_tracing(name: str) -> None:
    model = drawn(name, num_classes=5)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, image)
        torch.testing.assert_close(traced(image), model(image))


def test_other_channels_take_the_published_weights(tmp_path: Path) -> None:
    save_release(tmp_path / 'a.pth')  # five classes
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=5)
    model = timm.create_model(
        'repnext_m0', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5
    )
    published = torch.load(tmp_path / 'a.pth', weights_only=True)['model']
    key = 'stem.stem.0.conv.weight'
    torch.testing.assert_close(model.state_dict()[key], published[key].sum(1, keepdim=True))
    head = 'head.head_dist.linear.weight'
    assert torch.equal(model.state_dict()[head], published[head])


def test_nothing_is_pretrained_without_a_file() -> None:
    with pytest.raises(RuntimeError, match='No pretrained weights exist for repnext_m0e'):
        timm.create_model('repnext_m0e', pretrained=True)


def test_both_outputs_while_distilling() -> None:
    model = timm.create_model('repnext_m0', num_classes=3, distillation=True)
    image = torch.randn(2, 3, 32, 32)
    labels, teacher = model(image)
    assert labels.shape == teacher.shape == (2, 3)
    assert not torch.equal(labels, teacher)
    model.eval()
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    mean = (model.head.head(pooled) + model.head.head_dist(pooled)) / 2
    assert torch.equal(model(image), mean)
    model.reset_classifier(4)
    assert len(model.train()(image)) == 2, 'the setting outlives new heads'
    model.set_distilled_training(False)
    assert model(image).shape == (2, 4)


@pytest.mark.parametrize('name, count', LOGGED.items())
def test_parameters_are_those_of_the_published_logs(name: str, count: int) -> None:
    with torch.device('meta'):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


@pytest.mark.parametrize('name, millions', PUBLISHED.items())
def test_the_fused_classifier(name: str, millions: float) -> None:
    """No norm left, the published number of parameters, and the same function."""
    model = drawn(name).double()
    fused = reparameterize(model)
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    assert fused.fusion_report.norms_left == []
    assert round(sum(p.numel() for p in fused.parameters()) / 1e6, 2) == millions
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(image), model(image), rtol=1e-12, atol=1e-12)
    assert list(fused.state_dict())[-2:] == ['head.weight', 'head.bias']


def test_weights_fit_the_backbone_and_come_with_their_heads(tmp_path: Path) -> None:
    model = drawn('repnext_m0')
    torch.save({'model': model.state_dict(), 'model_ema': {}}, tmp_path / 'a.pth')
    other = timm.create_model('repnext_m0').eval()
    report = load_pretrained(other, tmp_path / 'a.pth')
    assert report.complete and not report.match.ignored
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(image), model(image))
    assert load_pretrained(RepNeXt('m0'), tmp_path / 'a.pth').match.ignored == {'head': 14}
    deployed = type(model)('m0', deploy=True).eval()
    assert 'fused on loading' in str(load_pretrained(deployed, tmp_path / 'a.pth'))
    with torch.no_grad():
        torch.testing.assert_close(deployed(image), model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['model.pth', 'state_dict.pth.tar', 'bare.safetensors'])
def test_every_kind_of_file_comes_with_its_heads(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = drawn('recnext_m0', num_classes=6)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = tmp_path / kind
    if path.suffix == '.safetensors':
        save_file(state, path)
    else:
        other = {key: value + 1 for key, value in state.items()}
        torch.save({kind.partition('.')[0]: state, 'model_ema': other, 'epoch': 3}, path)
    report = load_pretrained(loaded := timm.create_model('recnext_m0', num_classes=6), path)
    assert report.complete and not report.match.ignored
    by_timm = timm.create_model(
        'recnext_m0',
        pretrained=True,
        num_classes=6,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=6),
    )
    for key, value in state.items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert torch.equal(by_timm.state_dict()[key], value), 'the raw weights, by timm too'


def test_pretrained_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server on loopback in the place of the release page."""
    model = drawn('repnext_m0')
    published = tmp_path / 'served' / 'repnext_m0_distill_300e.pth'
    published.parent.mkdir()
    averages = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save({'model': model.state_dict(), 'model_ema': averages}, published)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=published.parent)
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f'http://127.0.0.1:{server.server_port}/{published.name}'
        fetched = timm.create_model(
            'repnext_m0', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(url=url)
        )
    finally:
        server.shutdown()
        server.server_close()
    for key, value in model.state_dict().items():
        if not key.startswith('head.'):
            assert torch.equal(fetched.state_dict()[key], value)
    norm = 'head.head.norm.running_mean'
    assert torch.equal(fetched.state_dict()[norm], model.state_dict()[norm])
    assert fetched.head.head.linear.out_features == 3


def test_the_published_fused_archive_comes_with_its_head(tmp_path: Path) -> None:
    from weight_files import Tree

    model = drawn('repnext_m0', num_classes=6)
    archive = tmp_path / 'repnext_m0_distill_300e_fused.pt'
    state = {k: v.clone() for k, v in reparameterize(model, 'upstream').state_dict().items()}
    torch.jit.script(Tree.of(state)).save(str(archive))
    for plan in ('upstream', 'full'):
        other = type(model)('m0', num_classes=6, deploy=plan).eval()
        assert load_pretrained(other, archive).complete
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(other(image), model(image), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match='fused, which cannot be undone'):
        load_pretrained(copy.deepcopy(model), archive)


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(num_classes=-1), 'num_classes=-1 must be a whole number, 0 or more'),
        (dict(in_chans=0), 'in_chans=0 must be a whole number, 1 or more'),
        (dict(global_pool='max'), "global_pool='max' must be avg"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        timm.create_model('repnext_m0', **options)


def test_a_name_that_timm_has_taken_gets_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repnext_mm.timm, 'REGISTERED', {})
    with pytest.warns(UserWarning, match='timm has a model repnext_m0 of its own'):
        repnext_mm.timm._register('repnext_m0')  # it is there already
    assert repnext_mm.timm.names() == ['repnext_mm_repnext_m0']
    assert isinstance(timm.create_model('repnext_mm_repnext_m0', num_classes=2), Classifier)

"""The fast ways of computing equal the published one, and are the ones that run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tool_runs
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_models import build, sample_batch, sample_data
from mmengine.config import Config
from networks import TINY, grads, image, tiny
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repnext_mm import optimize
from repnext_mm.backbones.repnext import MEDIUM, BranchedDepthwise
from repnext_mm.engine.cli import train_main
from repnext_mm.layers import fast as door
from repnext_mm.layers.blocks import GELU
from repnext_mm.layers.execution import is_channels_last, set_execution
from repnext_mm.measure import saved_bytes

NETWORKS = pytest.mark.parametrize('name', TINY)
MODES = pytest.mark.parametrize('mode', ['train', 'norm_eval', 'eval', 'frozen'])


def pair(name: str, mode: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """The published form and the fast one, in float64."""
    options = dict(norm_eval=mode == 'norm_eval', frozen_stages=2 if mode == 'frozen' else -1)
    models = [
        tiny(name, **options, **more).double().train(mode != 'eval')
        for more in (dict(fast=False), kwargs)
    ]
    return models[0], models[1]


def assert_same_step(reference: nn.Module, fast: nn.Module, x: torch.Tensor) -> None:
    """Same outputs, gradients of parameters and image, and running statistics."""
    images = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    for a, b in zip(reference(images[0]), fast(images[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert is_channels_last(b) == is_channels_last(x) or b.shape[2:] == (1, 1)
    expected, actual = (grads(m, i) for m, i in zip((reference, fast), images, strict=True))
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-8, atol=1e-8, msg=key)
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=1e-8, atol=1e-8)
    state = fast.state_dict()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9, msg=key)


@NETWORKS
@MODES
@pytest.mark.parametrize('save_memory', [False, True], ids=['keep', 'save'])
@pytest.mark.parametrize('odd', [False, True], ids=['even', 'odd'])
def test_a_step_equals_the_published_one(name, mode, save_memory, odd):
    """With every gradient, at sizes that halve evenly and at sizes that do not."""
    reference, fast = pair(name, mode, save_memory=save_memory)
    x = image(fast, dtype=torch.float64)
    assert_same_step(reference, fast, x[..., 27:, 53:].contiguous() if odd else x)


@NETWORKS
@pytest.mark.parametrize('compute', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('given', [False, True], ids=['from_nchw', 'from_channels_last'])
def test_any_memory_format_gives_the_same_and_hands_back_its_own(name, compute, given):
    reference, fast = pair(name, 'train', channels_last=compute)
    x = image(fast, dtype=torch.float64)
    if given:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same_step(reference, fast, x)


#: Operations that change or name a layout, and compute nothing.
LAYOUT_ALONE = {
    *('clone', 'copy_', '_to_copy', 'split', 'split_with_sizes', 'slice', 'view', 'permute'),
    *('expand', 'detach', 'alias', 'as_strided', 'unsqueeze', 'new_empty_strided'),
}


#: No weight has as many output channels.
BATCH = 5


class Layouts(TorchDispatchMode):
    """Operations on feature maps of `batch` images that see more than one layout, or gaps."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.mixed: list[tuple[str, ...]] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # Of one channel or one pixel every layout is the same. What is not three times as wide as
        # high is no feature map of the image, but the matrices of an attention.
        maps = [
            t
            for t in tensors
            if t.dim() == 4
            and len(t) == self.batch
            and min(t.shape) > 1
            and t.shape[3] == 3 * t.shape[2]
        ]
        layouts = {self.layout(t) for t in maps} - {''}
        if name not in LAYOUT_ALONE and maps:
            self.seen.add(name)
            if len(layouts) > 1 or 'gaps' in layouts:
                self.mixed.append((name, *sorted(layouts)))
        return out

    @staticmethod
    def layout(x: torch.Tensor) -> str:
        contiguous, last = (x.is_contiguous(memory_format=f) for f in
                            (torch.contiguous_format, torch.channels_last))  # fmt: skip
        if contiguous and last:
            return ''
        return 'contiguous' if contiguous else 'channels_last' if last else 'gaps'


@pytest.mark.parametrize('mode', ['train', 'norm_eval', 'frozen'])
@pytest.mark.parametrize('name', [*TINY])
def test_no_operation_of_backward_sees_two_layouts(name: str, mode: str) -> None:
    """Necks hand back contiguous gradients; left so, they would run through whole stages."""
    network = pair(name, mode)[1]
    x = torch.rand(BATCH, 3, 96, 288, dtype=torch.float64)
    outputs = network(x)
    gradients = [torch.rand_like(out) for out in outputs if out.requires_grad]
    assert gradients
    assert not any(is_channels_last(gradient) for gradient in gradients)
    with Layouts(BATCH) as layouts:
        torch.autograd.backward([out for out in outputs if out.requires_grad], gradients)
    assert 'convolution_backward' in layouts.seen
    assert layouts.mixed == []


def test_outputs_may_be_changed_in_place() -> None:
    network = tiny('repnext_m').train()
    x = torch.rand(2, 3, 64, 64)
    for fed, changed in ((x, slice(None)), (x.contiguous(memory_format=torch.channels_last), -1)):
        network.zero_grad()
        # Without a conversion, an output is what the next stage computes with, but the last.
        outputs = network(fed)[changed]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(F.relu_(out).sum() for out in outputs).backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize('name', ['repnext_m', 'recnext_m', 'inception_next'])
def test_the_default_format_reaches_every_convolution(name):
    seen = {}
    for fast in (True, False):
        model = tiny(name, fast=fast)
        formats = seen[fast] = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda _, args, to=formats: to.append(is_channels_last(args[0]))
                )
        model(image(model))
        assert formats
    assert all(seen[True])
    assert not any(seen[False])


@NETWORKS
def test_modes_can_be_switched_back_and_forth(name):
    reference, fast = pair(name, 'train')
    x = image(fast, dtype=torch.float64)
    for mode in ('train', 'eval', 'norm_eval', 'train', 'norm_eval', 'eval'):
        for model in (reference, fast):
            model.norm_eval = mode == 'norm_eval'
            model.train(mode != 'eval')
        assert_same_step(reference, fast, x)


@NETWORKS
@pytest.mark.parametrize('mode', ['train', 'norm_eval'])
def test_saving_memory_keeps_fewer_bytes_and_the_same_gradients(name, mode):
    plain = tiny(name, norm_eval=mode == 'norm_eval')
    saving = optimize(copy.deepcopy(plain), save_memory=True)
    reference = tiny(name, norm_eval=mode == 'norm_eval', fast=False)
    x = image(plain)
    sizes = [saved_bytes(lambda m=m: m(x)) for m in (reference, plain, saving)]
    assert sizes[2] < sizes[1] <= sizes[0], sizes
    with torch.autocast('cpu', torch.bfloat16):
        expected, actual = grads(plain, x), grads(saving, x)
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


def test_saving_memory_leaves_recomputed_blocks_and_other_norms_alone():
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    reference, fast = pair('repnext_m', 'train', save_memory=True, with_cp=True)
    assert_same_step(reference, fast, x)
    # Cumulative statistics have no momentum; the norm computes them itself.
    reference, fast = pair('repnext_m', 'train', save_memory=True)
    for model in (reference, fast):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    assert_same_step(reference, fast, x)


@NETWORKS
@MODES
def test_a_hook_on_any_layer_sees_what_goes_in_and_out(name, mode):
    """Layers that are computed together with others are called as they are where one has a hook."""
    reference, fast = pair(name, mode)
    seen = {model: {} for model in (reference, fast)}
    for model in seen:
        for key, layer in model.named_modules():
            layer.register_forward_hook(
                lambda _, args, out, to=seen[model], key=key: to.update({key: out})
            )
    x = image(fast, dtype=torch.float64)
    assert_same_step(reference, fast, x)
    called = {key for key, out in seen[reference].items() if isinstance(out, torch.Tensor)}
    assert called <= set(seen[fast])
    for key in called:
        torch.testing.assert_close(seen[fast][key], seen[reference][key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('name', ['repnext_m', 'recnext_l', 'inception_next'])
def test_pruned_weights_stay_pruned(name):
    """torch.nn.utils.prune computes a masked weight in a hook, in front of every forward pass."""
    model = tiny(name).eval()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        prune.random_unstructured(conv, 'weight', 0.5)
    with torch.no_grad():
        for conv in convs:
            conv.weight_orig.mul_(1.5)  # as an optimizer's step would change it
    x = image(model)
    pruned = model(x)
    for conv in convs:
        prune.remove(conv, 'weight')
    for a, b in zip(pruned, model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_single_value_per_channel_is_refused_in_training_as_by_torch():
    model = tiny('repnext_m')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(torch.randn(1, 3, 32, 32))


def test_batch_statistics_have_the_gradient_of_their_definition():
    norm = nn.BatchNorm2d(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def affine(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return door.separate(norm, x)[1]

    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale, shift = affine(x)
    torch.testing.assert_close(scale, (var + norm.eps).rsqrt() * norm.weight)
    torch.testing.assert_close(shift, norm.bias - mean * scale)
    assert torch.autograd.gradcheck(affine, x)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gelu_sees_contiguous_memory_in_either_layout(layout, monkeypatch):
    plain = F.gelu
    seen = []
    monkeypatch.setattr(F, 'gelu', lambda x: seen.append(x.is_contiguous()) or plain(x))
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=layout).requires_grad_()
    out = GELU()(x)
    out.square().sum().backward()
    assert seen == [True]
    assert out.stride() == x.stride() == x.grad.stride()
    twin = x.detach().clone().requires_grad_()
    plain(twin).square().sum().backward()
    torch.testing.assert_close(out, plain(x))
    torch.testing.assert_close(x.grad, twin.grad)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(5, 5), (7, 7), (3, 7), (7, 11), (1, 5), (9, 3)]),
)
def test_weight_gradients_by_columns_are_exact(shape, kernel):
    x, grad = (
        torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(shape[1], 1, *kernel, dtype=torch.float64, requires_grad=True)
    padding = (kernel[0] // 2, kernel[1] // 2)
    F.conv2d(x, weight, None, 1, padding, groups=shape[1]).backward(grad)
    actual = door.split_weight_gradient(x, grad, weight.detach(), padding)
    torch.testing.assert_close(actual, weight.grad)


def test_wide_depthwise_convolutions_split_their_gradient_where_onednn_is_slow(monkeypatch):
    calls = []
    split = door.split_weight_gradient
    monkeypatch.setattr(door, '_lacks_wide_gradient', lambda: True)
    monkeypatch.setattr(door, 'WORTHWHILE', 1)
    monkeypatch.setattr(door, 'split_weight_gradient', lambda *a: calls.append(1) or split(*a))
    reference, fast = tiny('repnext_m', fast=False), tiny('repnext_m')
    x = image(fast)
    expected, actual = grads(reference, x), grads(fast, x)
    assert len(calls) == 5  # the 7x7 convolution of each block; strided ones are fast
    for key in expected:
        error = (actual[key] - expected[key]).norm()
        assert error < 1e-4 * expected[key].norm() + 1e-2, key


def test_optimize_sets_every_backbone_and_refuses_other_models():
    model = nn.ModuleDict(dict(a=tiny('repnext_m'), b=tiny('recnext_m', with_cp=True)))
    assert optimize(model, save_memory=True, channels_last=False) is model
    assert model['a'].stages[0].blocks[0].channel_mixer.save_memory
    assert not model['b'].stages[0].blocks[0].channel_mixer.save_memory
    assert model['a'].channels_last is False
    assert optimize(model, save_memory=False)['a'].channels_last is False
    assert not model['a'].stages[0].blocks[0].channel_mixer.save_memory
    with pytest.raises(TypeError, match=r'Conv2d holds no backbone of repnext_mm'):
        optimize(nn.Conv2d(1, 1, 1))


def test_optimize_compiles_in_place_and_keeps_the_state_dict():
    torch._dynamo.reset()
    model = tiny('repnext_m').double()
    keys = [*model.state_dict()]
    x = image(model, dtype=torch.float64)
    expected = grads(model, x)
    optimize(model, compile=dict(backend='aot_eager', fullgraph=True))
    assert [*model.state_dict()] == keys
    for key, value in grads(model, x).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize('fast, convolutions', [(True, 1), (False, 7)])
def test_compilers_get_the_form_that_was_asked_for(fast: bool, convolutions: int) -> None:
    torch._dynamo.reset()
    layer = BranchedDepthwise(8, MEDIUM)
    set_execution(layer, fast=fast)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compile(layer, backend=record, fullgraph=True)(torch.randn(1, 8, 16, 16))
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum('conv2d' in name for name in called) == convolutions


@pytest.mark.slow
@pytest.mark.compat
def test_a_config_saves_memory_and_compiles_the_backbone_of_a_run(tmp_path):
    data = tool_runs.tiny_shapes(tmp_path / 'data', train=4)
    config, arch = tmp_path / 'compiled.py', TINY['repnext_m'][1]
    config.write_text(
        f'_base_ = {str(tool_runs.CONFIGS["seg"])!r}\n'
        f'model = dict(backbone=dict(arch=dict(_delete_=True, **{arch!r}), save_memory=True), '
        f'neck=dict(in_channels={list(arch["channels"])!r}))\n'
        "custom_hooks = [dict(type='CompileBackbone', backend='no_such_backend')]\n"
    )
    options = tool_runs.options('seg', data, 'train_cfg.max_iters=2')
    failed = tool_runs.run_here(train_main, config, *options, cwd=tmp_path)
    assert failed.returncode and 'no_such_backend' in failed.stdout + failed.stderr
    config.write_text(config.read_text().replace('no_such_backend', 'eager'))
    tool_runs.succeed_here(train_main, config, *options, cwd=tmp_path)
    [saved] = (tmp_path / 'work_dirs').rglob('iter_2.pth')
    keys = torch.load(saved, map_location='cpu')['state_dict']
    assert 'backbone.stem.stem.0.conv.weight' in keys


@pytest.mark.compat
@pytest.mark.parametrize('scope, method', [('mmdet', 'mask_rcnn'), ('mmseg', 'semantic_fpn')])
def test_detectors_and_segmentors_train_alike_in_every_form(scope, method, tmp_path):
    from conftest import REPO

    cfg = Config.fromfile(REPO / 'configs' / f'{method}_repnext_m0_shapes.py')
    batch = sample_batch(scope, sample_data(tmp_path), size=64)
    losses = {}
    state = None
    for form, options in {
        'published': dict(fast=False),
        'default': {},
        'saving': dict(save_memory=True, norm_eval=False),
    }.items():
        cfg.model.backbone.update(fast=True, save_memory=False)
        cfg.model.backbone.update(options)
        model = build(cfg).train()
        # The heads have kinks (ReLU, NMS, the L1 loss) where the last bit of a feature decides a
        # gradient, so the backbone gives them bits that do not depend on its form.
        model.backbone.double().register_forward_pre_hook(lambda _, args: (args[0].double(),))
        model.backbone.register_forward_hook(lambda _, args, out: tuple(x.float() for x in out))
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        torch.manual_seed(0)
        data = model.data_preprocessor(copy.deepcopy(batch), training=True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
        backbone = dict(model.backbone.named_parameters())
        losses[form] = loss.item(), backbone['stem.stem.0.conv.weight'].grad.norm().item()
    assert losses['default'] == pytest.approx(losses['published'], rel=1e-6)
    assert losses['saving'] == pytest.approx(losses['default'], rel=1e-6)

"""Our operators against mmcv's compiled ones, called directly with the same random arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from repnext_mm import operators

mmcv_ops = pytest.importorskip('mmcv.ops', reason='mmcv is not installed')
import mmcv._ext as compiled  # noqa: E402

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(
        operators.describe().kind != 'compiled',
        reason='mmcv._ext is ours: the comparison needs an mmcv with compiled operators',
    ),
]

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
ROUNDS = 30
#: Arguments that only the compiled operators use, as scratch.
BUFFERS = {'columns', 'ones', 'rfeatures', 'routput', 'rmasks', 'buff'} | {
    'rtop_grad',
    'rbottom_grad_hs',
    'rbottom_grad',
    'rmask_grad',
}

Arguments = dict[str, Any]


def pick(*options: Any) -> Any:
    return options[int(torch.randint(len(options), ()))]


def boxes(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes of any size and of whole numbers, some without area."""
    corner, extent = torch.rand(count, 2) * 30, torch.rand(count, 2) * 20
    result = torch.cat([corner, corner + extent], 1)
    return (result.round() if pick(True, False) else result).to(dtype)


def scores(count: int) -> Tensor:
    """Distinct scores: the compiled operators sort equal ones in no defined order."""
    return (torch.randperm(count) + 1.0) / (count + 1)


def nms() -> Iterator[tuple[str, Arguments]]:
    count = pick(0, 1, 7, 60)
    common = dict(iou_threshold=pick(0.3, 0.5, 0.6, 0.7), offset=pick(0, 1))
    yield 'nms', dict(boxes=boxes(count), scores=scores(count), **common)


def softnms() -> Iterator[tuple[str, Arguments]]:
    count = pick(0, 1, 7, 60)
    yield (
        'softnms',
        dict(
            boxes=boxes(count),
            # Equal scores too: their order is defined here.
            scores=pick(scores(count), scores(count).mul(4).ceil().div(4)),
            dets=torch.zeros(count, 5),
            iou_threshold=pick(0.3, 0.5, 0.6),
            sigma=pick(0.3, 0.5),
            min_score=pick(0.0, 0.05, 0.3),
            method=pick(0, 1, 2),
            offset=pick(0, 1),
        ),
    )


def nms_match() -> Iterator[tuple[str, Arguments]]:
    count = pick(1, 7, 60)
    dets = torch.cat([boxes(count), scores(count)[:, None]], 1)
    yield 'nms_match', dict(dets=dets, iou_threshold=pick(0.3, 0.5, 0.6))


def bbox_overlaps() -> Iterator[tuple[str, Arguments]]:
    aligned, rows = pick(True, False), pick(1, 6)
    columns = rows if aligned else pick(1, 5)
    yield (
        'bbox_overlaps',
        dict(
            bboxes1=boxes(rows) + torch.tensor([0, 0, 1, 1]),  # 0 / 0 is not compared
            bboxes2=boxes(columns) + torch.tensor([0, 0, 1, 1]),
            ious=torch.zeros(rows) if aligned else torch.zeros(rows, columns),
            mode=pick(0, 1),
            aligned=aligned,
            offset=pick(0, 1),
        ),
    )


def rois(features: Tensor) -> Tensor:
    count = pick(1, 4)
    image = torch.randint(len(features), (count, 1))
    corner = torch.rand(count, 2) * 20 - 3
    # Not so small that rounding decides over the number of samples.
    return torch.cat([image, corner, corner + torch.rand(count, 2) * 12 + 0.1], 1).to(features)


def feature_map(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(pick(1, 2), pick(1, 4), pick(1, 6, 9), pick(2, 7), dtype=dtype)


def roi_align() -> Iterator[tuple[str, Arguments]]:
    features = feature_map(pick(torch.float32, torch.float64))
    where, size = rois(features), dict(aligned_height=pick(1, 3), aligned_width=pick(1, 4))
    shape = (len(where), features.shape[1], *size.values())
    mode = pick(0, 1)
    argmax_y, argmax_x = (features.new_zeros(shape if mode == 0 else 0) for _ in range(2))
    common = dict(
        **size,
        rois=where,
        argmax_y=argmax_y,
        argmax_x=argmax_x,
        spatial_scale=pick(1.0, 0.5, 0.37),
        sampling_ratio=pick(0, 1, 3),
        pool_mode=mode,
        aligned=pick(True, False),
    )
    yield 'roi_align_forward', dict(input=features, output=features.new_zeros(shape), **common)
    grads = dict(
        grad_output=features.new_empty(shape).normal_(), grad_input=torch.zeros_like(features)
    )
    yield 'roi_align_backward', dict(**grads, **common)


def roi_pool() -> Iterator[tuple[str, Arguments]]:
    features = feature_map()
    where, size = rois(features), dict(pooled_height=pick(1, 3), pooled_width=pick(1, 4))
    shape = (len(where), features.shape[1], *size.values())
    argmax = torch.zeros(shape, dtype=torch.int)
    common = dict(**size, rois=where, argmax=argmax, spatial_scale=pick(1.0, 0.5))
    yield 'roi_pool_forward', dict(input=features, output=torch.zeros(shape), **common)
    grads = dict(grad_output=torch.randn(shape), grad_input=torch.zeros_like(features))
    yield 'roi_pool_backward', dict(**grads, **common)


def deform_roi_pool() -> Iterator[tuple[str, Arguments]]:
    features = torch.randn(pick(1, 2), pick(1, 4), 6, 7)
    size = dict(pooled_height=pick(1, 3), pooled_width=pick(1, 4))
    # Inside the map: at its border the compiled gradient of the offsets is not that of the output.
    inside = torch.cat([torch.full((2,), 2.0), torch.full((2,), 3.1)]) + torch.rand(pick(1, 4), 4)
    image = torch.randint(len(features), (len(inside), 1))
    where = dict(forward=rois(features), backward=torch.cat([image, inside], 1))
    for direction, boxes_ in where.items():
        shape = (len(boxes_), features.shape[1], *size.values())
        offset = pick(torch.zeros(0), torch.randn(len(boxes_), 2, *size.values()).clamp(-2, 2))
        tensors = dict(output=torch.zeros(shape))
        if direction == 'backward':
            tensors = dict(
                grad_output=torch.randn(shape),
                grad_input=torch.zeros_like(features),
                grad_offset=torch.zeros_like(offset),
            )
        yield (
            f'deform_roi_pool_{direction}',
            dict(
                **size,
                **tensors,
                input=features,
                rois=boxes_,
                offset=offset,
                spatial_scale=pick(1.0, 0.5),
                sampling_ratio=pick(0, 2),
                gamma=0.1,
            ),
        )


def _convolution() -> tuple[Arguments, dict[str, tuple[int, int]], dict[str, int], Tensor]:
    """Tensors, pairs (height, width), group counts, and a gradient of the output."""
    groups, deform_groups, batch = pick(1, 2), pick(1, 2), pick(1, 2, 4)
    kernel = (pick(1, 3), pick(1, 2, 3))
    pairs = dict(
        stride=(pick(1, 2), pick(1, 2)),
        pad=(pick(0, 1, 2), pick(0, 1)),
        dilation=(pick(1, 2), pick(1, 2)),
    )
    size = (pick(5, 8), pick(5, 9))
    out = [
        (size[i] + 2 * pairs['pad'][i] - pairs['dilation'][i] * (kernel[i] - 1) - 1)
        // pairs['stride'][i]
        + 1
        for i in (0, 1)
    ]
    dtype = pick(torch.float32, torch.float64)
    points = deform_groups * math.prod(kernel)
    tensors = dict(
        input=torch.randn(batch, 4, *size, dtype=dtype),
        weight=torch.randn(6, 4 // groups, *kernel, dtype=dtype),
        offset=torch.randn(batch, 2 * points, *out, dtype=dtype) * pick(0.5, 3),
        mask=torch.rand(batch, points, *out, dtype=dtype),
        bias=torch.randn(6, dtype=dtype),
    )
    grad = torch.randn(batch, 6, *out, dtype=dtype)
    return tensors, pairs, dict(group=groups, deformable_group=deform_groups), grad


def deform_conv() -> Iterator[tuple[str, Arguments]]:
    tensors, pairs, groups, grad = _convolution()
    names = {
        'stride': ('dH', 'dW'),
        'pad': ('padH', 'padW'),
        'dilation': ('dilationH', 'dilationW'),
    }
    common = dict(
        **{key: value for name, pair in pairs.items() for key, value in zip(names[name], pair)},
        **groups,
        kH=tensors['weight'].shape[2],
        kW=tensors['weight'].shape[3],
        im2col_step=pick(1, len(grad)),
        input=tensors['input'],
        offset=tensors['offset'],
    )
    empty = grad.new_empty(0)
    weight, buffers = tensors['weight'], dict(columns=empty, ones=empty.clone())
    output = torch.zeros_like(grad)
    yield 'deform_conv_forward', dict(weight=weight, output=output, **buffers, **common)
    grads = dict(
        gradInput=torch.zeros_like(tensors['input']), gradOffset=torch.zeros_like(tensors['offset'])
    )
    yield (
        'deform_conv_backward_input',
        dict(gradOutput=grad, weight=weight, columns=empty, **grads, **common),
    )
    grads = dict(gradWeight=torch.zeros_like(weight))
    yield (
        'deform_conv_backward_parameters',
        dict(gradOutput=grad, scale=1, **grads, **buffers, **common),
    )


def modulated_deform_conv() -> Iterator[tuple[str, Arguments]]:
    tensors, pairs, groups, grad = _convolution()
    with_bias = pick(True, False)
    if not with_bias:
        tensors['bias'] = grad.new_empty(0)
    common = dict(
        **{
            f'{name}_{axis}': value
            for name, pair in pairs.items()
            for axis, value in zip('hw', pair)
        },
        **groups,
        **tensors,
        kernel_h=tensors['weight'].shape[2],
        kernel_w=tensors['weight'].shape[3],
        with_bias=with_bias,
        ones=grad.new_empty(0),
        columns=grad.new_empty(0),
    )
    yield 'modulated_deform_conv_forward', dict(output=torch.zeros_like(grad), **common)
    grads = {f'grad_{name}': torch.zeros_like(tensor) for name, tensor in tensors.items()}
    yield 'modulated_deform_conv_backward', dict(grad_output=grad, **grads, **common)


def _focal_loss(kind: str) -> Iterator[tuple[str, Arguments]]:
    samples, classes = pick(1, 9), pick(1, 4)
    logits = torch.randn(samples, classes) * 3
    # A target without a class reads beyond the weights in the compiled operators.
    weight = pick(torch.zeros(0), torch.rand(classes) + 0.5)
    lowest, highest = (0, classes) if weight.numel() else (0 - (kind == 'softmax'), classes)
    target = torch.randint(lowest, highest + (kind == 'sigmoid' and not weight.numel()), (samples,))
    common = dict(
        input=logits if kind == 'sigmoid' else logits.softmax(1),
        target=target,
        weight=weight,
        gamma=pick(1.5, 2.0),
        alpha=0.25,
    )
    output = torch.zeros(samples) if kind == 'softmax' else torch.zeros_like(logits)
    buffers = dict(buff=torch.zeros(samples)) if kind == 'softmax' else {}
    yield f'{kind}_focal_loss_forward', dict(output=output, **common)
    yield (
        f'{kind}_focal_loss_backward',
        dict(grad_input=torch.zeros_like(logits), **buffers, **common),
    )


def sigmoid_focal_loss() -> Iterator[tuple[str, Arguments]]:
    return _focal_loss('sigmoid')


def softmax_focal_loss() -> Iterator[tuple[str, Arguments]]:
    return _focal_loss('softmax')


def ms_deform_attn() -> Iterator[tuple[str, Arguments]]:
    shapes = torch.tensor(pick([[4, 5]], [[4, 5], [2, 3]]))
    pixels = shapes.prod(1)
    batch, queries, heads, points, channels = pick(1, 2), pick(1, 5), pick(1, 2), pick(1, 3), 4
    places = (batch, queries, heads, len(shapes), points)
    tensors = dict(
        value=torch.randn(batch, int(pixels.sum()), heads, channels),
        sampling_locations=torch.rand(*places, 2) * 1.4 - 0.2,
        attention_weights=torch.rand(places),
    )
    common = dict(
        **tensors,
        value_spatial_shapes=shapes,
        value_level_start_index=pixels.cumsum(0) - pixels,
        im2col_step=64,
    )
    yield 'ms_deform_attn_forward', common
    grads = dict(
        grad_output=torch.randn(batch, queries, heads * channels),
        grad_value=torch.zeros_like(tensors['value']),
        grad_sampling_loc=torch.zeros_like(tensors['sampling_locations']),
        grad_attn_weight=torch.zeros_like(tensors['attention_weights']),
    )
    yield 'ms_deform_attn_backward', dict(**grads, **common)


def carafe_naive() -> Iterator[tuple[str, Arguments]]:
    kernel, groups, scale = pick(1, 3, 5), pick(1, 2), pick(1, 2, 3)
    features = torch.randn(pick(1, 2), 4, pick(2, 4), 3)
    batch, channels, height, width = features.shape
    masks = torch.randn(batch, groups * kernel**2, height * scale, width * scale)
    output = torch.zeros(batch, channels, height * scale, width * scale)
    sizes = dict(kernel_size=kernel, group_size=groups, scale_factor=scale)
    common = dict(features=features, masks=masks, **sizes)
    yield 'carafe_naive_forward', dict(output=output, **common)
    grads = dict(
        top_grad=torch.randn_like(output),
        bottom_grad=torch.zeros_like(features),
        mask_grad=torch.zeros_like(masks),
    )
    yield 'carafe_naive_backward', dict(**grads, **common)


def masked_conv() -> Iterator[tuple[str, Arguments]]:
    image, kernel = feature_map()[:1], (pick(1, 3), pick(1, 3))
    _, channels, height, width = image.shape
    places = (torch.rand(height, width) > 0.5).nonzero()
    index = dict(mask_h_idx=places[:, 0].contiguous(), mask_w_idx=places[:, 1].contiguous())
    sizes = dict(kernel_h=kernel[0], kernel_w=kernel[1], pad_h=pick(0, 1), pad_w=pick(0, 1))
    if not len(places):
        return
    col = torch.zeros(channels * math.prod(kernel), len(places))
    yield 'masked_im2col_forward', dict(im=image, col=col, **index, **sizes)
    values = dict(col=torch.randn(channels, len(places)), im=torch.zeros_like(image))
    yield (
        'masked_col2im_forward',
        dict(**values, **index, height=height, width=width, channels=channels),
    )


def psamask() -> Iterator[tuple[str, Arguments]]:
    batch, mask, size = pick(1, 2), (pick(1, 3, 4, 7), pick(1, 3, 5)), (pick(1, 4), pick(2, 3))
    windows = torch.randn(batch, math.prod(mask), *size)
    pairs = torch.zeros(batch, math.prod(size), *size)
    common = dict(
        psa_type=pick(0, 1),
        num_=batch,
        h_feature=size[0],
        w_feature=size[1],
        h_mask=mask[0],
        w_mask=mask[1],
        half_h_mask=(mask[0] - 1) // 2,
        half_w_mask=(mask[1] - 1) // 2,
    )
    yield 'psamask_forward', dict(input=windows, output=pairs, **common)
    grads = dict(grad_output=torch.randn_like(pairs), grad_input=torch.zeros_like(windows))
    yield 'psamask_backward', dict(**grads, **common)


def sync_bn() -> Iterator[tuple[str, Arguments]]:
    x = torch.randn(pick(1, 3), 4, pick(2, 6)) * 3 + 1
    mean, var, weight, bias = x.mean((0, 2)), x.var((0, 2)), torch.rand(4) + 0.5, torch.randn(4)
    norm, std = torch.zeros_like(x), torch.zeros(4)
    yield 'sync_bn_forward_mean', dict(input=x, mean=torch.zeros(4))
    yield 'sync_bn_forward_var', dict(input=x, mean=mean, var=torch.zeros(4))
    yield (
        'sync_bn_forward_output',
        dict(
            input=x,
            mean=mean,
            var=var,
            weight=weight,
            bias=bias,
            running_mean=torch.zeros(4),
            running_var=torch.ones(4),
            norm=norm,
            std=std,
            output=torch.zeros_like(x),
            eps=1e-5,
            momentum=0.1,
            group_size=pick(1, 2),
        ),
    )
    grads = dict(grad_weight=torch.zeros(4), grad_bias=torch.zeros(4))
    norm = torch.randn_like(x)
    yield 'sync_bn_backward_param', dict(grad_output=torch.randn_like(x), norm=norm, **grads)
    yield (
        'sync_bn_backward_data',
        dict(
            grad_output=torch.randn_like(x),
            weight=weight,
            grad_weight=torch.randn(4),
            grad_bias=torch.randn(4),
            norm=norm,
            std=torch.rand(4) + 0.5,
            grad_input=torch.zeros_like(x),
        ),
    )


#: mmcv has CPU kernels for the first of these, and CUDA kernels for all but softnms and nms_match.
ON_CPU = [
    nms,
    softnms,
    nms_match,
    bbox_overlaps,
    roi_align,
    deform_conv,
    modulated_deform_conv,
    psamask,
]
ON_CUDA = [
    nms,
    bbox_overlaps,
    roi_align,
    roi_pool,
    deform_roi_pool,
    deform_conv,
    modulated_deform_conv,
    sigmoid_focal_loss,
    softmax_focal_loss,
    ms_deform_attn,
    carafe_naive,
    masked_conv,
    psamask,
    sync_bn,
]
PAIRS = [
    pytest.param(make, device, id=f'{make.__name__}-{device}')
    for device, group in (('cpu', ON_CPU), ('cuda', ON_CUDA))
    if device in DEVICES
    for make in group
]


def call(module: Any, name: str, arguments: Arguments) -> tuple[Any, Arguments]:
    """The operator's result, and its arguments after the call."""
    copies = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    result = getattr(module, name)(**copies)
    tensors = {
        key: value
        for key, value in copies.items()
        if isinstance(value, Tensor) and key not in BUFFERS
    }
    return result, tensors


@pytest.mark.parametrize('make, device', PAIRS)
def test_equal_to_the_compiled_operator(make: Callable, device: str) -> None:
    compared = 0
    written: set[str] = set()
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        earlier: Arguments = {}
        for name, arguments in make():
            arguments = {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in arguments.items()
            }
            # What the forward pass wrote for the backward pass.
            arguments |= {k: v for k, v in earlier.items() if k.startswith('argmax')}
            ours, our_tensors = call(operators, name, arguments)
            theirs, their_tensors = call(compiled, name, arguments)
            message = f'{name}, seed {seed}'
            if make is softnms and len(theirs):  # the rest is undefined
                for tensors in (our_tensors, their_tensors):
                    tensors['dets'] = tensors['dets'][: len(theirs)]
            assert type(ours) is type(theirs), message
            if isinstance(ours, Tensor):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True, msg=message
                )
            else:
                assert ours == theirs, message
            for key, tensor in our_tensors.items():
                torch.testing.assert_close(
                    tensor,
                    their_tensors[key],
                    rtol=1e-4,
                    atol=2e-4,
                    equal_nan=True,  # IoU of two boxes without area
                    msg=lambda text, where=f'{message}, {key}': f'{where}: {text}',
                )
                if not torch.equal(tensor, arguments[key]):
                    written.add(f'{name}.{key}')
            compared += 1
            earlier = their_tensors
    assert compared >= ROUNDS - 2
    # The test compared results, not tensors that no operator wrote to.
    assert written or make in (nms, nms_match, ms_deform_attn), written


@pytest.mark.parametrize('device', [device for device in DEVICES if device == 'cuda'] or ['none'])
def test_carafe(device: str) -> None:
    """Each side reads in its backward pass what its own forward pass left in rfeatures."""
    if device == 'none':
        pytest.skip("mmcv's carafe has CUDA kernels only, and there is no CUDA device")
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        (_, forward), (_, backward) = list(carafe_naive())
        results = []
        for module in (operators, compiled):
            tensors = {
                k: v.to(device) for k, v in (forward | backward).items() if isinstance(v, Tensor)
            }
            features, masks, output = (tensors[k].clone() for k in ('features', 'masks', 'output'))
            grads = [torch.zeros_like(features), torch.zeros_like(masks)]
            sizes = {k: v for k, v in forward.items() if not isinstance(v, Tensor)}
            rfeatures = torch.zeros_like(features)
            module.carafe_forward(
                features,
                masks,
                rfeatures,
                torch.zeros_like(output),
                torch.zeros_like(masks),
                output,
                **sizes,
            )
            scratch = [torch.zeros_like(t) for t in (output, output, features, masks)]
            module.carafe_backward(
                tensors['top_grad'].clone(), rfeatures, masks, *scratch, *grads, **sizes
            )
            results.append([output, *grads])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

"""mmcv's operators by torchvision: outputs and gradients, through mmcv's own Python functions.

Compared with the plain references of operator_references.py, and with finite differences.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import operator_references as plain
import pytest
import torch
from torch import Tensor

from repnext_mm import operators

mmcv_ops = pytest.importorskip('mmcv.ops', reason='mmcv is not installed')

# Without it torch refuses matrix products on CUDA where algorithms must be deterministic.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
NARROW = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our operators, seeded random numbers, and float64 unless told otherwise."""
    plain.use_ours(monkeypatch)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def masked(tensor: Tensor, share: float = 0.5) -> Tensor:
    return tensor * (torch.rand(tensor.shape) < share)


def make_rois(count: int = 5, images: int = 2, size: float = 12.0) -> Tensor:
    """RoIs inside, across and beyond the border of a map of 12 pixels, and one of no area."""
    corner, extent = torch.rand(count, 2) * size - 2, torch.rand(count, 2) * size / 2 + 0.5
    boxes = torch.cat([corner, corner + extent], 1)
    boxes[-1, 2:] = boxes[-1, :2]
    return torch.cat([torch.arange(count)[:, None] % images, boxes], 1)


Case = tuple[Callable, Callable, list[Tensor], tuple]


def roi_align(ratio: int, mode: str, aligned: bool) -> Case:
    args = (make_rois(), (3, 2), 0.5, ratio, mode, aligned)
    return mmcv_ops.roi_align, plain.roi_align, [torch.randn(2, 3, 6, 7)], args


def roi_pool(scale: float) -> Case:
    return (
        mmcv_ops.roi_pool,
        plain.roi_pool,
        [torch.randn(2, 3, 6, 7)],
        (make_rois(), (3, 2), scale),
    )


def deform_roi_pool(ratio: int, with_offset: bool) -> Case:
    features, rois = torch.randn(2, 3, 6, 7), make_rois()
    rest = ((3, 2), 0.5, ratio, 0.3)

    # The RoIs stand between two tensors with gradients.
    def arranged(function: Callable) -> Callable:
        return lambda features, *offset: function(
            features, rois.to(features.device), *(offset or (None,)), *rest
        )

    tensors = [features, torch.randn(5, 2, 3, 2)] if with_offset else [features]
    sides = (mmcv_ops.deform_roi_pool, plain.deform_roi_pool)
    return *map(arranged, sides), tensors, ()  # type: ignore[return-value]


# stride, padding, dilation, groups, deform_groups
GEOMETRIES = [
    ((1, 1), (1, 1), (1, 1), 1, 1),
    ((2, 1), (0, 2), (1, 2), 2, 1),
    ((1, 2), (2, 1), (2, 1), 1, 2),
    ((2, 2), (1, 1), (1, 1), 4, 2),
]


def deform_conv_tensors(geometry: tuple, batch: int = 2) -> list[Tensor]:
    """Input, offset, mask, weight and bias of a kernel of 3 x 2."""
    stride, padding, dilation, groups, deform_groups = geometry
    kernel, size = (3, 2), (6, 7)
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    points = deform_groups * 6
    return [
        torch.randn(batch, 4, *size),
        torch.randn(batch, 2 * points, *out) * 2,
        torch.rand(batch, points, *out),
        torch.randn(8, 4 // groups, *kernel),
        torch.randn(8),
    ]


def deform_conv2d(geometry: tuple) -> Case:
    x, offset, _, weight, _ = deform_conv_tensors(geometry)
    return mmcv_ops.deform_conv2d, plain.deform_conv2d, [x, offset, weight], geometry


def modulated_deform_conv2d(geometry: tuple, bias: bool) -> Case:
    *tensors, b = deform_conv_tensors(geometry)
    functions = (mmcv_ops.modulated_deform_conv2d, plain.modulated_deform_conv2d)
    if bias:
        return *functions, [*tensors, b], geometry  # type: ignore[return-value]
    return *functions, tensors, (None, *geometry)  # type: ignore[return-value]


def focal_loss(kind: str, weighted: bool, reduction: str, gamma: float = 2.0) -> Case:
    # The last target is background (sigmoid) or ignored (softmax).
    target = torch.tensor([0, 2, 1, 1, 3 if kind == 'sigmoid' else -1])
    weight = torch.tensor([0.5, 2.0, 1.5]) if weighted else None
    functions = (getattr(side, f'{kind}_focal_loss') for side in (mmcv_ops, plain))
    args = (target, gamma, 0.25, weight, reduction)
    return *functions, [torch.randn(5, 3)], args  # type: ignore[return-value]


def carafe(kernel: int, groups: int, scale: int) -> Case:
    features = torch.randn(2, 2, 3, 2)
    masks = torch.randn(2, groups * kernel**2, 3 * scale, 2 * scale)
    return mmcv_ops.carafe, plain.carafe, [features, masks], (kernel, groups, scale)


def ms_deform_attn() -> Case:
    shapes = torch.tensor([[4, 5], [2, 3]])
    starts = torch.tensor([0, 20])
    tensors = [
        torch.randn(2, 26, 2, 3),
        torch.rand(2, 4, 2, 2, 3, 2) * 1.4 - 0.2,
        torch.rand(2, 4, 2, 2, 3),
    ]
    apply = sys.modules['mmcv.ops.multi_scale_deform_attn'].MultiScaleDeformableAttnFunction.apply  # type: ignore[attr-defined]

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        levels = (shapes.to(value.device), starts.to(value.device))
        return apply(value, *levels, locations, weights, 64)

    def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return plain.ms_deform_attn(value, shapes, starts, locations, weights)

    return ours, reference, tensors, ()


def psa_mask(psa_type: int, mask_size: tuple[int, int]) -> Case:
    function = sys.modules['mmcv.ops.psa_mask'].psa_mask  # type: ignore[attr-defined]
    tensors = [torch.randn(2, math.prod(mask_size), 4, 3)]
    return function, plain.psa_mask, tensors, (psa_type, mask_size)


CASES: dict[str, Callable[[], Case]] = {
    **{
        f'roi_align-{mode}-{ratio}-{aligned}': lambda a=(ratio, mode, aligned): roi_align(*a)
        for mode in ('avg', 'max')
        for ratio in (0, 2)
        for aligned in (True, False)
    },
    **{f'roi_pool-{scale}': lambda a=scale: roi_pool(a) for scale in (1.0, 0.37)},
    **{
        f'deform_roi_pool-{ratio}-{offset}': lambda a=(ratio, offset): deform_roi_pool(*a)
        for ratio in (0, 2)
        for offset in (True, False)
    },
    **{
        f'deform_conv2d-{index}': lambda a=geometry: deform_conv2d(a)
        for index, geometry in enumerate(GEOMETRIES)
    },
    **{
        f'modulated_deform_conv2d-{index}-{bias}': lambda a=(geometry, bias): (
            modulated_deform_conv2d(*a)
        )
        for index, geometry in enumerate(GEOMETRIES)
        for bias in (True, False)
    },
    **{
        f'{kind}_focal_loss-{weighted}-{reduction}': lambda a=(kind, weighted, reduction): (
            focal_loss(*a)
        )
        for kind in ('sigmoid', 'softmax')
        for weighted in (True, False)
        # softmax_focal_loss of mmcv multiplies its gradient (N, C) by that of the loss (N,).
        for reduction in ('mean', 'sum', *(['none'] if kind == 'sigmoid' else []))
    },
    'sigmoid_focal_loss-gamma': lambda: focal_loss('sigmoid', False, 'sum', gamma=1.3),
    'carafe-5': lambda: carafe(5, 1, 2),
    'carafe-grouped': lambda: carafe(3, 2, 3),
    'ms_deform_attn': ms_deform_attn,
    **{
        f'psa_mask-{kind}-{size}': lambda a=(kind, size): psa_mask(*a)
        for kind in (0, 1)
        for size in ((7, 5), (3, 3), (4, 2))
    },
}


ONE_OF_EACH = [
    'roi_align-avg-0-True',
    'roi_align-max-2-False',
    'roi_pool-1.0',
    'deform_roi_pool-2-True',
    'deform_conv2d-2',
    'modulated_deform_conv2d-3-True',
    'sigmoid_focal_loss-True-sum',
    'softmax_focal_loss-True-sum',
    'carafe-5',
    'ms_deform_attn',
    'psa_mask-0-(7, 5)',
]


def to(values: Any, **kwargs: Any) -> list:
    """The values with their floating-point tensors converted and all tensors moved."""
    moved = []
    for value in values:
        if isinstance(value, Tensor):
            floating = value.is_floating_point()
            value = value.to(**kwargs) if floating else value.to(kwargs.get('device'))
        moved.append(value)
    return moved


def run(function: Callable, tensors: list[Tensor], args: Any) -> list[Tensor]:
    """Output and gradients of a random sum over it, in float64 on the CPU."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, *args)
    torch.manual_seed(1)
    direction = torch.randn(output.shape, dtype=torch.float64).to(output)
    grads = torch.autograd.grad(output, leaves, direction, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]
    return [result.detach().cpu().double() for result in (output, *grads)]


@pytest.mark.parametrize('name', CASES)
def test_output_and_gradients_equal_the_reference(name: str, device: str) -> None:
    function, reference, tensors, args = CASES[name]()
    expected = run(reference, tensors, args)
    found = run(function, to(tensors, device=device), to(args, device=device))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.count_nonzero(result) for result in found)


@pytest.mark.parametrize('name', [name for name in CASES if 'none' not in name])
def test_gradients_equal_finite_differences(name: str, device: str) -> None:
    function, _, tensors, args = CASES[name]()
    leaves = [tensor.requires_grad_() for tensor in to(tensors, device=device)]
    args = to(args, device=device)
    # One random direction per input and output: the tests above compare every element.
    assert torch.autograd.gradcheck(
        lambda *inputs: function(*inputs, *args), leaves, fast_mode=True, nondet_tol=1e-10
    )


@pytest.mark.parametrize('dtype', NARROW, ids=str)
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_every_precision(name: str, dtype: torch.dtype, device: str) -> None:
    function, _, tensors, args = CASES[name]()
    # float64 of the same rounded values
    tensors, args = (to(to(values, dtype=dtype), dtype=torch.float64) for values in (tensors, args))
    expected = run(function, to(tensors, device=device), to(args, device=device))
    kwargs = dict(device=device, dtype=dtype)
    found = run(function, to(tensors, **kwargs), to(args, **kwargs))
    scale = [max(1.0, float(result.abs().max())) for result in expected]
    for result, wanted, size in zip(found, expected, scale):
        torch.testing.assert_close(result, wanted, rtol=0, atol=NARROW[dtype] * size)
    output = function(*to(tensors, **kwargs), *to(args, **kwargs))
    assert output.dtype == dtype


@pytest.mark.parametrize(
    'name',
    ['roi_align-avg-0-True', 'roi_align-max-0-True', 'roi_pool-1.0', 'deform_roi_pool-0-True'],
)
def test_no_rois(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), 'make_rois', lambda: torch.zeros(0, 5))
    function, _, tensors, args = CASES[name]()
    tensors = [tensor[:0] if tensor.shape[1:] == (2, 3, 2) else tensor for tensor in tensors]
    output, grad, *_ = run(function, to(tensors, device=device), to(args, device=device))
    assert output.shape == (0, 3, 3, 2)
    assert torch.equal(grad, torch.zeros_like(tensors[0]))


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_inputs_that_are_not_contiguous(name: str, device: str) -> None:
    function, _, tensors, args = CASES[name]()
    expected = run(function, to(tensors, device=device), to(args, device=device))
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    assert not all(tensor.is_contiguous() for tensor in strided)
    found = run(function, to(strided, device=device), to(args, device=device))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_same_gradients_in_every_run(name: str, device: str) -> None:
    """As mmengine's `deterministic=True` asks for, also where CUDA adds in any order."""
    function, _, tensors, args = CASES[name]()
    tensors, args = to(tensors, device=device), to(args, device=device)
    reference = run(function, tensors, args)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(function, tensors, args) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two, other in zip(first, second, reference):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, other)


def test_weight_gradient_is_of_its_own_call(device: str) -> None:
    """What the call for the input leaves is used for the same output gradient only, and once."""
    x, offset, _, weight, _ = to(deform_conv_tensors(GEOMETRIES[0]), device=device)
    sizes = dict(kW=2, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1)
    sizes |= dict(group=1, deformable_group=1, im2col_step=2)
    one, other = (torch.randn(2, 8, 6, 8, device=device) for _ in range(2))

    def weight_grad(grad: Tensor, columns: Tensor) -> Tensor:
        result = torch.zeros_like(weight)
        operators.deform_conv_backward_parameters(
            x, offset, grad, result, columns, columns, scale=2, **sizes
        )
        return result

    expected = [weight_grad(grad, x.new_empty(0)) for grad in (one, other)]
    assert not torch.allclose(*expected)
    for grad, wanted in zip((one, other), expected):
        columns = x.new_empty(0)
        grads = [torch.zeros_like(x), torch.zeros_like(offset)]
        operators.deform_conv_backward_input(x, offset, one, *grads, weight, columns, **sizes)
        torch.testing.assert_close(weight_grad(grad, columns), wanted)
        assert not vars(columns)


def test_im2col_step_changes_nothing(device: str) -> None:
    x, offset, _, weight, _ = to(deform_conv_tensors(GEOMETRIES[0], batch=4), device=device)
    outputs = [
        mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1, False, step) for step in (1, 2, 32)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_carafe_naive(device: str) -> None:
    _, reference, tensors, (kernel, groups, scale) = CASES['carafe-grouped']()
    expected = run(reference, tensors, (kernel, groups, scale))
    features, masks = to(tensors, device=device)
    output = mmcv_ops.carafe_naive(features, masks, kernel, groups, scale)
    torch.manual_seed(1)
    # mmcv's Python function asserts CUDA in its backward pass.
    grads = [torch.zeros_like(features), torch.zeros_like(masks)]
    operators.carafe_naive_backward(
        torch.randn(output.shape).to(output),
        features,
        masks,
        *grads,
        kernel_size=kernel,
        group_size=groups,
        scale_factor=scale,
    )
    torch.testing.assert_close([t.cpu() for t in (output, *grads)], expected)


@pytest.mark.parametrize('padding', [0, 1, 3])
def test_masked_conv2d(padding: int, device: str) -> None:
    features, weight, bias = torch.randn(1, 3, 6, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    full = torch.conv2d(features, weight, bias, padding=padding)
    mask = torch.zeros(1, 6, 7)
    # Places of the output, which is smaller than the features without padding.
    mask[:, :4, :5] = (torch.rand(1, 4, 5) > 0.5).double()
    arguments = to([features, mask, weight, bias], device=device)
    output = mmcv_ops.masked_conv2d(*arguments, padding).cpu()
    inside = torch.zeros(full.shape[2:], dtype=torch.bool)
    inside[:4, :5] = mask[0, :4, :5] > 0
    torch.testing.assert_close(output, full * inside)
    empty = mmcv_ops.masked_conv2d(arguments[0], arguments[1] * 0, *arguments[2:], padding)
    assert not empty.any()


def test_sync_batch_norm(device: str) -> None:
    torch.set_default_dtype(torch.float32)  # mmcv refuses float64
    x, weight, bias = torch.randn(4, 3, 5, 2) * 3 + 1, torch.rand(3) + 0.5, torch.randn(3)
    results = []
    for ours in (True, False):
        leaves = [leaf.to(device).requires_grad_() for leaf in (x, weight, bias)]
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        if ours:
            norm = sys.modules['mmcv.ops.sync_bn'].SyncBatchNormFunction  # type: ignore[attr-defined]
            rest = (0.1, 1e-5, None, 1, 'default')  # momentum, eps, group, its size, statistics
            output = norm.apply(leaves[0], mean, var, *leaves[1:], *rest)
        else:
            output = torch.batch_norm(
                leaves[0], *leaves[1:], mean, var, True, 0.1, 1e-5, cudnn_enabled=False
            )
        grads = torch.autograd.grad((output**3).sum(), leaves)
        results.append([output, mean, var, *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def make_boxes(count: int, whole_numbers: bool = False) -> tuple[Tensor, Tensor]:
    corner, extent = torch.rand(count, 2) * 20, torch.rand(count, 2) * 20 + 1
    boxes = torch.cat([corner, corner + extent], 1)
    return boxes.round() if whole_numbers else boxes, torch.rand(count)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.3, 0.6])
@pytest.mark.parametrize('dtype', [torch.float64, *NARROW], ids=str)
def test_nms(dtype: torch.dtype, threshold: float, offset: int, device: str) -> None:
    boxes, scores = (tensor.to(dtype) for tensor in make_boxes(60))
    dets, kept = mmcv_ops.nms(boxes.to(device), scores.to(device), threshold, offset)
    expected = plain.nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert 1 < len(expected) < 60
    assert kept.tolist() == expected
    assert dets.dtype == dtype
    assert torch.equal(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_keeps_a_box_at_the_threshold(device: str) -> None:
    """IoU 0.6 is 3 / 5; 0.6 in float32 is above 0.6 in float64."""
    boxes = torch.tensor([[0.0, 0, 4, 1], [1, 0, 5, 1]], dtype=torch.float32, device=device)
    scores = torch.tensor([0.9, 0.8], dtype=torch.float32, device=device)
    assert mmcv_ops.nms(boxes, scores, 0.6)[1].tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.599)[1].tolist() == [0]


def test_nms_of_equal_scores_takes_the_first(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [1, 0, 11, 10]], device=device)
    for count in (1, 30):  # torch sorts short and long inputs by different methods
        many = torch.cat([boxes, boxes.new_tensor([[50.0, 50, 51, 51]]).repeat(count, 1)])
        assert mmcv_ops.nms(many, torch.ones(len(many), device=device), 0.5)[1].tolist() == [
            0,
            1,
            3,
        ]


def test_nms_of_nothing(device: str) -> None:
    empty = torch.zeros(0, 4, device=device)
    assert operators.nms(empty, empty[:, 0], 0.5, 0).shape == (0,)
    assert operators.nms(empty, empty[:, 0], 0.5, 0).dtype == torch.long
    dets, kept = mmcv_ops.soft_nms(empty, empty[:, 0])
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    assert mmcv_ops.nms_match(torch.zeros(0, 5), 0.5) == []


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_soft_nms(dtype: torch.dtype, method: str, offset: int, device: str) -> None:
    boxes, scores = (tensor.to(dtype) for tensor in make_boxes(40))
    args = (0.3, 0.4, 0.05, method, offset)
    dets, kept = mmcv_ops.soft_nms(boxes.to(device), scores.to(device), *args)
    expected = plain.soft_nms(boxes.tolist(), scores.tolist(), *args)
    assert 1 < len(expected) < 40
    assert kept.tolist() == [index for index, _ in expected]
    wanted = torch.tensor([score for _, score in expected], dtype=dtype)
    torch.testing.assert_close(dets[:, 4].cpu(), wanted)
    assert torch.equal(dets[:, :4].cpu(), boxes[kept.cpu()])
    # numpy in, numpy out
    found = mmcv_ops.soft_nms(boxes.numpy(), scores.numpy(), *args)[1]
    assert isinstance(found, np.ndarray)
    assert found.tolist() == kept.tolist()


@pytest.mark.parametrize('threshold', [0.2, 0.6])
def test_nms_match(threshold: float, device: str) -> None:
    boxes, scores = make_boxes(40)
    dets = torch.cat([boxes, scores[:, None]], 1).to(device)
    groups = mmcv_ops.nms_match(dets, threshold)
    expected = plain.nms_match(boxes.tolist(), scores.tolist(), threshold)
    assert 1 < len(expected) < 40
    assert [group.tolist() for group in groups] == expected


def test_nms_match_groups_a_box_at_the_threshold() -> None:
    dets = torch.tensor([[0.0, 0, 4, 1, 0.9], [1, 0, 5, 1, 0.8]], dtype=torch.float32)
    assert [group.tolist() for group in mmcv_ops.nms_match(dets, 0.6)] == [[0, 1]]


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('aligned', [True, False])
def test_bbox_overlaps(aligned: bool, mode: str, offset: int, device: str) -> None:
    first, second = make_boxes(7)[0], make_boxes(7 if aligned else 4)[0]
    found = mmcv_ops.bbox_overlaps(first.to(device), second.to(device), mode, aligned, offset)
    pairs = zip(first, second) if aligned else ((a, b) for a in first for b in second)
    expected = [plain.iou(a.tolist(), b.tolist(), offset, mode) for a, b in pairs]
    torch.testing.assert_close(found.cpu().flatten(), torch.tensor(expected))
    assert found.shape == ((7,) if aligned else (7, 4))
    assert mmcv_ops.bbox_overlaps(first[:0].to(device), second.to(device)).shape == (0, len(second))


def test_outputs_carry_no_graph() -> None:
    """As compiled operators', whose results the caller may write to."""
    boxes = make_boxes(5)[0].requires_grad_()
    assert not mmcv_ops.bbox_overlaps(boxes, boxes).requires_grad
    assert not operators.nms(boxes, boxes[:, 0], 0.5, 0).requires_grad


def test_what_mmcv_reports() -> None:
    from mmcv.utils import collect_env

    report = collect_env()
    assert report['MMCV Compiler'].startswith('torchvision 0.')
    cuda = report['MMCV CUDA Compiler']
    assert cuda == 'not available' or torch.version.cuda.startswith(cuda.split('.')[0])


def test_softmax_focal_loss_refuses_a_class_that_is_none() -> None:
    # On CUDA the same ends in a device-side assertion, which no other test would survive.
    with pytest.raises(RuntimeError, match='out of bounds'):
        mmcv_ops.softmax_focal_loss(torch.randn(2, 3), torch.tensor([0, 3]))


def test_focal_losses_of_extreme_logits(device: str) -> None:
    torch.set_default_dtype(torch.float32)
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], device=device, requires_grad=True)
    target = torch.tensor([0, 0], device=device)
    for loss in (mmcv_ops.sigmoid_focal_loss, mmcv_ops.softmax_focal_loss):
        value = loss(logits, target, 2.0, 0.25, None, 'sum')
        (grad,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert value > 1
        assert grad.isfinite().all()


def test_autocast(device: str) -> None:
    """Under AMP features come in half precision, whichever format RoIs and offsets have."""
    torch.set_default_dtype(torch.float32)
    features = torch.randn(1, 4, 8, 8, device=device)
    conv = mmcv_ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1).to(device)
    with torch.autocast(device, torch.bfloat16):
        output = conv(features)
        pooled = mmcv_ops.roi_align(
            output, torch.tensor([[0.0, 1, 1, 6, 6]]).to(output), (2, 2), 1.0, 2, 'avg', True
        )
    assert output.dtype == pooled.dtype == torch.bfloat16
    pooled.float().sum().backward()
    torch.testing.assert_close(output.float(), conv(features), rtol=0, atol=0.05)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in conv.parameters())

"""The backbones as ImageNet classifiers, under timm's conventions and the published keys.

The published networks have two heads, one for the labels and one for a teacher; their mean is the
output (RepViT's design: arXiv 2307.09283, section 3.4).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.loading import load_pretrained
from ..checkpoints.reading import read_weights
from ..layers.blocks import Stage
from ..layers.execution import set_execution
from ..network import Plan
from ..reparam import Fusible, Note, folding
from .base import PyramidBackbone
from .recnext import RecNeXt
from .repnext import RepNeXt

#: The convolution that sees the image.
FIRST_CONV = 'stem.stem.0.conv'
#: The linear layers of the classifier.
LINEARS = ('head.head.linear', 'head.head_dist.linear')


class NormLinear(Fusible):
    """Norm, then linear: `(N, C) -> (N, num_classes)`."""

    norm: nn.Module

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        assert isinstance(self.norm, _BatchNorm)
        note('norm forward into the linear layer after it')
        scale, shift = folding.norm_affine(self.norm)
        weight, bias = (t.double() for t in (self.linear.weight, self.linear.bias))
        return _linear(weight * scale, bias + weight @ shift, like=self.linear)


class TwoHeads(Fusible):
    """Two heads over the pooled features, whose mean is the output: `(N, C) -> (N, num_classes)`.

    While `distilled`, training returns the outputs of both: for the labels and for the teacher.
    """

    head: Any
    head_dist: Any

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = NormLinear(channels, num_classes)
        self.head_dist = NormLinear(channels, num_classes)
        self.distilled = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, teacher = self.head(x), self.head_dist(x)
        return (labels, teacher) if self.training and self.distilled else (labels + teacher) / 2

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('the mean of two linear layers to one linear layer')
        pairs = zip(_values(self.head), _values(self.head_dist), strict=True)
        weight, bias = ((a + b) / 2 for a, b in pairs)
        return _linear(weight, bias, like=self.head)


def _values(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.double(), linear.bias.double()


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    """A linear layer with the given values, in `like`'s dtype and on its device."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, device='meta')
    linear.weight = nn.Parameter(weight.to(like.weight))
    linear.bias = nn.Parameter(bias.to(like.bias))
    return linear.train(like.training)


class Classifier(PyramidBackbone):
    """A backbone with its two heads: `(N, in_chans, H, W) -> (N, num_classes)`.

    It has the methods that timm expects of a model, and the keys of the published files.

    Args:
        arch: As for the backbone.
        num_classes: 0 for pooled features `(N, C)`.
        in_chans: Channels of the image.
        drop_rate: Of the dropout before the heads.
        distillation: Return the outputs of both heads in training.
        global_pool: 'avg'; there is no other.
        **kwargs: As for the backbone; all four stages are computed.

    Raises:
        ValueError: An argument has a value that is not allowed.
    """

    def __init__(
        self,
        arch: str | dict[str, Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        distillation: bool = False,
        global_pool: str = 'avg',
        **kwargs: Any,
    ) -> None:
        _check_pool(global_pool)
        for name, value, least in (('num_classes', num_classes, 0), ('in_chans', in_chans, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f'{name}={value!r} must be a whole number, {least} or more.')
        # Plain values, which `build` needs and torch allows before its own __init__.
        self.num_classes = num_classes
        self.in_chans = in_chans
        super().__init__(arch, out_indices=(3,), **kwargs)
        self.num_features = self.head_hidden_size = self.channels[-1]
        self.drop_rate = drop_rate
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f'stages.{i}')
            for i, (width, stride) in enumerate(zip(self.channels, self.strides, strict=True))
        ]
        self.set_distilled_training(distillation)

    def build(self, settings: dict[str, Any], drop_path_rate: float) -> None:
        super().build(settings, drop_path_rate)
        if self.in_chans != 3:
            conv = self.get_submodule(FIRST_CONV)
            assert isinstance(conv, nn.Conv2d)
            parent = self.get_submodule(FIRST_CONV.rpartition('.')[0])
            options: dict[str, Any] = dict(stride=conv.stride, padding=conv.padding)
            options |= dict(kernel_size=conv.kernel_size, bias=conv.bias is not None)
            parent.register_module('conv', type(conv)(self.in_chans, conv.out_channels, **options))
        self.head = self._heads(settings['channels'][-1])

    def _heads(self, channels: int) -> nn.Module:
        return TwoHeads(channels, self.num_classes) if self.num_classes else nn.Identity()

    def twin(self, plan: Plan | None) -> Classifier:
        return type(self)(
            self.settings,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            norm_cfg=self.norm_cfg,
            deploy=plan or False,
        )

    # --- timm's interface

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load a file that timm has fetched, or was given, by this package's reader.

        timm's own would prefer the averages in a checkpoint of the published scripts. New heads
        stay as they are where the number of classes differs, and the first convolution takes the
        weights of an image with other channels as timm does it.

        Raises:
            CheckpointError: It cannot be read, or does not fit.
        """
        weights = read_weights(Path(checkpoint_path))
        key = f'{FIRST_CONV}.weight'
        first = weights.tensors.get(key)
        if first is not None and first.shape[1] != self.in_chans:
            adapted = adapt_input_conv(self.in_chans, first)
            weights = replace(weights, tensors=weights.tensors | {key: adapted})
        load_pretrained(self, weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """`(N, in_chans, H, W)` to the last stage's `(N, C, h, w)`."""
        return self.compute(x, self.out_indices)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """`(N, C, h, w)` to logits `(N, num_classes)`, or to pooled features `(N, C)`."""
        x = x.mean((2, 3))
        if pre_logits:
            return x
        return self.head(nn.functional.dropout(x, self.drop_rate, self.training))

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """The outputs of the stages `indices`, and unless `intermediates_only` the last stage's.

        Args:
            indices: Stages; a number means so many from the end, None all.
            norm: Has no effect, as timm allows: there is no norm after the last stage.
            stop_early: Do not compute the stages after the last that is returned.
            output_fmt: 'NCHW'; there is no other.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt={output_fmt!r} must be NCHW.')
        taken, last = feature_take_indices(len(self.stages), indices)
        count = last + 1 if stop_early else len(self.stages)
        outs = self.compute(x, tuple(range(count)))
        found = [outs[i] for i in taken]
        return found if intermediates_only else (outs[-1], found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and with `prune_head` the heads."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.out_indices = (last,)
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        """The heads."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` classes; 0 for pooled features."""
        _check_pool(global_pool or 'avg')
        distilled = getattr(self.head, 'distilled', False)
        reference = next(self.parameters())
        self.num_classes = num_classes
        heads = self._heads(self.num_features)
        if self.plan is not None and num_classes:
            heads = nn.Linear(self.num_features, num_classes)
        self.head = heads.to(reference.device, reference.dtype).train(self.training)
        self.set_distilled_training(distilled)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the outputs of both heads."""
        if isinstance(self.head, TwoHeads):
            self.head.distilled = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward."""
        self.with_cp = enable
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.with_cp = enable
        if enable:
            set_execution(self, save_memory=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters by depth."""
        blocks = r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(?:downsample|blocks\.(\d+))'
        return dict(stem=r'^stem', blocks=blocks)

    def no_weight_decay(self) -> set[str]:
        """None by name: timm leaves out all that is one-dimensional."""
        return set()


def _check_pool(global_pool: str) -> None:
    if global_pool not in ('', 'avg'):
        raise ValueError(f'global_pool={global_pool!r} must be avg.')


class RepNeXtClassifier(Classifier, RepNeXt):
    """RepNeXt with its heads."""


class RecNeXtClassifier(Classifier, RecNeXt):
    """RecNeXt with its heads."""


#: The classifier of each family that has one of its own; InceptionNeXt's is timm's.
CLASSIFIERS: dict[str, type[Classifier]] = {
    'repnext': RepNeXtClassifier,
    'recnext': RecNeXtClassifier,
}

"""A network of timm as a model of MMEngine: losses, mixing of images, distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from .. import timm as own_names  # noqa: F401  registers our networks
from ..backbones.timm_names import require_timm_name

#: How a teacher is followed: by the class it chooses, or by all of its probabilities.
DISTILLATIONS = ('hard', 'soft')


class _Kept:
    """A module that no parent registers: copies of the parent share it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class TimmClassifier(BaseModel):
    """Trains and evaluates any classifier that timm can build.

    The teacher is in no checkpoint, optimizer or gradient bucket, follows the device of the
    model, and sees the student's input (DeiT, arXiv 2012.12877, section 4).

    Args:
        network: A name of timm's registry, ours included.
        num_classes: Number of classes.
        mixup: Arguments of `timm.data.Mixup`; None mixes nothing.
        smoothing: Of the labels.
        teacher: A name of timm's registry, with its pretrained weights; or the arguments of
            `timm.create_model`. None trains without one.
        distillation: 'hard' or 'soft'.
        alpha: Share of the teacher's loss.
        tau: Temperature of soft distillation.
        **kwargs: Of `timm.create_model`, such as `pretrained` and `drop_path_rate`.

    Raises:
        ValueError: An argument has a value that is not allowed.
    """

    def __init__(
        self,
        network: str,
        num_classes: int = 1000,
        mixup: Mapping[str, Any] | None = None,
        smoothing: float = 0.1,
        teacher: str | Mapping[str, Any] | None = None,
        distillation: str = 'hard',
        alpha: float = 0.5,
        tau: float = 1.0,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(BaseDataPreprocessor(**(data_preprocessor or {})), init_cfg)
        if distillation not in DISTILLATIONS:
            raise ValueError(f'distillation={distillation!r} must be hard or soft.')
        if not 0 <= alpha <= 1:
            raise ValueError(f'alpha={alpha} must be from 0 to 1.')
        if tau <= 0:
            raise ValueError(f'tau={tau} must be above 0.')
        self.network = create(network, num_classes=num_classes, **kwargs)
        self.num_classes = num_classes
        self.mixup = None
        if mixup is not None:
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=smoothing, **mixup)
        self.criterion: Callable[[Tensor, Tensor], Tensor] = (
            SoftTargetCrossEntropy() if mixup is not None else LabelSmoothingCrossEntropy(smoothing)
        )
        self.distillation, self.alpha, self.tau = distillation, alpha, tau
        self._teacher: _Kept | None = None
        if teacher is not None:
            named = {'model_name': teacher, 'pretrained': True}
            settings: dict[str, Any] = named if isinstance(teacher, str) else dict(teacher)
            name = settings.pop('model_name', '')
            built = create(name, num_classes=num_classes, **settings)
            self._teacher = _Kept(built.eval().requires_grad_(False))
            # A network with a second head learns the teacher's answers with it.
            distill: Any = getattr(self.network, 'set_distilled_training', None)
            if distill is not None:
                distill(True)

    @property
    def teacher(self) -> nn.Module | None:
        """The network whose answers are learned too."""
        return self._teacher.module if self._teacher else None

    def init_weights(self) -> None:
        """Nothing: timm has initialized the network, or loaded its weights."""

    def _apply(self, fn: Any, recurse: bool = True) -> TimmClassifier:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn)
        return self

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The last feature map for `inputs (N, 3, H, W)`."""
        return (self.network.forward_features(inputs),)  # type: ignore[operator]

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'tensor') -> Any:
        """Logits `(N, num_classes)` of `inputs (N, 3, H, W)`, or what the runner asks for.

        Args:
            inputs: Normalized images.
            labels: `(N,)` class indices.
            mode: 'tensor' for logits, 'predict' for one pair of logits and label per image, 'loss'
                for a dict of losses.
        """
        if mode == 'tensor':
            return self.network(inputs)
        if labels is None:
            raise ValueError(f'mode={mode!r} requires labels.')
        if mode == 'predict':
            return list(zip(self.network(inputs).float(), labels, strict=True))
        return self.loss(inputs, labels)

    def loss(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of one batch, of which the runner adds up those called `loss...`."""
        if self.mixup is not None:
            inputs, labels = self.mixup(inputs, labels)
        outputs = self.network(inputs)
        # A network with one output answers both with it.
        pair = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        own, follows = (output.float() for output in pair)
        if self.teacher is None:
            return {'loss': self.criterion(own, labels)}
        with torch.no_grad():
            answer = self.teacher(inputs).float()
        return {
            'loss_labels': (1 - self.alpha) * self.criterion(own, labels),
            'loss_teacher': self.alpha * self._distance(follows, answer),
        }

    def _distance(self, outputs: Tensor, answer: Tensor) -> Tensor:
        if self.distillation == 'hard':
            return F.cross_entropy(outputs, answer.argmax(1))
        own, other = (F.log_softmax(x / self.tau, 1) for x in (outputs, answer))
        # The mean over all values, times tau squared: DeiT's published code.
        return F.kl_div(own, other, reduction='sum', log_target=True) * self.tau**2 / own.numel()


def create(name: str, **kwargs: Any) -> nn.Module:
    """The classifier that timm builds under `name`.

    Raises:
        ValueError: timm has none of this name.
    """
    require_timm_name(name)
    return timm.create_model(name, **kwargs)

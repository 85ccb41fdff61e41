"""The contract of every backbone here: a four-stage pyramid for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.loading import load_pretrained
from ..layers import fast
from ..layers.blocks import Stage
from ..layers.execution import is_channels_last, is_exporting, set_execution
from ..network import FusionReport, Network, Plan, deploy_plan
from ..reparam import fuse
from ..text import closest

NUM_STAGES = 4
NORM_TYPES = ('BN', 'BN2d', 'SyncBN')
NORM_KEYS = ('type', 'eps', 'momentum', 'requires_grad')


class PyramidBackbone(BaseModule, Network):
    """Base of the families: arguments, freezing, norms, weights and fusion.

    A family defines `arch_zoo`, the keys of one row in `arch_keys`, and `build`.

    Args:
        arch: Name of a row of `arch_zoo`, or a dict with `arch_keys`.
        out_indices: Stages to return, increasing, each in 0..3. Stages beyond the last are built,
            so that published weights load completely, but never run: their parameters require
            no gradient, as distributed training waits for that of every parameter that does.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
        norm_cfg: `type` BN or SyncBN; optionally `eps`, `momentum`, `requires_grad`.
        norm_eval: Keep every norm in eval mode while training.
        drop_path_rate: Stochastic depth; None is the rate of `arch`.
        with_cp: Recompute activations in backward, which saves memory and costs time.
        fast: Compose each mixer's kernels into one in the forward pass, fold norms, choose the
            memory format. False computes operation by operation, as published: the reference.
        save_memory: Recompute activations and other cheap results in backward instead of
            keeping them; saves less than `with_cp`, and costs little time.
        channels_last: Compute in this memory format; the outputs have the format of the image.
            None: where it was shown to be faster, on CPUs.
        deploy: Build the fused form: True for plan 'full', or a plan's name. It loads what
            `reparameterize` with that plan produced.
        init_cfg: As in MMEngine. The checkpoint of `dict(type='Pretrained', checkpoint=...)` is a
            published name, a URL or a path, and is loaded by
            `repnext_mm.checkpoints.load_pretrained`.

    Raises:
        ValueError: An argument has a value that is not allowed.
        TypeError: `arch` is neither a name nor a dict, or `norm_cfg` is not a dict.
    """

    #: Keys of a row of `arch_zoo`, each with the default of a custom `arch` (`...` = required).
    arch_keys: ClassVar[dict[str, Any]]
    #: Factor by which each stage is smaller than the image.
    strides: tuple[int, ...] = (4, 8, 16, 32)

    stem: nn.Module
    stages: nn.ModuleList

    def __init__(
        self,
        arch: str | dict[str, Any],
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: dict[str, Any] | None = None,
        norm_eval: bool = False,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        fast: bool = True,
        save_memory: bool = False,
        channels_last: bool | None = None,
        deploy: bool | str = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = self._check_arch(arch)
        self.arch = arch if isinstance(arch, str) else 'custom'
        self.settings = settings
        self.channels: tuple[int, ...] = tuple(settings['channels'])
        self.out_indices = _check_out_indices(out_indices)
        self.frozen_stages = _check_frozen_stages(frozen_stages)
        norm_cfg = _check_norm_cfg({'type': 'BN'} if norm_cfg is None else norm_cfg)
        self.norm_cfg = norm_cfg
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        if not isinstance(fast, bool):
            raise TypeError(f'fast={fast!r} must be True or False.')
        if drop_path_rate is None:
            drop_path_rate = settings.get('drop_path_rate', 0.0)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must be at least 0 and below 1.')

        self.build(settings, drop_path_rate=drop_path_rate)
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.with_cp = with_cp
        self.channels_last = channels_last
        self.set_execution(fast=fast, save_memory=save_memory)

        plan = deploy_plan(deploy)
        if plan is not None:
            self.eval()
            self.switch_to_deploy(plan, accept_inexact=True)
        _apply_norm_cfg(self, norm_cfg)
        self.train()

    def build(self, settings: dict[str, Any], drop_path_rate: float) -> None:
        """Set `stem` and `stages` (training form, plain BatchNorm2d) from a complete row."""
        raise NotImplementedError(f'{type(self).__name__} must define build().')

    def set_execution(
        self,
        fast: bool | None = None,
        save_memory: bool | None = None,
        channels_last: bool | None = None,
    ) -> None:
        """Set how the network computes (see the arguments of the class); None changes nothing.

        Outputs and gradients stay the same up to rounding.
        """
        if fast is not None:
            self.fast = fast
            set_execution(self, fast=fast)
        if save_memory is not None:
            # Blocks recomputed by `with_cp` leave nothing for single operations.
            set_execution(self, save_memory=save_memory and not self.with_cp)
        if channels_last is not None:
            self.channels_last = channels_last

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each returned stage."""
        return tuple(self.channels[i] for i in self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each returned stage with respect to the image."""
        return tuple(self.strides[i] for i in self.out_indices)

    @property
    def first_convolution(self) -> nn.Conv2d:
        """The only module that takes the image; nothing else does."""
        return next(module for module in self.stem.modules() if isinstance(module, nn.Conv2d))

    @property
    def least_side(self) -> int:
        """The smallest height and width of an image that can be computed."""
        return 1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`(N, 3, H, W)` to one `(N, C_i, ceil(H / stride_i), ceil(W / stride_i))` per stage."""
        return self.compute(x, self.out_indices)

    def compute(self, x: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The outputs of the stages `indices`, which increase."""
        converts = self._computes_channels_last(x) and not is_channels_last(x)
        if converts:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages[: indices[-1] + 1]):
            x = stage(x)
            if i in indices and self.fast:
                outs.append(fast.leave(x, converts))
            elif i in indices:
                outs.append(x.contiguous() if converts else x)
        return tuple(outs)

    def _computes_channels_last(self, x: Tensor) -> bool:
        if self.channels_last is not None:
            return self.channels_last
        return self.fast and x.device.type == 'cpu' and not is_exporting()

    def init_weights(self) -> None:
        """Initialize as MMEngine does; `Pretrained` uses this package's safe loader.

        Raises:
            CheckpointError: The weights cannot be read, or do not fit this `arch`.
        """
        cfg = self.init_cfg
        if self.is_init or not isinstance(cfg, dict) or cfg.get('type') != 'Pretrained':
            super().init_weights()
            return
        options = {k: v for k, v in cfg.items() if k not in ('type', 'checkpoint', 'map_location')}
        load_pretrained(self, cfg['checkpoint'], **options)
        self._is_init = True

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Set the mode; frozen stages, and with `norm_eval` all norms, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        _take_no_gradient(self.stages[self.out_indices[-1] + 1 :])
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def switch_to_deploy(self, plan: Plan = 'full', accept_inexact: bool = False) -> None:
        """Fuse this backbone in place, under OpenMMLab's name for it.

        `repnext_mm.reparameterize` fuses a copy and checks more; prefer it.

        Raises:
            ValueError: In training mode, or the plan is not exact here and that was not accepted.
        """
        if self.training:
            raise ValueError('the backbone is in training mode; call .eval() before fusing it.')
        fuse(self, plan, accept_inexact)

    def on_fused(self, report: FusionReport) -> None:
        """Note that this network was fused; freezes what replaced frozen parameters."""
        super().on_fused(report)
        self.train(self.training)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.stem, *self.stages[: self.frozen_stages]):
            module.eval()
            _take_no_gradient(module)

    @classmethod
    def _check_arch(cls, arch: str | dict[str, Any]) -> dict[str, Any]:
        """The complete row of settings for `arch`."""
        if isinstance(arch, str):
            if arch in cls.arch_zoo:
                return cls.arch_keys | cls.arch_zoo[arch]
            close = closest(arch.lower(), cls.arch_zoo)
            hint = f' Did you mean {close!r}?' if close else ''
            raise ValueError(
                f'arch={arch!r} is not a {cls.__name__}; choose one of '
                f'{", ".join(cls.arch_zoo)}, or give a dict.{hint}'
            )
        if not isinstance(arch, dict):
            raise TypeError(f'arch must be a name or a dict, not {type(arch).__name__}.')
        unknown = [k for k in arch if k not in cls.arch_keys]
        missing = [k for k, v in cls.arch_keys.items() if v is ... and k not in arch]
        if unknown or missing:
            raise ValueError(
                f'a custom arch of {cls.__name__} has the keys {", ".join(cls.arch_keys)}; '
                f'missing: {missing or "none"}, unknown: {unknown or "none"}.'
            )
        settings = cls.arch_keys | arch
        for key in ('channels', 'depths'):
            values = settings.get(key)
            if values is None:
                continue
            if len(values) != NUM_STAGES or not all(isinstance(v, int) for v in values):
                raise ValueError(f'arch[{key!r}]={values} must be {NUM_STAGES} whole numbers.')
        return settings


def _take_no_gradient(module: nn.Module) -> None:
    for param in module.parameters():
        param.requires_grad = False


def _check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    allowed = range(NUM_STAGES)
    if not indices or any(i not in allowed for i in indices) or sorted(set(indices)) != [*indices]:
        raise ValueError(
            f'out_indices={indices} must be one or more increasing stages out of {tuple(allowed)}.'
        )
    return indices


def _check_frozen_stages(frozen_stages: int) -> int:
    if frozen_stages not in range(-1, NUM_STAGES + 1):
        raise ValueError(
            f'frozen_stages={frozen_stages} is not allowed; -1 freezes nothing, 0 the stem, '
            f'1 to {NUM_STAGES} the stem and so many stages.'
        )
    return frozen_stages


def _check_norm_cfg(norm_cfg: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(norm_cfg, dict):
        raise TypeError(f'norm_cfg must be a dict, not {type(norm_cfg).__name__}.')
    if norm_cfg.get('type') not in NORM_TYPES:
        raise ValueError(
            f'norm_cfg type {norm_cfg.get("type")!r} is not allowed; choose one of '
            f'{", ".join(NORM_TYPES)}: published weights and fusion need batch statistics.'
        )
    unknown = sorted(set(norm_cfg) - set(NORM_KEYS))
    if unknown:
        raise ValueError(f'norm_cfg has no key {unknown}; allowed: {", ".join(NORM_KEYS)}.')
    return norm_cfg


def _apply_norm_cfg(module: nn.Module, norm_cfg: dict[str, Any]) -> None:
    """Turn every BatchNorm2d below `module` into what `norm_cfg` asks for, in place."""
    if norm_cfg['type'] == 'SyncBN':
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.eps = norm_cfg.get('eps', norm.eps)
            norm.momentum = norm_cfg.get('momentum', norm.momentum)
            for param in norm.parameters():
                param.requires_grad = norm_cfg.get('requires_grad', True)

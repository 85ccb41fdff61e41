"""What the published recipes do around a step and an epoch, as hooks of MMEngine."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, set_random_seed
from timm.scheduler import CosineLRScheduler
from timm.utils.agc import adaptive_clip_grad


@HOOKS.register_module(force=True)  # replaces its stand-in of `lazy`
class TimmCosine(Hook):
    """timm's cosine schedule per epoch, which is that of the published learning rates.

    The rate of an epoch depends on its number alone, so that a resumed run continues exactly.
    MMEngine's cosine begins after the warm-up, timm's runs beneath it.

    Args:
        lr_min: The rate at the end.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: The rate of the first epoch.
        cooldown_epochs: Epochs at `lr_min` after the cosine, which are part of `max_epochs`.
        delay: Epochs that the rate is late. 1 where the published code sets the rate of an epoch
            from the number of the one before it: epochs 0 and 1 then both run at `warmup_lr`.
    """

    priority = 'VERY_HIGH'  # before the rate is logged

    def __init__(
        self,
        lr_min: float = 0.0,
        warmup_epochs: int = 0,
        warmup_lr: float = 0.0,
        cooldown_epochs: int = 0,
        delay: int = 0,
    ) -> None:
        self.lr_min = lr_min
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        self.cooldown_epochs = cooldown_epochs
        self.delay = delay
        self.schedule: CosineLRScheduler | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the schedule over the run's epochs.

        Raises:
            ValueError: The run is shorter than warm-up and cool-down.
        """
        epochs = runner.max_epochs - self.cooldown_epochs
        if epochs <= self.warmup_epochs:
            raise ValueError(
                f'max_epochs={runner.max_epochs} must be above warmup_epochs='
                f'{self.warmup_epochs} + cooldown_epochs={self.cooldown_epochs}; '
                '--epochs N moves all three.'
            )
        self.schedule = CosineLRScheduler(
            runner.optim_wrapper.optimizer,
            t_initial=epochs,
            lr_min=self.lr_min,
            warmup_t=self.warmup_epochs,
            warmup_lr_init=self.warmup_lr,
        )

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the rate of this epoch."""
        assert self.schedule is not None
        self.schedule.step(max(runner.epoch - self.delay, 0))

    def __str__(self) -> str:
        cooldown = f', {self.cooldown_epochs} at the end' if self.cooldown_epochs else ''
        return f'cosine to {self.lr_min:g} after {self.warmup_epochs} epochs of warm-up{cooldown}'


@HOOKS.register_module(force=True)
class AdaptiveGradClip(Hook):
    """timm's adaptive gradient clipping before every step of the optimizer (arXiv 2102.06171).

    It is a hook of the optimizer, after gradients are unscaled, so that it works under every
    wrapper of the optimizer and with mixed precision.

    Args:
        clip_factor: Most that a gradient's norm may be of its weight's.
    """

    def __init__(self, clip_factor: float = 0.02) -> None:
        self.clip_factor = clip_factor

    def before_train(self, runner: Runner) -> None:
        """Hook into the optimizer."""

        def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            adaptive_clip_grad(parameters, self.clip_factor)

        runner.optim_wrapper.optimizer.register_step_pre_hook(clip)


@HOOKS.register_module(force=True)
class KeepEMA(EMAHook):
    """Averaged weights that are kept in the checkpoints and never evaluated.

    The published runs of RepNeXt and RecNeXt keep them so; MMEngine's `EMAHook` evaluates them
    and saves them as the model's own.

    Args:
        decay: Share of the average that a step keeps.
    """

    def __init__(self, decay: float = 0.99996, **kwargs: Any) -> None:
        super().__init__(momentum=1 - decay, **kwargs)

    def before_val_epoch(self, runner: Runner) -> None:
        """Evaluate the raw weights."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Nothing was exchanged."""

    def before_test_epoch(self, runner: Runner) -> None:
        """Evaluate the raw weights."""

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Nothing was exchanged."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights."""
        checkpoint['ema_state_dict'] = self.ema_model.state_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Continue the average, or begin one at weights without any."""
        state = checkpoint.get('ema_state_dict')
        if state is not None:
            self.ema_model.load_state_dict(state)
        else:
            self.ema_model.module.load_state_dict(checkpoint['state_dict'], strict=False)


@HOOKS.register_module(force=True)
class SeedEachEpoch(Hook):
    """Random numbers of an epoch depend on the seed of the run and its number alone.

    A run that was stopped and resumed then trains as one that was not: images are augmented and
    mixed alike.
    """

    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed all generators of this process."""
        # Far apart, so that no two epochs or processes share a worker's seed.
        number = runner.epoch * runner.world_size + runner.rank
        set_random_seed((runner.seed + 10_007 * number) % 2**31)

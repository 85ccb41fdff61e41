"""What `repnext-mm benchmark` measures: times of training steps, inference and single layers.

A training step is the backbone's forward pass, the sum of the means of the squares of its outputs,
and the backward pass; gradients start as None. The optimizer is not part of it. The input is
contiguous (N, 3, H, W), and a variant that computes in channels_last pays for the change. On a CPU
all variants keep the memory that a step frees, as `repnext-mm train` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from ..backbones import look_up
from ..backbones.recconv import SharedRecursiveConv, Upsample
from ..backbones.recnext import RecursiveAttention, RepMixer
from ..backbones.repnext import ChunkConv, CopyConv
from ..engine.allocator import keep_freed_memory
from ..layers.blocks import GELU, Downsample, MetaNeXtBlock
from ..layers.execution import set_execution
from ..network import PLANS
from ..reparam import reparameterize
from .environment import LoadWatch, describe, require_device
from .memory import peak_bytes, step_memory
from .operators import by_operator
from .rounds import CallRunner, Deadline, Schedule, compare, split_variant
from .tables import Record, record

SCHEMA_VERSION = 1
DTYPES = {t: getattr(torch, t) for t in ('float32', 'bfloat16', 'float16')}
OPTIONS = ('channels_last', 'compile')


@dataclass(frozen=True)
class Settings:
    """What all variants of a comparison share.

    Args:
        size: Height and width of the input.
        batch: Its images.
        device: 'cpu' or 'cuda'.
        dtype: 'float32', or 'bfloat16' or 'float16' by autocast.
        norm_eval: Train with frozen norm statistics.
        channels: Of the input of single layers.
        compile: Add every variant, and the reference, compiled.
        schedule: How long to measure.
        profile: Add the time by operator.
    """

    size: tuple[int, int] = (512, 512)
    batch: int = 2
    device: str = 'cpu'
    dtype: str = 'float32'
    norm_eval: bool = False
    channels: int = 64
    compile: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    profile: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.channels < 1 or min(self.size) < 1:
            raise ValueError(
                f'batch={self.batch}, channels={self.channels} and size={self.size} must be '
                'positive.'
            )
        require_device(self.device)

    def autocast(self) -> AbstractContextManager:
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])


@dataclass(frozen=True)
class Variant:
    """A form of a network or layer, in a memory format, run eagerly or compiled."""

    form: str
    channels_last: bool = False
    compiled: bool = False

    @classmethod
    def parse(cls, text: str, forms: Sequence[str]) -> Variant:
        """From 'FORM[/channels_last][/compile]'.

        Raises:
            ValueError: The form or an option is unknown.
        """
        form, options = split_variant(text, forms, OPTIONS)
        return cls(form, 'channels_last' in options, 'compile' in options)

    def __str__(self) -> str:
        options = ['channels_last'] * self.channels_last + ['compile'] * self.compiled
        return '/'.join([self.form, *options])


@dataclass(frozen=True)
class Subject:
    """What is measured: the ways to build it, the first of which is the reference, and its input.

    Args:
        name: For people.
        forms: Builds a module per form.
        shape: Of the input.
        train: Whether to measure forward and backward, or forward alone.
        counts_input: Whether an input that is kept for backward counts as memory.
    """

    name: str
    forms: Mapping[str, Callable[[], nn.Module]]
    shape: tuple[int, ...]
    train: bool = True
    counts_input: bool = False

    @property
    def reference(self) -> Variant:
        return Variant(next(iter(self.forms)))


class Trial:
    """A variant that is built, and compiled where that is asked for, and can be run."""

    def __init__(self, subject: Subject, variant: Variant, settings: Settings) -> None:
        torch.manual_seed(0)
        start = time.perf_counter()
        model = subject.forms[variant.form]().to(settings.device).train(subject.train)
        if settings.norm_eval and subject.train:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.settings = settings
        self.train = subject.train
        self.counts_input = subject.counts_input
        self.image = torch.randn(subject.shape, device=settings.device)
        self.channels_last = variant.channels_last
        self.call: Callable[[Tensor], Any] = model
        if variant.compiled:
            self.call = torch.compile(model)
            # Weights that are frozen while it compiles, inductor lays out for its kernels.
            with inductor_config.patch(freezing=not subject.train):
                self.run()
        self.build_s = time.perf_counter() - start
        self.runner = CallRunner(
            self.run, torch.cuda.synchronize if settings.device == 'cuda' else None
        )

    def forward(self) -> Any:
        image = self.image
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with self.settings.autocast():
            return self.call(image)

    def run(self) -> None:
        if not self.train:
            with torch.no_grad():
                self.forward()
            return
        self.model.zero_grad(set_to_none=True)
        outputs = self.forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.float().square().mean() for output in outputs).backward()

    def memory(self) -> int | None:
        """Bytes that a step keeps for backward (CPU) or allocates (GPU), if it does."""
        if self.train:
            known = [] if self.counts_input else [self.image]
            return step_memory(self.forward, self.run, self.model, self.image.device, known)
        if self.settings.device == 'cuda':
            return peak_bytes(self.run, self.image.device)
        return None


def measure(
    subject: Subject,
    variants: Sequence[Variant],
    settings: Settings,
    deadline: Deadline | None = None,
) -> Record:
    """Compare variants of a subject with its reference form, which is contiguous and eager."""
    wanted = dict.fromkeys([subject.reference, *variants])
    trials = {str(variant): Trial(subject, variant, settings) for variant in wanted}
    twin = Trial(subject, subject.reference, settings)
    runners = {name: trial.runner for name, trial in trials.items()}
    try:
        twins = {str(subject.reference): twin.runner}
        comparison = compare(runners, twins, None, settings.schedule, deadline)
    except ValueError as error:
        shape = 'x'.join(map(str, subject.shape))
        raise ValueError(f'{subject.name} cannot compute {shape}: {error}') from error
    more = {
        name: {'build_ms': 1e3 * trial.build_s, 'memory_bytes': trial.memory()}
        for name, trial in trials.items()
    }
    result = {'subject': subject.name, 'shape': list(subject.shape), **record(comparison, more)}
    if settings.profile:
        result['profiles'] = {
            name: by_operator(trial.run, device=settings.device) for name, trial in trials.items()
        }
    return result


def run(
    command: str,
    names: Sequence[str],
    variants: Sequence[str],
    settings: Settings,
    say: Callable[[str], None] | None = None,
) -> Record:
    """What a sub-command of the tool does with the networks or layers of these `names`.

    `say` receives a line about each before its measurement.

    No `variants` means every form in both memory formats. Returns JSON values: `schema_version`,
    `command`, `settings`, `environment`, `load` (`headline` False means that the machine was too
    busy to publish the figures) and `comparisons`, one per name.

    Raises:
        ValueError: A name, variant or setting is not allowed.
    """
    watch = LoadWatch()
    environment = describe()
    keeps_memory = settings.device == 'cpu' and keep_freed_memory()
    subjects = [COMMANDS[command](name, settings) for name in names]
    chosen = [
        [Variant.parse(v, list(s.forms)) for v in variants] or default_variants(s) for s in subjects
    ]
    comparisons = []
    schedule = settings.schedule
    deadline = Deadline(schedule.budget_s)
    for i, (subject, wanted) in enumerate(zip(subjects, chosen)):
        if settings.compile:
            wanted += [replace(v, compiled=True) for v in (subject.reference, *wanted)]
        part = deadline.share(1 / (len(subjects) - i))
        if say:
            say(f'timing {subject.name}, {len(wanted) + 1} variants, at most {part.left:.0f} s')
        comparisons.append(measure(subject, wanted, settings, part))
    return {
        'schema_version': SCHEMA_VERSION,
        'command': command,
        'settings': {**asdict(settings), 'keeps_memory': keeps_memory},
        'environment': environment,
        'load': watch.report(),
        'comparisons': comparisons,
    }


def default_variants(subject: Subject) -> list[Variant]:
    """Every form but the reference's; for a layer, which keeps its input's, in both formats."""
    forms = [form for form in subject.forms if form != subject.reference.form]
    if not forms:
        return [Variant(subject.reference.form, channels_last=True)]
    layouts = (False, True) if subject.counts_input else (False,)
    return [Variant(form, layout) for form in forms for layout in layouts]


# --- what can be measured


#: Forms to train, by the arguments that build them; 'merged' is the default of the package.
TRAIN_FORMS: dict[str, dict[str, Any]] = {
    'branches': dict(fast=False),
    'merged': dict(),
    'merged_nchw': dict(channels_last=False),
    'save_memory': dict(save_memory=True),
}


def train_step(name: str, settings: Settings) -> Subject:
    """A training step; the reference computes branch by branch, as the published code does."""
    family, arch = look_up(name)
    forms = {
        form: partial(family, arch, norm_eval=settings.norm_eval, **arguments)
        for form, arguments in TRAIN_FORMS.items()
    }
    return Subject(f'{name}, training step', forms, (settings.batch, 3, *settings.size))


def inference(name: str, settings: Settings) -> Subject:
    """Inference; the reference is fused as the published `fuse()` does it."""
    family, arch = look_up(name)

    def fused(plan: Any) -> nn.Module:
        # The reference computes what the published code does.
        network = family(arch, fast=plan != 'upstream').eval()
        return reparameterize(network, plan, accept_inexact=True)

    forms: dict[str, Callable[[], nn.Module]] = {plan: partial(fused, plan) for plan in PLANS}
    shape = (settings.batch, 3, *settings.size)
    return Subject(f'{name}, inference', forms, shape, train=False)


def _train_forms(build: Callable[[int], nn.Module]) -> dict[str, Callable[[int], nn.Module]]:
    def formed(form: str, channels: int) -> nn.Module:
        layer = build(channels)
        set_execution(layer, fast=form == 'merged')
        return layer

    return {form: partial(formed, form) for form in ('branches', 'merged')}


#: Layers from C channels, in every form, the reference first.
LAYERS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    'gelu': _train_forms(lambda channels: GELU()),
    'batch_norm': {'torch': nn.BatchNorm2d},
    'pointwise_conv': {'torch': lambda channels: nn.Conv2d(channels, 2 * channels, 1)},
    'chunk_conv': _train_forms(ChunkConv),
    'copy_conv': _train_forms(CopyConv),
    'rep_mixer': _train_forms(RepMixer),
    'block': _train_forms(lambda c: MetaNeXtBlock(c, ChunkConv(c), 2)),
    'downsample': _train_forms(lambda c: Downsample(2 * c, CopyConv(c), 2)),
    'recursive_conv': _train_forms(lambda c: SharedRecursiveConv(c, level=4)),
    'recursive_attention': _train_forms(RecursiveAttention),
    'upsample': _train_forms(lambda c: Upsample()),
}


def layer(name: str, settings: Settings) -> Subject:
    """Forward and backward of single layers, whose input is part of the gradients."""
    if name not in LAYERS:
        raise ValueError(f'{name!r} is no layer to time; choose out of {", ".join(LAYERS)}.')
    forms = {
        form: partial(_with_input_gradient, build, settings.channels)
        for form, build in LAYERS[name].items()
    }
    shape = (settings.batch, settings.channels, *settings.size)
    return Subject(name, forms, shape, counts_input=True)


def _with_input_gradient(build: Callable[[int], nn.Module], channels: int) -> nn.Module:
    return _InputGradient(build(channels))


class _InputGradient(nn.Module):
    """A layer as it is inside a network, where gradients flow on to what came before."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.detach().requires_grad_())


#: The sub-commands.
COMMANDS: dict[str, Callable[[str, Settings], Subject]] = {
    'train-step': train_step,
    'inference': inference,
    'layers': layer,
}

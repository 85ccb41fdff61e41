"""Images per second of classifiers and backbones, ours beside any of timm's.

As the papers measure it: fused, with the largest batch of a power of two that fits, or on the CPU
with the one from which on a larger one gains nothing. All networks run in turns, and their ratios
to the first are those of the same round.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..network import Network
from ..reparam import reparameterize
from ..reparam.convolution_norms import fold_convolution_norms
from .environment import LoadWatch, describe, require_device
from .rounds import CallRunner, Deadline, Schedule, compare
from .tables import Record, record

SCHEMA_VERSION = 1
LAYOUTS = ('contiguous', 'channels_last')
#: Doubling the batch goes on while an image takes this much less time.
GAIN = 0.03
MOST = 1024
#: How far the outputs of a fused rival may be from its own, relative to their deviation.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """What all networks of a comparison share.

    Args:
        size: Height and width of the images.
        batch: Images of a batch; None for the best.
        device: 'cpu' or 'cuda'.
        amp: The dtype of autocast that every network is timed under too; None for none.
        compile: Whether every network is timed compiled too.
        layouts: Memory formats to try; the faster one counts.
        features: Time the four feature maps in place of the classifier.
        schedule: How long to measure.
    """

    size: tuple[int, int] = (224, 224)
    batch: int | None = None
    device: str = 'cpu'
    amp: str | None = None
    compile: bool = False
    layouts: Sequence[str] = LAYOUTS
    features: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f'batch={self.batch} must be at least 1.')
        require_device(self.device)

    def ways(self) -> Iterator[Way]:
        """How each network is computed, the plain way first."""
        for amp in dict.fromkeys((None, self.amp)):
            for compiled in dict.fromkeys((False, self.compile)):
                yield Way(amp, compiled)


@dataclass(frozen=True)
class Way:
    """Under autocast to `amp` or not, compiled or eager."""

    amp: str | None = None
    compiled: bool = False

    def autocast(self, device: str) -> AbstractContextManager:
        """The context to compute in."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(device, getattr(torch, self.amp))

    def label(self, name: str) -> str:
        """A network computed this way, such as `repnext_m1/bfloat16/compile`."""
        parts = [name, *([self.amp] if self.amp else []), *(['compile'] if self.compiled else [])]
        return '/'.join(parts)


def build(name: str, features: bool = False) -> nn.Module:
    """The fused network with this name, ours or timm's, in eval mode.

    Norms of a rival that follow its convolutions are folded, and its branches merged by timm where
    it can; that the outputs stay the same is computed.

    Raises:
        ValueError: There is none of this name, or fusing changed its outputs.
    """
    import timm
    from timm.models import reparameterize_model

    from .. import timm as own  # noqa: F401  registers ours
    from ..backbones.timm_names import require_timm_name

    require_timm_name(name)
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if features:
        strides = timm.create_model(name, features_only=True).feature_info.reduction()
        options = dict(features_only=True, out_indices=tuple(range(len(strides)))[-4:])
    model = timm.create_model(name, **options).eval()
    ours = [m for m in model.modules() if isinstance(m, Network)]
    if ours:
        return reparameterize(model)
    fused = reparameterize_model(copy.deepcopy(model)).eval()
    fold_convolution_norms(fused)
    _require_equal(name, model, fused)
    return fused


@torch.no_grad()
def _require_equal(name: str, model: nn.Module, fused: nn.Module) -> None:
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for one, two in zip(_tensors(model(image)), _tensors(fused(image)), strict=True):
        if not torch.allclose(one, two, rtol=0, atol=TOLERANCE * max(float(one.std()), 1e-3)):
            raise ValueError(f'fusing {name} changed its outputs, so its speed means nothing.')


def _tensors(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


class Trial:
    """A network that is ready to run in one memory format."""

    def __init__(
        self, name: str, model: nn.Module, layout: str, way: Way, settings: Settings
    ) -> None:
        self.name = name
        self.way = way
        self.settings = settings
        self.layout = layout
        self.format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        self.model = copy.deepcopy(model).to(settings.device).to(memory_format=self.format)
        self.call: Callable[[Tensor], Any] = self.model
        if way.compiled:
            self.call = torch.compile(self.model)
        self.image = torch.empty(0)
        self.synchronize = torch.cuda.synchronize if settings.device == 'cuda' else lambda: None

    def prepare(self, batch: int) -> None:
        """Make the images of a batch."""
        image = torch.randn(batch, 3, *self.settings.size, device=self.settings.device)
        self.image = image.contiguous(memory_format=self.format)

    @torch.no_grad()
    def run(self) -> None:
        """Compute one batch."""
        with self.way.autocast(self.settings.device):
            self.call(self.image)

    def seconds(self, batch: int) -> float:
        """Of an image, in batches of this size; infinite where they do not fit."""
        try:
            self.prepare(batch)
            self.run()
            times = []
            for _ in range(3):
                self.synchronize()
                start = time.perf_counter()
                self.run()
                self.synchronize()
                times.append(time.perf_counter() - start)
        except (RuntimeError, MemoryError, AssertionError) as error:
            text = ' '.join(str(error).split())
            lacks = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
            if lacks or 'allocate memory' in text:
                torch.cuda.empty_cache()
                return math.inf
            # Some of timm's networks compute one size only.
            size = 'x'.join(map(str, self.settings.size))
            raise ValueError(f'{self.name} cannot compute {size} ({text[:120]}).') from error
        return min(times) / batch

    def best_batch(self) -> tuple[int, float]:
        """The batch to measure at, and the seconds of an image.

        On a GPU the largest power of two that fits; on the CPU the one after which doubling gains
        nothing.
        """
        if self.settings.batch is not None:
            return self.settings.batch, self.seconds(self.settings.batch)
        best, found = 1, self.seconds(1)
        for batch in _doubled(2):
            seconds = self.seconds(batch)
            if seconds == math.inf:
                break
            if self.settings.device == 'cpu' and seconds > found * (1 - GAIN):
                break
            best, found = batch, seconds
        return best, found


def _doubled(first: int) -> Iterator[int]:
    while first <= MOST:
        yield first
        first *= 2


def run(
    names: Sequence[str], settings: Settings, say: Callable[[str], None] | None = None
) -> Record:
    """Images per second of networks by name, and the time of an image relative to the first's.

    Returns JSON values: `schema_version`, `command`, `settings`, `environment`, `load` and
    `comparison`, whose rows have `batch`, `layout`, `images_per_s`, `ms_per_image` and
    `ratio_per_image` besides what other comparisons have.

    Raises:
        ValueError: A name or setting is not allowed.
    """
    if not names:
        raise ValueError('name at least one network.')
    watch = LoadWatch()
    environment = describe()
    trials: dict[str, Trial] = {}
    batches: dict[str, int] = {}
    for name in dict.fromkeys(names):
        if say:
            say(f'preparing {name}')
        model = build(name, settings.features)
        for way in settings.ways():
            label = way.label(name)
            found = []
            for layout in settings.layouts:
                trial = Trial(name, model, layout, way, settings)
                batch, seconds = trial.best_batch()
                found.append((seconds, batch, trial))
            seconds, batches[label], trials[label] = min(found, key=lambda item: item[0])
            if seconds == math.inf:
                raise ValueError(f'{label} does not fit into memory at batch {batches[label]}.')
            trials[label].prepare(batches[label])
    reference = next(iter(trials))
    runners = {n: CallRunner(t.run, t.synchronize) for n, t in trials.items()}
    twin = CallRunner(trials[reference].run, trials[reference].synchronize)
    if say:
        say(f'timing {len(runners)} networks in turns')
    deadline = Deadline(settings.schedule.budget_s)
    comparison = compare(runners, {reference: twin}, None, settings.schedule, deadline)
    result = record(comparison)
    for row in result['rows']:
        name = row['variant']
        batch = batches[name]
        scale = batches[reference] / batch
        row |= {
            'batch': batch,
            'layout': trials[name].layout,
            'images_per_s': 1e3 * batch / row['p50_ms'],
            'ms_per_image': row['p50_ms'] / batch,
            'ratio_per_image': row['ratio'] * scale,
            'interval_per_image': [side * scale for side in row['interval']],
        }
    return {
        'schema_version': SCHEMA_VERSION,
        'command': 'throughput',
        'settings': asdict(settings),
        'environment': environment,
        'load': watch.report(),
        'comparison': result,
    }

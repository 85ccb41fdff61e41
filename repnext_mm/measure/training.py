"""Training steps of complete models, in every form of their backbone and either use of memory.

A step is what MMEngine's runner does with a batch: preprocessing, forward pass, losses, backward
pass and optimizer. Images and objects are generated; reading and augmenting data is not part of
it. Each variant has a process of its own, since how memory is kept is a setting of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.allocator import VARIABLE
from ..engine.errors import UserError
from .artifacts import Remote, workers
from .environment import LoadWatch, describe, require_device
from .rounds import Deadline, Schedule, compare, split_variant
from .tables import Record, record

SCHEMA_VERSION = 1
#: How the backbone computes, by its arguments, the reference first.
FORMS: dict[str, dict[str, Any]] = {'branches': {'fast': False}, 'merged': {}}
#: Keep the memory that a step frees, as `repnext-mm train` does on a CPU; and weights and feature
#: maps of all of the model in channels_last.
KEEP_MEMORY, CHANNELS_LAST = OPTIONS = ('keep_memory', 'channels_last')
#: Objects of an image, about as in COCO.
OBJECTS = 7


@dataclass(frozen=True)
class Settings:
    """What all variants share.

    Args:
        size: Height and width of the images.
        batch: Images of a step.
        device: 'cpu' or 'cuda'.
        amp: 'bfloat16' or 'float16' for mixed precision, as `repnext-mm train --amp` computes.
        threads: Of each process; None takes torch's number.
        schedule: How long to measure.
        profile: Add the time by operator.
    """

    size: tuple[int, int] = (800, 1333)
    batch: int = 2
    device: str = 'cpu'
    amp: str | None = None
    threads: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    profile: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.size) < 1:
            raise ValueError(f'batch={self.batch} and size={self.size} must be positive.')
        require_device(self.device)


def schedule(rounds: int, budget_s: float) -> Schedule:
    """How long to measure: a step lasts for seconds, and the first ones find their memory."""
    return Schedule(rounds, warmup_window=3, warmup_tolerance=0.05, budget_s=budget_s)


def default_variants(device: str) -> list[str]:
    """Every form, on a CPU with and without kept memory; the reference first."""
    if device != 'cpu':
        return [*FORMS]
    return [name for form in FORMS for name in (form, f'{form}/{KEEP_MEMORY}')]


def run(
    config: str,
    variants: Sequence[str],
    settings: Settings,
    say: Callable[[str], None] | None = None,
) -> Record:
    """Time training steps of the model of a config.

    Args:
        config: A config file, or a name that `repnext-mm models` lists.
        variants: FORM[/keep_memory][/channels_last]; the first one is the reference. None means
            `default_variants`.
        settings: What they share.
        say: Receives a line about each before it is timed.

    Returns:
        JSON values as `networks.run` returns them.

    Raises:
        ValueError: A variant is unknown.
        UserError: The config has no detector or segmentor, or a process fails.
    """
    names = list(dict.fromkeys(variants or default_variants(settings.device)))
    for name in names:
        split_variant(name, FORMS, OPTIONS)
    watch = LoadWatch()
    environment = describe(('mmdet', 'mmsegmentation'))
    threads = settings.threads or torch.get_num_threads()
    reference = names[0]
    deadline = Deadline(settings.schedule.budget_s)
    opened: dict[str, Record] = {}
    # What asks MMEngine for a device shall not be told of a GPU that is not used.
    hidden = {'CUDA_VISIBLE_DEVICES': ''} if settings.device == 'cpu' else {}
    variables = {
        name: {VARIABLE: str(int(KEEP_MEMORY in name.split('/'))), **hidden} for name in names
    }
    with workers(names, threads, variables) as processes:

        def start(name: str, known_as: str) -> Remote:
            spec = {
                'opener': f'{__name__}:open_step',
                'threads': threads,
                'config': config,
                'variant': name,
                'size': settings.size,
                'batch': settings.batch,
                'device': settings.device,
                'amp': settings.amp,
                'profile': settings.profile and known_as == name,
            }
            opened[known_as] = processes[name].ask({'open': known_as, 'spec': spec})
            return Remote(processes[name], known_as)

        runners = {}
        for name in names:
            if say:
                say(f'opening {name}')
            runners[name] = start(name, name)
        twins = {reference: start(reference, f'{reference} again')}
        if say:
            say(f'timing {len(names)} variants')
        comparison = compare(runners, twins, None, settings.schedule, deadline)
    facts = opened[reference]
    result = {
        'subject': f'{facts["subject"]}, training step',
        'shape': [settings.batch, 3, *settings.size],
        **record(comparison),
    }
    if settings.profile:
        result['profiles'] = {name: opened[name]['operators'] for name in names}
    return {
        'schema_version': SCHEMA_VERSION,
        'command': 'model-step',
        'settings': {**asdict(settings), 'config': config, 'dtype': settings.amp or 'float32'},
        'environment': {**environment, 'threads': threads},
        'load': watch.report(),
        'comparisons': [result],
    }


# --- in the processes


def open_step(spec: Record) -> tuple[Callable[[], Any], Record]:
    """What a process runs for a variant, and what is known of it; see `artifacts.open_subject`.

    Raises:
        UserError: The config has no detector or segmentor.
    """
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, DefaultScope

    from ..engine.allocator import keep_freed_memory
    from ..engine.amp import enable_amp, fit_amp_to_cpu, keep_float32_where_needed
    from ..engine.config_file import load_config
    from ..engine.frameworks import import_framework
    from ..engine.inference import without_weights
    from ..engine.quiet import muffled
    from .operators import by_operator

    form, *options = spec['variant'].split('/')
    device = torch.device(spec['device'])
    keep_freed_memory()  # where the environment of this process says so
    cfg = load_config(spec['config'], {}, None, 'none')
    scope = cfg.get('default_scope')
    import_framework(scope)
    batch = BATCHES.get(scope)
    if batch is None:
        raise UserError(
            f'{spec["config"]} contains no detector or segmentor; `repnext-mm benchmark '
            'train-step` times a backbone.'
        )
    if spec['amp']:
        enable_amp(cfg, spec['amp'])
        if device.type == 'cpu':
            fit_amp_to_cpu(cfg.optim_wrapper)
    torch.manual_seed(0)
    with muffled(), DefaultScope.overwrite_default_scope(scope):
        settings = without_weights(cfg.model)
        settings['backbone'].update(FORMS[form])
        model = MODELS.build(settings)
        model.init_weights()
        model.to(device)
        if CHANNELS_LAST in options:
            model.to(memory_format=torch.channels_last)
        if spec['amp']:
            keep_float32_where_needed(model)
        optimizer = build_optim_wrapper(model.train(), cfg.optim_wrapper)
    data = batch(model, spec['batch'], spec['size'])

    def step() -> None:
        torch.manual_seed(0)  # the same samples of the candidates
        model.train_step(data, optimizer)
        if device.type == 'cuda':
            torch.cuda.synchronize()

    facts: Record = {'subject': Path(spec['config']).stem}
    if spec['profile']:
        for _ in range(2):  # the first ones still find their memory
            step()
        facts['operators'] = by_operator(step, runs=1, device=device.type)
    return step, facts


def _detection_batch(model: Any, batch: int, size: Sequence[int]) -> Record:
    from mmdet.testing import demo_mm_inputs

    head = getattr(model, 'roi_head', None) or model
    classes = head.bbox_head.num_classes
    return demo_mm_inputs(
        batch,
        image_shapes=[(3, *size)] * batch,
        num_items=[OBJECTS] * batch,
        num_classes=classes,
        with_mask=True,
    )


def _segmentation_batch(model: Any, batch: int, size: Sequence[int]) -> Record:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    classes = model.decode_head.num_classes
    samples = []
    for _ in range(batch):
        labels = torch.randint(classes, (1, *size), generator=generator)
        meta = {'img_shape': tuple(size), 'ori_shape': tuple(size)}
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta))
    images = torch.randint(256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    return {'inputs': list(images), 'data_samples': samples}


#: What makes a batch for the models of a framework.
BATCHES: dict[str, Callable[[Any, int, Sequence[int]], Record]] = {
    'mmdet': _detection_batch,
    'mmseg': _segmentation_batch,
}

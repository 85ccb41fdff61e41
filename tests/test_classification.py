"""Training, distilling and evaluating classifiers by the tools, and the published recipes."""

from __future__ import annotations

import copy
import csv
import math
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import tool_runs
import torch
from conftest import REPO
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from PIL import Image
from torch import nn

from repnext_mm import RepNeXt, reparameterize
from repnext_mm.checkpoints import load_pretrained
from repnext_mm.classification import (
    AdaptiveGradClip,
    RepeatedAugmentation,
    TimmClassifier,
    TimmCosine,
    TimmDataset,
    TopK,
)
from repnext_mm.datasets import shapes
from repnext_mm.engine.amp import PortableAmpOptimWrapper
from repnext_mm.engine.cli import evaluate_main, train_main

FOLDER = REPO / 'configs' / 'imagenet'
CONFIGS = sorted(FOLDER.glob('*_imagenet.py'))
SMALL = 'test_resnet'  # timm's own for tests


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.generate(
        tmp_path_factory.mktemp('data') / 'shapes', shapes.Spec(train=24, val=12, size=64)
    )


def options(data: Path, *more: str) -> list[str]:
    return ['--cfg-options', f'sample_data_root={data}', f'data_root={data / "imagenet"}', *more]


def short(data: Path, *more: str) -> list[str]:
    """A run that is over in seconds."""
    cut = ['train_dataloader.batch_size=16', f'model.network={SMALL}']
    return options(data, *cut, 'default_hooks.logger.interval=1', *more)


def drawn(data: Path, tmp_path: Path) -> Path:
    """A copy of the crops that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / 'own'))


# --- the published recipes


def rates(recipe: Config, batch: int = 1) -> list[float]:
    """The learning rate of every epoch, as the hook sets it."""
    hook = next(h for h in recipe.custom_hooks if h.type == 'TimmCosine')
    hook = TimmCosine(**{k: v for k, v in hook.items() if k != 'type'})
    lr = recipe.optim_wrapper.optimizer.lr
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    runner: Any = SimpleNamespace(
        optim_wrapper=SimpleNamespace(optimizer=optimizer), max_epochs=recipe.train_cfg.max_epochs
    )
    hook.before_train(runner)
    found = []
    for epoch in range(runner.max_epochs):
        runner.epoch = epoch
        hook.before_train_epoch(runner)
        found.append(optimizer.param_groups[0]['lr'])
    return found


def test_the_learning_rate_is_that_of_the_published_log() -> None:
    lines = (REPO / 'tests/data/published/imagenet_lr.csv').read_text().splitlines()[1:]
    logged = {int(row['epoch']): float(row['lr']) for row in csv.DictReader(lines)}
    found = rates(Config.fromfile(FOLDER / 'repnext_m1_distill_imagenet.py'))
    assert len(found) == 300
    for epoch, lr in logged.items():
        assert abs(found[epoch] - lr) < 3e-14


def test_the_learning_rate_of_every_epoch() -> None:
    """The formulas, written out: warm-up beneath a cosine, one epoch late in RepViT's recipe."""

    def cosine(t: int, peak: float, low: float, warm: int, start: float, epochs: int) -> float:
        if t < warm:
            return start + t * (peak - start) / warm
        if t >= epochs:
            return low
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * t / epochs))

    for name, late, row in (
        ('repnext_m1', 1, (4e-3, 1e-5, 5, 1e-6, 300)),
        ('recnext_m1', 1, (2e-3, 1e-5, 5, 1e-6, 300)),
        ('repnext_m0e', 0, (3e-3, 1e-6, 5, 1e-5, 300)),
        ('inception_next_tiny', 0, (4e-3, 1e-5, 20, 1e-6, 300)),
        ('inception_next_atto', 0, (1e-3, 5e-7, 20, 1e-6, 450)),
        ('inception_next_base_384', 0, (5e-5, 5e-5, 0, 0, 30)),
    ):
        found = rates(Config.fromfile(FOLDER / f'{name}_imagenet.py'))
        expected = [cosine(max(epoch - late, 0), *row) for epoch in range(len(found))]
        assert len(found) == (310 if name == 'repnext_m0e' else row[-1])
        np.testing.assert_allclose(found, expected, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_the_published_one(path: Path) -> None:
    """Batch, learning rate, decay, rate of dropped paths and teacher of every config."""
    cfg = Config.fromfile(path)
    name = path.stem.removesuffix('_imagenet')
    distilled = name.endswith('_distill')
    network = name.removesuffix('_distill').removesuffix('_starnet').removesuffix('_384')
    starnet = '_starnet' in name or (network.endswith('e') and network[:3] == 'rep')
    family, _, arch = network.rpartition('_') if 'inception' in name else network.partition('_')
    gpus = 4 if starnet else 8
    batch = gpus * cfg.train_dataloader.batch_size
    assert cfg.model.network == network and network in timm.list_models()
    assert cfg.model.get('teacher') == ('regnety_160.deit_in1k' if distilled else None)
    if family == 'inception_next':
        assert (batch, cfg.optim_wrapper.optimizer.weight_decay) == (
            {'atto': 1280}.get(arch, 512 if '384' in name else 4096),
            0.05,
        )
        dropped = {'tiny': 0.1, 'small': 0.3, 'base': 0.7 if '384' in name else 0.4}
        assert cfg.model.get('drop_path_rate', 0) == dropped.get(arch, 0)
    else:
        small = distilled or (family == 'recnext')
        assert batch == (1024 if small else 2048)
        if not starnet:
            assert cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-3 * batch / 512)
        decay = 0.03 if network == 'repnext_m5' else 0.025
        assert cfg.optim_wrapper.optimizer.weight_decay == decay
        rate = {'m4': 0.2, 'a4': 0.2, 'm5': 0.3, 'a5': 0.3}.get(
            arch, {'s': 0.1, 'b': 0.2}.get(arch[0], 0)
        )
        plain = family == 'recnext' and not distilled
        assert cfg.model.get('drop_path_rate', 0) == (rate if plain else 0)
    hooks = [hook.type for hook in cfg.custom_hooks]
    repvit = not starnet and family != 'inception_next'
    assert ('AdaptiveGradClip' in hooks) == ('KeepEMA' in hooks) == repvit
    assert (cfg.train_dataloader.sampler.type == 'RepeatedAugmentation') == repvit
    crop = 0.9 if starnet else {'base': 0.95}.get(arch, 0.875)
    assert cfg.val_dataloader.dataset.transform.crop_pct == (1.0 if '384' in name else crop)
    assert cfg.test_dataloader == cfg.val_dataloader
    if cfg.auto_scale_lr.base_batch_size != batch:
        assert '384' in name


def test_augmentation_is_the_published_one() -> None:
    for name, policy, interpolation, cutmix in (
        ('repnext_m1', 'rand-m9-mstd0.5-inc1', 'bicubic', 1.0),
        ('repnext_m1e', 'rand-m1-mstd0.5-inc1', 'random', 0.2),
        ('inception_next_atto', 'rand-m5-mstd0.5-inc1', 'bicubic', 1.0),
    ):
        cfg = Config.fromfile(FOLDER / f'{name}_imagenet.py')
        transform = cfg.train_dataloader.dataset.transform
        assert transform.auto_augment == policy and transform.interpolation == interpolation
        assert (transform.re_prob, transform.re_mode) == (0.25, 'pixel')
        mixing = dict(mixup_alpha=0.8, cutmix_alpha=cutmix, prob=1.0, switch_prob=0.5)
        assert cfg.model.mixup == mixing and cfg.model.smoothing == 0.1
        kinds = [type(t).__name__ for t in timm.data.create_transform(**transform).transforms]
        assert kinds[-1] == 'RandomErasing' and 'RandAugment' in kinds


def test_what_is_one_dimensional_does_not_decay() -> None:
    from mmengine.optim import build_optim_wrapper

    cfg = Config.fromfile(FOLDER / 'repnext_m0_imagenet.py')
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    for group in groups:
        assert all((p.ndim > 1) == (group['weight_decay'] > 0) for p in group['params'])


# --- the model


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        'inputs': torch.randn(count, 3, 64, 64, generator=generator),
        'labels': torch.arange(count) % 3,
    }


def test_losses_of_distillation() -> None:
    model = TimmClassifier(
        'repnext_m0', num_classes=3, teacher=dict(model_name=SMALL), alpha=0.3, smoothing=0.0
    )
    inputs, labels = batch().values()
    with torch.no_grad():
        losses = model.loss(inputs, labels)
        own, follows = model.network(inputs)
        answer = model.teacher(inputs).argmax(1)
    torch.testing.assert_close(losses['loss_labels'], 0.7 * nn.CrossEntropyLoss()(own, labels))
    torch.testing.assert_close(losses['loss_teacher'], 0.3 * nn.CrossEntropyLoss()(follows, answer))
    soft = TimmClassifier(
        SMALL, num_classes=3, teacher=dict(model_name=SMALL), distillation='soft', tau=2.0
    )
    soft.teacher.load_state_dict(soft.network.state_dict())
    soft.eval()
    assert soft.loss(inputs, labels)['loss_teacher'].abs() < 1e-7, 'it agrees with itself'


def test_the_teacher_is_nowhere_but_follows() -> None:
    model = TimmClassifier(SMALL, num_classes=3, teacher=dict(model_name='repnext_m0'))
    alone = TimmClassifier(SMALL, num_classes=3)
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert len([*model.parameters()]) == len([*alone.parameters()])
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.train()
    assert not model.teacher.training
    model.double()
    assert next(model.teacher.parameters()).dtype == torch.float64
    model.to('meta')
    assert next(model.teacher.parameters()).device.type == 'meta'
    assert copy.deepcopy(model).teacher is model.teacher


def test_pretrained_weights_survive_the_runner() -> None:
    """MMEngine calls `init_weights` of whatever has such a method, as timm's ViT does."""
    model = TimmClassifier('test_vit', num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(network='repnext_m9'), "no model 'repnext_m9'; did you mean repnext_m5"),
        (dict(network=SMALL, distillation='warm'), "distillation='warm' must be hard or soft"),
        (dict(network=SMALL, alpha=2), 'alpha=2 must be from 0 to 1'),
        (dict(network=SMALL, tau=0), 'tau=0 must be above 0'),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TimmClassifier(**settings)


@pytest.mark.parametrize('wrapper', [OptimWrapper, PortableAmpOptimWrapper])
def test_gradients_are_clipped_before_every_step(wrapper: type) -> None:
    model = TimmClassifier(SMALL, num_classes=3)
    # No momentum: a step is the gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    kwargs = dict(dtype='bfloat16') if wrapper is PortableAmpOptimWrapper else {}
    runner: Any = SimpleNamespace(optim_wrapper=wrapper(optimizer=optimizer, **kwargs))
    hook = AdaptiveGradClip(clip_factor=1e-3)
    hook.before_train(runner)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    model.train_step(batch(), runner.optim_wrapper)
    moved = 0
    for name, param in model.named_parameters():
        if param.ndim > 1:  # by output, as timm measures it
            norm = before[name].flatten(1).norm(dim=1)
            step = (param - before[name]).flatten(1).norm(dim=1)
            assert (step <= 1.01e-3 * norm.clamp(min=1e-3)).all(), name
            moved += int((step > 0).any())
    assert moved > 5


# --- data and metric


def test_repeated_augmentation_shares_an_image_between_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from repnext_mm.classification import data as module

    seen: list[list[int]] = []
    for rank in range(3):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 3))
        sampler = RepeatedAugmentation(range(999), seed=1)
        sampler.set_epoch(2)
        seen.append([*sampler])
        assert len(sampler) == len(seen[-1]) == 256 and sampler.epoch == 2
        sampler.set_epoch(3)
        assert [*sampler] != seen[-1]
    assert seen[0] == seen[1] == seen[2], 'three augmentations of one image, one in each process'
    other = RepeatedAugmentation(range(999), seed=2)
    other.set_epoch(2)
    assert [*other] != seen[2], 'the seed of the run counts'


def test_topk() -> None:
    metric = TopK(topk=(1, 2, 5))
    rows = [([3.0, 1, 2], 0), ([3.0, 1, 2], 2), ([1.0, 1, 1], 1), ([float('nan')] * 3, 0)]
    metric.process({}, [(torch.tensor(logits), torch.tensor(label)) for logits, label in rows])
    found = metric.evaluate(size=4)
    # Equal logits know nothing, and neither do NaN; at 5 of 3 classes all would be right.
    assert found == {'accuracy/top1': 25.0, 'accuracy/top2': 50.0}


def test_a_tar_file_is_as_good_as_folders(data: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'val.tar', 'w') as archive:
        archive.add(data / 'imagenet' / 'val', arcname='.')
    transform = dict(input_size=64)
    folder = TimmDataset(root=str(data / 'imagenet' / 'val'), transform=transform)
    archived = TimmDataset(root=str(tmp_path / 'val'), transform=transform)
    assert folder.metainfo == archived.metainfo == {'classes': tuple(sorted(shapes.THINGS))}
    assert folder.count_classes() == archived.count_classes()
    for i in (0, len(folder) - 1):
        assert torch.equal(folder[i]['inputs'], archived[i]['inputs'])
        assert folder[i]['labels'] == archived[i]['labels']


def test_a_broken_image_is_no_other_image(data: Path, tmp_path: Path) -> None:
    """timm's data set returns the next one in its place, whose label is counted then."""
    own = drawn(data, tmp_path) / 'imagenet' / 'val'
    dataset = TimmDataset(root=str(own), transform=dict(input_size=64))
    Path(dataset.filename(2)).write_bytes(b'no image')
    with pytest.raises(OSError, match=f'{dataset.filename(2)} is no image'):
        dataset[2]


def test_workers_draw_other_numbers_in_each_epoch(data: Path) -> None:
    from mmengine.runner import Runner

    loader = dict(
        batch_size=4,
        num_workers=1,
        worker_init_fn=dict(type='seed_worker'),
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='TimmDataset',
            root=str(data / 'imagenet' / 'val'),
            transform=dict(input_size=64, is_training=True, auto_augment='rand-m9-mstd0.5-inc1'),
        ),
    )
    built = Runner.build_dataloader(loader, seed=0)

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(iter(built))['inputs']

    one, two, again = epoch(1), epoch(2), epoch(1)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


# --- the tools


def test_train_and_test(data: Path, tmp_path: Path) -> None:
    """Any network of timm, with a teacher, mixing and averaging, from --epochs to the accuracy."""
    extra = [
        'model.mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0)',
        f"model.teacher=dict(model_name='{SMALL}')",
        'custom_hooks.0.type=KeepEMA',
    ]
    output = tool_runs.succeed_here(
        train_main, 'repnext_m0_shapes', '--epochs', '2', '--work-dir', 'run', *short(data, *extra),
        cwd=tmp_path,
    )  # fmt: skip
    assert 'train: images by class: ' in output
    assert 'cosine to 1e-05 after 0 epochs of warm-up' in output
    assert 'loss_labels' in output and 'loss_teacher' in output
    checkpoint = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)
    state, averaged = checkpoint['state_dict'], checkpoint['ema_state_dict']
    assert not any('teacher' in key for key in (*state, *averaged))
    assert any(not torch.equal(state[k], averaged[f'module.{k}']) for k in state)
    assert checkpoint['meta']['dataset_meta']['classes'] == shapes.THINGS

    line = [line for line in output.splitlines() if 'accuracy/top1' in line][-1]
    tested = tool_runs.succeed_here(
        evaluate_main, 'run/repnext_m0_shapes.py', 'run/epoch_2.pth', cwd=tmp_path
    )
    value = line.split('accuracy/top1: ')[1].split()[0]
    assert f'accuracy/top1: {value}' in tested, 'training evaluates the raw weights too'
    assert re.search(r'^Wrote \S+\.json; next: .*deploy.* run/epoch_2.pth$', tested, re.MULTILINE)


def test_a_checkpoint_is_a_backbone(data: Path, tmp_path: Path) -> None:
    tool_runs.succeed_here(
        train_main, 'repnext_m0_shapes', '--epochs', '1', '--work-dir', 'run', *short(data),
        'model.network=repnext_m0', cwd=tmp_path,
    )  # fmt: skip
    report = load_pretrained(RepNeXt('m0'), tmp_path / 'run' / 'epoch_1.pth')
    assert '0 missing, 0 unexpected' in str(report) and report.match.ignored == {'head': 14}
    arguments = ['run/repnext_m0_shapes.py', 'run/epoch_1.pth']
    plain = tool_runs.succeed_here(evaluate_main, *arguments, cwd=tmp_path)
    fused = tool_runs.succeed_here(evaluate_main, *arguments, '--fuse', cwd=tmp_path)
    assert 'Fused with plan full: 2,077,690 -> 2,008,685 parameters, 0 norms left' in fused

    def accuracy(text: str) -> str:
        return text.split('accuracy/top1: ')[1].split()[0]

    assert accuracy(plain) == accuracy(fused)
    trained = timm.create_model('repnext_m0', num_classes=5).eval()
    load_pretrained(trained, tmp_path / 'run' / 'epoch_1.pth')
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reparameterize(trained)(image), trained(image))


@pytest.mark.slow
def test_resume_after_a_kill_is_exact(data: Path, tmp_path: Path) -> None:
    """With augmentation, mixing, workers, dropped paths, averages and AGC."""
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = [{str(FOLDER / 'repnext_m0_shapes.py')!r}]
model = dict(drop_path_rate=0.2, mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0))
train_dataloader = dict(
    num_workers=1,
    sampler=dict(_delete_=True, type='RepeatedAugmentation'),
    dataset=dict(transform=dict(auto_augment='rand-m9-mstd0.5-inc1')),
)
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', warmup_epochs=1, warmup_lr=1e-4, delay=1),
    dict(type='AdaptiveGradClip'),
    dict(type='KeepEMA', decay=0.9),
]
""")
    arguments = ['train.py', config, '--epochs', '3', *short(data)]
    tool_runs.succeed(*arguments, '--work-dir', 'whole', cwd=tmp_path)
    process = tool_runs.start(*arguments, '--work-dir', 'cut', cwd=tmp_path)
    while process.poll() is None:
        if (tmp_path / 'cut' / 'epoch_2.pth').is_file():
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    (tmp_path / 'cut' / 'epoch_3.pth').unlink(missing_ok=True)
    resumed = tool_runs.succeed(*arguments, '--work-dir', 'cut', '--resume', cwd=tmp_path)
    assert 'Resuming from' in resumed and 'Epoch(train) [1]' not in resumed
    one, two = (
        torch.load(tmp_path / name / 'epoch_3.pth', weights_only=True) for name in ('whole', 'cut')
    )
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), f'{part} {key}'


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here, so not over gloo')
def test_two_processes(data: Path, tmp_path: Path) -> None:
    settings = short(
        data, f"model.teacher=dict(model_name='{SMALL}')", 'train_dataloader.batch_size=8'
    )
    output = tool_runs.succeed(
        'dist_train.sh', FOLDER / 'repnext_m0_shapes.py', 2, '--epochs', '1', '--work-dir', 'run',
        '--amp', *settings, cwd=tmp_path,
    )  # fmt: skip
    assert '2 processes over gloo' in output
    tested = tool_runs.succeed_here(
        evaluate_main, 'run/repnext_m0_shapes.py', 'run/epoch_1.pth', cwd=tmp_path
    )
    line = [line for line in output.splitlines() if 'accuracy/top1' in line][-1]
    # Every image counts once, whichever process saw it; --amp rounds.
    count = len(TimmDataset(root=str(data / 'imagenet' / 'val')))
    values = [float(text.split('accuracy/top1: ')[1].split()[0]) for text in (line, tested)]
    assert abs(values[0] - values[1]) <= 200 / count


# --- wrong data


def check(data: Path, cwd: Path, *more: str) -> str:
    settings = short(data, 'sample_data_root=None', *more)  # or a spoiled one is drawn again
    done = tool_runs.run_here(
        train_main, 'repnext_m0_shapes', '--check-only', '--work-dir', 'run', *settings, cwd=cwd
    )
    assert done.returncode, done.stdout
    return done.stderr


NO_CLASSES = (
    'train_dataloader.dataset.metainfo=None',
    'val_dataloader.dataset.metainfo=None',
)


def test_no_data(tmp_path: Path, data: Path) -> None:
    done = tool_runs.run_here(train_main, 'repnext_m1_imagenet', '--work-dir', 'run', cwd=tmp_path)
    assert done.returncode
    assert 'no train images at data/imagenet/train' in done.stderr
    assert 'train/CLASS/IMAGE.JPEG and val/CLASS/IMAGE.JPEG' in done.stderr
    assert '--cfg-options data_root=DIR' in done.stderr


def test_another_number_of_classes(data: Path, tmp_path: Path) -> None:
    said = check(data, tmp_path, 'model.num_classes=7')
    assert 'model.num_classes is 7' in said and 'add --cfg-options model.num_classes=5' in said


def test_folders_that_differ(data: Path, tmp_path: Path) -> None:
    own = drawn(data, tmp_path)
    (own / 'imagenet/val/disc').rename(own / 'imagenet/val/plate')
    assert 'which differ (only val: plate; only train: disc)' in check(own, tmp_path, *NO_CLASSES)


def test_an_empty_folder(data: Path, tmp_path: Path) -> None:
    own = drawn(data, tmp_path)
    for image in (own / 'imagenet/train/ring').iterdir():
        image.unlink()
    said = check(own, tmp_path, *NO_CLASSES)
    assert '1 class folders without an image (ring), and every label after them would move' in said


def test_images_in_no_folder(data: Path, tmp_path: Path) -> None:
    own = drawn(data, tmp_path)
    root = own / 'imagenet/train'
    for folder in [*root.iterdir()]:
        for image in folder.iterdir():
            image.rename(root / image.name)
        folder.rmdir()
    said = check(own, tmp_path)
    assert 'images in no class folder; expected under' in said


def test_a_broken_image_stops_before_the_run(data: Path, tmp_path: Path) -> None:
    own = drawn(data, tmp_path)
    victim = sorted((own / 'imagenet/train/ring').iterdir())[1]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    said = check(own, tmp_path)
    assert f'broken, the first is ring/{victim.name}' in said and 'truncated' in said


@pytest.mark.parametrize('spoil', ['class', 'image', 'archive'])
def test_tar_files_are_checked_as_folders_are(spoil: str, data: Path, tmp_path: Path) -> None:
    own = drawn(data, tmp_path) / 'imagenet'
    said = {
        'class': 'which differ (only train: ring)',
        'image': 'are broken',
        'archive': 'tar file',
    }
    if spoil == 'class':
        shutil.rmtree(own / 'val' / 'ring')
    if spoil == 'image':
        sorted((own / 'val' / 'ring').iterdir())[0].write_bytes(b'no image')
    for split in ('train', 'val'):
        with tarfile.open(own / f'{split}.tar', 'w') as archive:
            archive.add(own / split, arcname='.')
        shutil.rmtree(own / split)
    if spoil == 'archive':
        (own / 'val.tar').write_bytes(b'no archive' * 100)
    assert said[spoil] in check(own.parent, tmp_path, *NO_CLASSES)


def test_a_class_map_reads_what_it_names(data: Path) -> None:
    """Labels are the place in metainfo, whatever the folders' own order is."""
    order = shapes.THINGS[::-1]
    dataset = TimmDataset(
        root=str(data / 'imagenet/val'),
        transform=dict(input_size=64),
        metainfo=dict(classes=order),
    )
    assert dataset.metainfo['classes'] == order
    for i in (0, len(dataset) - 1):
        assert order[dataset[i]['labels']] == Path(dataset.filename(i)).parent.name
    Image.open(dataset.filename(0)).verify()


@pytest.mark.slow
def test_without_the_frameworks(data: Path, tmp_path: Path) -> None:
    """torch, mmengine and timm are enough: nothing of mmcv, mmdet or mmseg is imported."""
    code = (
        'import sys; sys.modules.update(dict.fromkeys(("mmcv", "mmdet", "mmseg")))\n'
        'from repnext_mm.engine.cli import train_main; sys.exit(train_main(sys.argv[1:]))'
    )
    arguments = ['repnext_m0_shapes', '--epochs', '1', '--work-dir', 'run', *short(data)]
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments],
        cwd=tmp_path,
        env=tool_runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()

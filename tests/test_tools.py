"""tools/train.py and tools/test.py: whole runs in their own processes, and every message."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tool_runs
import torch
from conftest import REPO
from mmengine.config import Config
from PIL import Image
from tool_runs import CONFIGS, FOLDERS, options, run_here, succeed, succeed_here

from repnext_mm.configs import look_up
from repnext_mm.engine.allocator import VARIABLE, keep_freed_memory
from repnext_mm.engine.cli import _Options
from repnext_mm.engine.cli import evaluate_main as evaluate
from repnext_mm.engine.cli import train_main as train

SCRATCH = 'model.backbone.init_cfg=None'
ONE_EPOCH = ['train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']
TWO_ITERATIONS = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]
#: How the tools are run for a task: the way into a process of their own is the same for both.
RUNS: dict[str, Callable[..., str]] = {
    'det': succeed,
    'seg': lambda tool, *args, cwd: succeed_here(
        {'train.py': train, 'test.py': evaluate}[tool], *args, cwd=cwd
    ),
}
TRAIN_JSON = 'annotations/instances_train2017.json'


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_runs.tiny_shapes(tmp_path_factory.mktemp('data') / 'shapes', train=16)


@pytest.fixture
def own_shapes(shapes: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


@pytest.fixture
def fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Run a tool in this process, from a folder without data; returns its one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    for name in ('RANK', 'REPNEXT_MM_TRACEBACK'):
        monkeypatch.delenv(name, raising=False)
    # Earlier tests' loggers write to streams that pytest has closed; logging would complain.
    monkeypatch.setattr(logging, 'raiseExceptions', False)

    def run(tool: Callable, *args: object) -> str:
        assert tool([str(a) for a in args]) == 1
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith('error') or 'Traceback' in line
        ]
        assert len(lines) == 1, lines
        return lines[0]

    return run


# --- whole runs


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize(
    'task, settings, metric',
    [('det', ONE_EPOCH, 'coco/bbox_mAP'), ('seg', TWO_ITERATIONS, 'mIoU')],
)
def test_train_then_the_command_it_names(
    task: str, settings: list[str], metric: str, shapes: Path, tmp_path: Path
) -> None:
    arguments = (CONFIGS[task], '--amp', *options(task, shapes, *settings))
    output = RUNS[task]('train.py', *arguments, cwd=tmp_path)
    if not torch.cuda.is_available():
        lines = [line for line in output.splitlines() if line.startswith('No GPU')]
        assert len(lines) == 1
        assert 'SyncBN as BatchNorm' in lines[0]
        assert 'mixed precision in bfloat16' in lines[0]
        assert (VARIABLE in lines[0]) == keep_freed_memory()
    last = output.splitlines()[-1]
    wrote, following = last.split('; next: ')
    checkpoint = re.match(r'Wrote (\S+\.pth) and the log in (\S+)$', wrote)
    assert checkpoint, last
    assert (tmp_path / checkpoint[1]).is_file()
    assert (tmp_path / checkpoint[2] / 'vis_data' / 'scalars.json').is_file()

    python, script, *arguments = shlex.split(following)
    assert (python, script) == ('python', 'tools/test.py')
    output = RUNS[task]('test.py', *arguments, '--show-dir', 'seen', cwd=tmp_path)
    results = re.match(
        r'Wrote (\S+\.json) and pictures under seen\. Again: ', output.splitlines()[-1]
    )
    assert results, output.splitlines()[-1]
    assert metric in json.loads((tmp_path / results[1]).read_text())
    assert list((tmp_path / 'seen').rglob('*.png'))


def test_learning_rate_follows_the_batch_on_request(shapes: Path, tmp_path: Path) -> None:
    batch = ('train_dataloader.batch_size=4', 'auto_scale_lr.base_batch_size=16')
    arguments = (CONFIGS['seg'], *options('seg', shapes, *TWO_ITERATIONS, *batch))
    output = succeed_here(train, *arguments, cwd=tmp_path)
    assert 'The batch is 4 x 1 = 4 images and the learning rate is that for 16' in output
    scaled = succeed_here(train, *arguments[:1], '--auto-scale-lr', *arguments[1:], cwd=tmp_path)
    assert 'learning rate is that for' not in scaled
    rates = [float(re.search(r'\blr: (\S+)', text)[1]) for text in (output, scaled)]
    assert rates[1] == pytest.approx(rates[0] * 4 / 16, rel=1e-3)


@pytest.mark.parametrize(
    'base, flag, rate, product',
    [
        (4, False, 1.0, None),
        (4, True, 1.0, '1 x 1 x 4 = 4'),
        (16, False, 1.0, '1 x 1 x 4 = 4'),
        (16, True, 0.25, '1 x 1 x 4 = 4'),
    ],
)
def test_accumulated_gradients_count_as_the_batch(
    base: int, flag: bool, rate: float, product: str | None, shapes: Path, tmp_path: Path
) -> None:
    settings = options(
        'seg', shapes, 'train_dataloader.batch_size=1', 'optim_wrapper.accumulative_counts=4',
        f'auto_scale_lr.base_batch_size={base}', 'default_hooks.logger.interval=1',
        'param_scheduler.0.start_factor=1.0',
    )  # fmt: skip
    arguments = [CONFIGS['seg'], '--iters', 4, *(['--auto-scale-lr'] * flag), *settings]
    output = succeed_here(train, *arguments, cwd=tmp_path)
    assert float(re.search(r'\blr: (\S+)', output)[1]) == pytest.approx(1.5e-3 * rate)
    if product:
        assert f'The batch is {product} images' in output
    assert ('learning rate is that for' in output) is (not flag and product is not None)


@pytest.mark.parametrize(
    'text, value',
    [
        ("dict(type='X', a=1)", {'type': 'X', 'a': 1}),
        ("{'a': [1, 2], 'b': None}", {'a': [1, 2], 'b': None}),
        ("[dict(type='A'), dict(type='B', c=(1, 2))]",
         [{'type': 'A'}, {'type': 'B', 'c': (1, 2)}]),
        ('[1,(2,3)]', [1, (2, 3)]),
        ('model-{}.pth', 'model-{}.pth'),
        ('1e-3', 1e-3),
    ],
)  # fmt: skip
def test_values_of_options(text: str, value: object) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=_Options)
    assert parser.parse_args(['--cfg-options', f'a.b={text}']).cfg_options == {'a.b': value}


@pytest.mark.parametrize(
    'text', ['dict(type=X, a=1)', 'f(a,b)', "dict(a=__import__('os'))", '{1,2}', '[1,2', '{1: 2}']
)
def test_values_that_are_none(text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train(['config.py', '--cfg-options', f'model.backbone={text}'])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_options_that_do_not_fit_the_config(fails: Callable) -> None:
    for option in ('param_scheduler.9.end=1', "log_level={'a': 1}", 'train_cfg.max_epochs.x=1'):
        assert option.partition('=')[0] in fails(train, CONFIGS['det'], '--cfg-options', option)


def test_a_dict_replaces_or_changes_a_part(shapes: Path, tmp_path: Path) -> None:
    change = "model.backbone=dict(drop_path_rate=0.25, norm_cfg={'type': 'BN', 'eps': 1e-4})"
    settings = options('seg', shapes, change)
    output = succeed_here(train, CONFIGS['seg'], '--iters', 1, *settings, cwd=tmp_path)
    config = shlex.split(output.splitlines()[-1])[-2]
    backbone = Config.fromfile(tmp_path / config).model.backbone
    assert (backbone.arch, backbone.drop_path_rate, backbone.norm_cfg.eps) == ('m0', 0.25, 1e-4)


def test_settings_of_workers_without_workers(shapes: Path, tmp_path: Path) -> None:
    settings = options(
        'seg', shapes, 'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=True',
        'train_dataloader.prefetch_factor=2',
    )  # fmt: skip
    output = succeed_here(train, CONFIGS['seg'], '--iters', 1, *settings, cwd=tmp_path)
    [line] = [line for line in output.splitlines() if line.startswith('Dropped')]
    assert 'train_dataloader.persistent_workers' in line
    assert 'train_dataloader.prefetch_factor' in line


def test_length_of_a_run_on_the_command_line(
    fails: Callable, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    assert '--epochs 3' in fails(train, CONFIGS['seg'], '--epochs', 3, *options('seg', shapes))
    for arguments in (['--iters', '0'], ['--iters', 'x'], ['--iters', '1', '--epochs', '1']):
        with pytest.raises(SystemExit) as stop:
            train(['config.py', *arguments])
        assert stop.value.code == 2
    capsys.readouterr()


def test_no_network_for_pretrained_weights(shapes: Path, tmp_path: Path) -> None:
    weights = 'model.backbone.init_cfg.checkpoint=repnext_m0_distill_300e'
    settings = options('seg', shapes, 'model.backbone.init_cfg.type=Pretrained', weights)
    nowhere = 'http://127.0.0.1:9'
    done = run_here(
        train,
        CONFIGS['seg'],
        *settings,
        cwd=tmp_path,
        https_proxy=nowhere,
        HTTPS_PROXY=nowhere,
        TORCH_HOME=str(tmp_path / 'hub'),
    )
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith('error: ')
    assert 'repnext_m0_distill_300e' in sentence
    assert sentence.endswith('--cfg-options model.backbone.init_cfg=None')
    assert 'Traceback' not in done.stderr


def test_help_names_the_defaults(capsys: pytest.CaptureFixture) -> None:
    for tool in (train, evaluate):
        with pytest.raises(SystemExit) as stop:
            tool(['--help'])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in ('--work-dir', '--cfg-options', '--launcher', '--local-rank', '(default: '):
            assert option in text


# --- arguments and configs


@pytest.mark.compat
def test_config_name_with_a_slip(fails: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    sentence = fails(train, 'configs/mask_rcnn_repnext_m4_cocoo.py')
    assert 'did you mean configs/mask_rcnn_repnext_m4_coco.py?' in sentence
    assert 'did you mean configs/semantic_fpn_repnext_m4_ade20k.py?' in fails(
        train, 'semantic_fpn_repnet_m4_ade20k'
    )
    assert 'is a folder' in fails(train, 'configs')


def test_broken_configs(fails: Callable, tmp_path: Path) -> None:
    config = tmp_path / 'broken.py'
    config.write_text('model = dict(')
    assert 'broken.py is not a valid config' in fails(train, config)
    config.write_text("_base_ = './absent.py'")
    assert 'absent.py' in fails(train, config)
    config.write_text("custom_imports = dict(imports=['no_such'], allow_failed_imports=False)")
    assert 'no_such' in fails(train, config)
    config.write_text('a = 1')
    assert 'has no model' in fails(train, config)


def test_type_that_nobody_registered(fails: Callable, shapes: Path) -> None:
    settings = options('seg', shapes, 'model.backbone.type=RepNeX')
    assert "type='RepNeX'" in fails(train, CONFIGS['seg'], *settings)


def test_backbone_argument_that_is_not_allowed(fails: Callable, shapes: Path) -> None:
    sentence = fails(train, CONFIGS['seg'], *options('seg', shapes, 'model.backbone.arch=m9'))
    assert "arch='m9' is not a RepNeXt; choose one of m0" in sentence


def test_work_dir_that_cannot_be_written(fails: Callable, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / 'taken').write_text('mine')
    arguments = [CONFIGS['seg'], *options('seg', shapes), '--work-dir', 'taken/run']
    assert '--work-dir taken/run cannot be written (Not a directory)' in fails(train, *arguments)
    assert (tmp_path / 'taken').read_text() == 'mine'


def test_malformed_option_is_a_usage_error(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train(['config.py', '--cfg-options', 'lr'])
    assert stop.value.code == 2
    assert '--cfg-options requires KEY=VALUE' in capsys.readouterr().err


@pytest.mark.compat
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
def test_cuda_asked_for_but_absent(fails: Callable, shapes: Path) -> None:
    arguments = [CONFIGS['seg'], *options('seg', shapes), '--device', 'cuda']
    assert '--device cuda was given, but torch' in fails(train, *arguments)
    arguments[-2:] = ['--launcher', 'slurm']
    assert '--launcher slurm needs GPUs, but torch' in fails(train, *arguments)


def test_launcher_without_its_processes(fails: Callable, shapes: Path) -> None:
    arguments = [CONFIGS['seg'], *options('seg', shapes), '--launcher', 'pytorch']
    assert 'tools/dist_train.sh CONFIG N' in fails(train, *arguments)


def test_traceback_on_request(
    fails: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('REPNEXT_MM_TRACEBACK', '1')
    assert train(['absent.py']) == 1
    err = capsys.readouterr().err
    assert 'Traceback (most recent call last)' in err
    assert err.splitlines()[-1].startswith('error: there is no config absent.py')


# --- data


@pytest.mark.compat
@pytest.mark.parametrize(
    'config, looked_in, layout, sample',
    [
        (
            'mask_rcnn_repnext_m0_coco.py',
            'data/coco',
            'annotations/instances_train2017.json in COCO format, and its images in train2017/',
            'mask_rcnn_repnext_m0_shapes',
        ),
        (
            'semantic_fpn_repnext_m0_ade20k.py',
            'data/ade/ADEChallengeData2016',
            'images images/training/*.jpg and label maps of the same names '
            'annotations/training/*.png',
            'semantic_fpn_repnext_m0_shapes',
        ),
    ],
)
def test_no_data(
    config: str, looked_in: str, layout: str, sample: str, fails: Callable, tmp_path: Path
) -> None:
    sentence = fails(train, REPO / 'configs' / config)
    assert f'no data at {looked_in} (looked in {tmp_path / looked_in})' in sentence
    assert layout in sentence
    assert sentence.endswith(f'repnext-mm train {sample}')
    assert look_up(sample)


def test_data_root_that_lacks_a_part(fails: Callable, own_shapes: Path) -> None:
    (own_shapes / 'coco' / TRAIN_JSON).rename(own_shapes / 'coco' / 'elsewhere.json')
    settings = options('det', own_shapes)[2:]  # without sample_data_root: it would be made
    sentence = fails(train, CONFIGS['det'], '--cfg-options', 'sample_data_root=None', *settings)
    assert f'no data at {own_shapes}/coco/{TRAIN_JSON}' in sentence


def damaged_json(root: Path, change: Callable[[dict], object]) -> None:
    path = root / 'coco' / TRAIN_JSON
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.compat
def test_classes_that_the_file_does_not_have(fails: Callable, own_shapes: Path) -> None:
    damaged_json(own_shapes, lambda c: c['categories'][0].update(name='circle'))
    sentence = fails(train, CONFIGS['det'], *options('det', own_shapes))
    assert 'has the 5 categories circle, ring, square, triangle, star' in sentence
    assert "1 are not among them ('disc')" in sentence
    assert 'metainfo=dict(classes=(...))' in sentence


def test_single_class_without_its_comma(fails: Callable, shapes: Path) -> None:
    settings = options('det', shapes, 'train_dataloader.dataset.metainfo.classes=disc')
    assert "classes=('disc',)" in fails(train, CONFIGS['det'], *settings)


def test_heads_for_another_number_of_classes(fails: Callable, shapes: Path) -> None:
    two = [f'{split}_dataloader.dataset.metainfo.classes=[disc,ring]' for split in ('train', 'val')]
    sentence = fails(train, CONFIGS['det'], *options('det', shapes, *two))
    assert 'model.roi_head.bbox_head has num_classes=5' in sentence
    heads = ('model.roi_head.bbox_head', 'model.roi_head.mask_head')
    assert sentence.endswith(' '.join(f'{head}.num_classes=2' for head in heads))
    settings = options('seg', shapes, 'model.decode_head.num_classes=150')
    assert 'model.decode_head.num_classes=7' in fails(train, CONFIGS['seg'], *settings)


def test_fixed_classes_of_ade20k(fails: Callable, shapes: Path) -> None:
    settings = options('seg', shapes, 'train_dataloader.dataset.type=ADE20KDataset')
    sentence = fails(train, CONFIGS['seg'], *settings)
    assert 'ADE20KDataset has 150 fixed classes' in sentence
    assert 'BaseSegDataset' in sentence


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"images": [', 'is not valid JSON'),
        ('', 'is not valid JSON'),
        ('[]', 'lacks images, annotations, categories'),
        ('{"images": []}', 'lacks annotations, categories'),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            'images[0] has file_name=None',
        ),
    ],
)
def test_broken_annotation_file(text: str, message: str, fails: Callable, own_shapes: Path) -> None:
    path = own_shapes / 'coco' / TRAIN_JSON
    path.write_text(text)
    sentence = fails(train, CONFIGS['det'], *options('det', own_shapes))
    assert str(path) in sentence
    assert message in sentence


def test_nothing_left_after_the_filter(fails: Callable, own_shapes: Path) -> None:
    damaged_json(own_shapes, lambda c: c['annotations'].clear())
    sentence = fails(train, CONFIGS['det'], *options('det', own_shapes))
    assert '0 of 16 images' in sentence
    assert '0 have an object of the classes disc' in sentence


def test_evaluator_of_other_annotations(fails: Callable, shapes: Path) -> None:
    settings = options('det', shapes, 'val_evaluator.ann_file=other.json')
    sentence = fails(train, CONFIGS['det'], *settings)
    assert 'val_evaluator compares with other.json' in sentence
    assert f'val_evaluator.ann_file={shapes}/coco/annotations/instances_val2017.json' in sentence


@pytest.mark.compat
@pytest.mark.parametrize('task, folder', [('det', 'train2017'), ('seg', 'annotations/training')])
def test_missing_file_is_named(task: str, folder: str, fails: Callable, own_shapes: Path) -> None:
    victim = sorted((own_shapes / FOLDERS[task] / folder).iterdir())[3]
    victim.unlink()
    settings = options(task, own_shapes)[2:]
    sentence = fails(train, CONFIGS[task], '--cfg-options', 'sample_data_root=None', *settings)
    assert f'the first is {victim}' in sentence
    assert '1 of 1' in sentence  # of as many as the training set has


@pytest.mark.compat
@pytest.mark.parametrize('task, folder', [('det', 'train2017'), ('seg', 'images/training')])
@pytest.mark.parametrize('content', [b'', b'not a picture'], ids=['empty', 'text'])
def test_undecodable_image_is_named(
    task: str, folder: str, content: bytes, fails: Callable, own_shapes: Path
) -> None:
    for victim in (own_shapes / FOLDERS[task] / folder).iterdir():
        victim.write_bytes(content)
    sentence = fails(train, CONFIGS[task], *options(task, own_shapes))
    assert re.search(rf'the image {own_shapes}/\S+\.jpg cannot be decoded', sentence)


@pytest.mark.compat
@pytest.mark.parametrize('workers', [0, 1])
def test_undecodable_image_found_on_the_way(
    workers: int, fails: Callable, own_shapes: Path
) -> None:
    """One that no check opened; with a worker, the error crosses processes."""
    victim = sorted((own_shapes / 'ade' / 'images' / 'training').iterdir())[1]
    victim.write_bytes(b'not a picture')
    settings = options('seg', own_shapes, f'train_dataloader.num_workers={workers}')
    sentence = fails(train, CONFIGS['seg'], '--no-check', *settings)
    assert f'the image {victim} cannot be decoded' in sentence


def test_label_maps_that_do_not_fit(fails: Callable, own_shapes: Path) -> None:
    masks = sorted((own_shapes / 'ade' / 'annotations' / 'training').iterdir())
    whole = masks[0].read_bytes()
    Image.new('L', (64, 64), 8).save(masks[0])  # 7 classes from 1
    sentence = fails(train, CONFIGS['seg'], *options('seg', own_shapes))
    assert f'{masks[0]} holds the label 8, but the classes of the config reach to 7' in sentence
    Image.new('RGB', (64, 64)).save(masks[0])
    assert 'has 3 channels' in fails(train, CONFIGS['seg'], *options('seg', own_shapes))
    masks[0].write_bytes(whole[:40])
    sentence = fails(train, CONFIGS['seg'], *options('seg', own_shapes))
    assert f'the label map {masks[0]} cannot be read' in sentence


# --- checkpoints


@pytest.mark.compat
def test_checkpoints_that_cannot_be_used(fails: Callable, shapes: Path, tmp_path: Path) -> None:
    settings = options('seg', shapes)
    assert 'there is no file' in fails(evaluate, CONFIGS['seg'], 'absent.pth', *settings)
    assert 'there is no file' in fails(train, CONFIGS['seg'], *settings, 'load_from=absent.pth')

    checkpoint = tmp_path / 'other.pth'
    torch.save({'state_dict': {'backbone.fc.weight': torch.zeros(3)}, 'meta': {}}, checkpoint)
    sentence = fails(evaluate, CONFIGS['seg'], checkpoint, *settings)
    assert re.search(r'does not fit the config: 0 of the \d+ entries', sentence)
    sentence = fails(train, CONFIGS['seg'], '--resume', checkpoint, *settings)
    assert 'other.pth lacks message_hub, optimizer' in sentence

    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    assert 'other.pth' in fails(evaluate, CONFIGS['seg'], checkpoint, *settings)
    sentence = fails(train, CONFIGS['seg'], '--resume', checkpoint, *settings)
    assert 'give --resume without a file to use the newest complete checkpoint' in sentence

"""The config of a run on a folder: one file, complete, with the reasons of what it sets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..datasets.folders import Example, LabeledFolder
from ..datasets.folders.masks import must_convert, write_index_masks
from ..datasets.folders.records import coco_record
from ..files import write_text
from ..version import __version__
from .heads import HEADS, build_model_config
from .settings import PATIENCE, Settings
from .text import Code, assign, paragraph, wrapped

#: Where annotations for the run are, in its work dir.
ANNOTATIONS = 'annotations'
GRAY = 114
META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')


@dataclass(frozen=True)
class Weights:
    """What a run starts from: `init_cfg` of the backbone, or a checkpoint of all of it."""

    checkpoint: str | None = None
    whole: bool = False

    @property
    def init_cfg(self) -> dict[str, str] | None:
        """Of the backbone."""
        if self.checkpoint is None or self.whole:
            return None
        return dict(type='Pretrained', checkpoint=self.checkpoint)


@dataclass(frozen=True)
class Plan:
    """All that a config is written from."""

    folder: LabeledFolder
    head: str
    network: str
    lite: bool
    weights: Weights
    settings: Settings
    splits: dict[str, list[Example]]
    work_dir: Path
    command: str

    @property
    def path(self) -> Path:
        """Where the config is written; a config's name is that of its work dir, as in mm."""
        return self.work_dir / f'{self.work_dir.name}.py'


def write_config(plan: Plan) -> Path:
    """Write the annotations and the config into the work dir; the folder stays as it is."""
    plan.work_dir.mkdir(parents=True, exist_ok=True)
    write = {'mmdet': _detection, 'mmseg': _segmentation, 'mmengine': _classification}
    body = write[HEADS[plan.head].scope](plan)
    write_text(plan.path, '\n\n'.join([_heading(plan), *body]) + '\n')
    return plan.path


def _heading(plan: Plan) -> str:
    row, folder = HEADS[plan.head], plan.folder
    light = ', light' if plan.lite else ''
    counts = ', '.join(f'{len(found)} {split}' for split, found in plan.splits.items())
    return paragraph(
        [
            wrapped(
                f'{row.title}{light} on {plan.network} for {folder.root.name} ({folder.format}; '
                f'images: {counts}). Written by repnext_mm {__version__}: {plan.command}'
            ),
            wrapped(
                'Complete, and yours to change. Train again with `repnext-mm train` and this file.'
            ),
            f"default_scope = '{row.scope}'",
            "custom_imports = dict(imports=['repnext_mm'], allow_failed_imports=False)",
        ]
    )


def _variables(plan: Plan, size: Any) -> str:
    chosen = plan.settings
    return paragraph(
        [
            assign('data_root', f'{plan.folder.root.absolute()}{os.sep}'),
            assign('annotations', f'{(plan.work_dir / ANNOTATIONS).absolute()}{os.sep}'),
            assign('classes', plan.folder.classes),
            assign('image_size', size, chosen.size.reason),
            assign('batch_size', chosen.batch.value, chosen.batch.reason),
            assign('max_epochs', chosen.epochs.value, chosen.epochs.reason),
            assign('lr', chosen.lr.value, chosen.lr.reason),
            assign('warmup', chosen.warmup.value, f'iterations; {chosen.warmup.reason}'),
            assign('val_interval', chosen.val_interval.value, chosen.val_interval.reason),
        ]
    )


def _workers(plan: Plan) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 2
    number = min(cores, 8) if cores > 2 else 0
    images = max(len(split) for split in plan.splits.values())
    number = 0 if images < 32 else number
    return dict(num_workers=number, persistent_workers=number > 0)


def _runtime(plan: Plan, visualizer: str, drawing: str) -> list[str]:
    """What every task shares, in the order that a reader asks for it."""
    monitor = HEADS[plan.head].monitor
    epochs, interval = int(plan.settings.epochs.value), int(plan.settings.val_interval.value)
    # RTMDet's levels share convolutions, which mmengine would count for each level.
    shared = dict(bypass_duplicate=True) if plan.head.startswith('rtmdet') else {}
    hooks: dict[str, Any] = dict(
        timer=dict(type='IterTimerHook'),
        logger=dict(type='LoggerHook', interval=10),
        param_scheduler=dict(type='ParamSchedulerHook'),
        sampler_seed=dict(type='DistSamplerSeedHook'),
        checkpoint=dict(
            type='AtomicCheckpointHook',
            by_epoch=True,
            interval=Code('val_interval'),
            max_keep_ckpts=1,
            save_best=monitor,
            rule='greater',
        ),
    )
    if drawing:
        hooks['visualization'] = dict(type=drawing)
    ends = PATIENCE * interval
    stop = f'ends after {ends} epochs without a better {monitor.rpartition("/")[2]}'
    return [
        paragraph(
            [
                "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, "
                'val_interval=val_interval)',
                "val_cfg = dict(type='ValLoop')",
                "test_cfg = dict(type='TestLoop')",
                assign(
                    'optim_wrapper',
                    dict(
                        type='OptimWrapper',
                        optimizer=dict(type='AdamW', lr=Code('lr'), weight_decay=0.05),
                        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, **shared),
                        clip_grad=dict(max_norm=35.0, norm_type=2),
                    ),
                ),
                assign(
                    'param_scheduler',
                    [
                        dict(
                            type='LinearLR',
                            start_factor=1e-3,
                            begin=0,
                            end=Code('warmup'),
                            by_epoch=False,
                        ),
                        dict(
                            type='CosineAnnealingLR',
                            eta_min=Code('0.02 * lr'),
                            begin=0,
                            end=Code('max_epochs'),
                            T_max=Code('max_epochs'),
                            by_epoch=True,
                            convert_to_iter_based=True,
                        ),
                    ],
                ),
                'auto_scale_lr = dict(enable=False, base_batch_size=batch_size)',
            ]
        ),
        paragraph(
            [
                assign('default_hooks', hooks),
                assign(
                    'custom_hooks',
                    [
                        dict(
                            type='EMAHook',
                            ema_type='MomentumAnnealingEMA',
                            momentum=0.0002,
                            gamma=100,
                            update_buffers=True,
                            priority=49,
                        ),
                        dict(
                            type='EarlyStoppingHook',
                            monitor=monitor,
                            rule='greater',
                            min_delta=0.0,
                            patience=PATIENCE,
                        ),
                        dict(type='EpochLines', monitor=monitor),
                    ],
                    f'averaged weights are what is evaluated and saved; training {stop}; a line '
                    'per epoch, and all else in the log file',
                ),
                assign(
                    'visualizer',
                    dict(type=visualizer, vis_backends=[dict(type='LocalVisBackend')]),
                ),
                f"log_processor = dict(type='LogProcessor', window_size={max(1, min(50, epochs))}, "
                'by_epoch=True)',
                assign(
                    'env_cfg',
                    dict(
                        cudnn_benchmark=False,
                        mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
                        dist_cfg=dict(backend='nccl'),
                    ),
                ),
                _start(plan.weights),
                'randomness = dict(seed=0)',
            ]
        ),
    ]


def _start(weights: Weights) -> str:
    if weights.whole:
        return assign('load_from', weights.checkpoint, 'layers of other classes are left out')
    return 'load_from = None'


# --- detectors


def _detection(plan: Plan) -> list[str]:
    row, folder = HEADS[plan.head], plan.folder
    for split, examples in plan.splits.items():
        path = plan.work_dir / ANNOTATIONS / f'{split}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(coco_record(examples, folder.classes)))
    side = int(plan.settings.size.value)
    train, test = _detection_pipelines(plan)
    empty = any(not example.objects for example in plan.splits['train'])
    dataset: dict[str, Any] = {
        'type': 'CocoDataset',
        'data_root': Code('data_root'),
        'metainfo': dict(classes=Code('classes')),
        'data_prefix': dict(img=''),
    }
    loaders = [
        assign('dataset', dataset),
        assign(
            'train_dataloader',
            dict(
                batch_size=Code('batch_size'),
                **_workers(plan),
                sampler=dict(type='DefaultSampler', shuffle=True),
                **({} if row.dense else {'batch_sampler': dict(type='AspectRatioBatchSampler')}),
                dataset={
                    '**dataset': None,
                    'ann_file': Code("annotations + 'train.json'"),
                    'pipeline': Code('train_pipeline'),
                    'filter_cfg': dict(filter_empty_gt=not empty, min_size=1),
                },
            ),
            'images without objects are trained on, too' if empty else '',
        ),
    ]
    for name, split in _evaluated(plan):
        loaders += [
            assign(
                f'{name}_dataloader',
                dict(
                    batch_size=1,
                    **_workers(plan),
                    drop_last=False,
                    sampler=dict(type='DefaultSampler', shuffle=False),
                    dataset={
                        '**dataset': None,
                        'ann_file': Code(f"annotations + '{split}.json'"),
                        'pipeline': Code('test_pipeline'),
                        'test_mode': True,
                    },
                ),
            ),
            assign(
                f'{name}_evaluator',
                dict(
                    type='FastCocoMetric',
                    ann_file=Code(f"annotations + '{split}.json'"),
                    metric=['bbox', 'segm'] if row.masks else 'bbox',
                ),
            ),
        ]
    return [
        _variables(plan, (side, side)),
        paragraph([assign('train_pipeline', train), assign('test_pipeline', test)]),
        paragraph(loaders + _same_test(plan)),
        _model(plan),
        *_runtime(plan, 'DetLocalVisualizer', 'DetVisualizationHook'),
    ]


def _evaluated(plan: Plan) -> list[tuple[str, str]]:
    return [('val', 'val'), *([('test', 'test')] if 'test' in plan.splits else [])]


def _same_test(plan: Plan) -> list[str]:
    if 'test' in plan.splits:
        return []
    return ['test_dataloader, test_evaluator = val_dataloader, val_evaluator']


def _detection_pipelines(plan: Plan) -> tuple[list[Any], list[Any]]:
    row = HEADS[plan.head]
    size = Code('image_size')
    rtmdet = plan.head.startswith('rtmdet')
    masks: dict[str, Any] = dict(with_mask=True) if row.masks else {}
    load = dict(type='LoadAnnotations', with_bbox=True, **masks)
    flip = dict(type='RandomFlip', prob=0.5) if may_flip(plan.folder.classes) else None
    padding = dict(type='Pad', size=size, pad_val=dict(img=(GRAY, GRAY, GRAY)))
    resize = dict(type='RandomResize', scale=size, keep_ratio=True)
    train: list[Any] = [dict(type='LoadImageFromFile')]
    if rtmdet:
        polygons = dict(poly2mask=False) if row.masks else {}
        cut = dict(recompute_bbox=True, allow_negative_crop=True) if row.masks else {}
        train += [
            {**load, **polygons},
            {**resize, 'ratio_range': (0.8, 1.25)},
            dict(type='RandomCrop', crop_size=size, **cut),
            *([dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))] if row.masks else []),
            dict(type='YOLOXHSVRandomAug'),
        ]
    else:
        train += [load, {**resize, 'ratio_range': (0.8, 1.25)}]
    train += [flip] if flip else []
    train += [padding] if rtmdet else []
    train.append(dict(type='PackDetInputs'))
    test: list[Any] = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=size, keep_ratio=True),
        *([padding] if rtmdet else []),
        load,
        dict(type='PackDetInputs', meta_keys=META_KEYS),
    ]
    return train, test


def may_flip(classes: Sequence[str]) -> bool:
    """Whether a mirrored object is still of its class, as far as names say."""
    words = {word for name in classes for word in name.lower().replace('-', '_').split('_')}
    words |= {word for name in classes for word in name.lower().split()}
    return not {'left', 'right'} & words


def _model(plan: Plan) -> str:
    model = build_model_config(
        plan.head, plan.network, len(plan.folder.classes), plan.lite, plan.weights.init_cfg
    )
    _name_classes(model, len(plan.folder.classes))
    return assign('model', model)


def _name_classes(node: Any, count: int) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == 'num_classes':
                node[key] = Code('len(classes)')
            else:
                _name_classes(value, count)
    elif isinstance(node, list | tuple):
        for item in node:
            _name_classes(item, count)


# --- segmentors


def _segmentation(plan: Plan) -> list[str]:
    folder = plan.folder
    target = plan.work_dir / ANNOTATIONS
    target.mkdir(parents=True, exist_ok=True)
    layouts = {split: _layout(examples) for split, examples in plan.splits.items()}
    converted = must_convert(folder) or any(layout is None for layout in layouts.values())
    places: dict[str, dict[str, Any]] = {}
    for split, examples in plan.splits.items():
        layout = layouts[split]
        if converted or layout is None:
            write_index_masks(folder, examples, target / 'masks')
            names = [example.file for example in examples]
            places[split] = dict(
                data_prefix=dict(img_path='', seg_map_path=Code("annotations + 'masks'")),
                img_suffix='',
                seg_map_suffix='.png',
            )
        else:
            images, image_suffix, masks, mask_suffix = layout
            start = len(images) + 1 if images else 0
            names = [e.file[start : -len(image_suffix)] for e in examples]
            places[split] = dict(
                data_prefix=dict(img_path=images, seg_map_path=masks),
                img_suffix=image_suffix,
                seg_map_suffix=mask_suffix,
            )
        write_text(target / f'{split}.txt', ''.join(f'{name}\n' for name in names))
    side = int(plan.settings.size.value)
    zero = folder.zero_is_ignored and not converted
    dataset: dict[str, Any] = {
        'type': 'BaseSegDataset',
        'data_root': Code('data_root'),
        'metainfo': dict(classes=Code('classes')),
        'reduce_zero_label': zero,
    }
    load = dict(type='LoadAnnotations')
    # The short side becomes that of the crops.
    scale = Code('(4 * image_size[0], image_size[0])')
    flip = [dict(type='RandomFlip', prob=0.5)] if may_flip(folder.classes) else []
    train = [
        dict(type='LoadImageFromFile'),
        load,
        dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=Code('image_size'), cat_max_ratio=0.75),
        *flip,
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ]
    test = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=scale, keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
        load,
        dict(type='PackSegInputs'),
    ]
    loaders = [
        assign(
            'dataset', dataset, 'value 0 of the label maps is no class' if zero else ''
        )
    ]  # fmt: skip
    roles = [('train', 'train'), *_evaluated(plan)]
    for name, split in roles:
        training = name == 'train'
        loaders.append(
            assign(
                f'{name}_dataloader',
                dict(
                    batch_size=Code('batch_size') if training else 1,
                    **_workers(plan),
                    sampler=dict(type='DefaultSampler', shuffle=training),
                    dataset={
                        '**dataset': None,
                        **places[split],
                        'ann_file': Code(f"annotations + '{split}.txt'"),
                        'pipeline': Code('train_pipeline' if training else 'test_pipeline'),
                        **({} if training else {'test_mode': True}),
                    },
                ),
            )
        )
        if not training:
            loaders.append(
                assign(f'{name}_evaluator', dict(type='IoUMetric', iou_metrics=['mIoU']))
            )
    model = build_model_config(
        plan.head, plan.network, len(folder.classes), plan.lite, plan.weights.init_cfg
    )
    model['data_preprocessor']['size'] = Code('image_size')
    _name_classes(model, len(folder.classes))
    return [
        _variables(plan, (side, side)),
        paragraph([assign('train_pipeline', train), assign('test_pipeline', test)]),
        paragraph(loaders + _same_test(plan)),
        assign('model', model),
        *_runtime(plan, 'SegLocalVisualizer', 'SegVisualizationHook'),
    ]


def _layout(examples: Sequence[Example]) -> tuple[str, str, str, str] | None:
    """Folder and suffix of images and of label maps, if they are the same for all examples."""
    first = examples[0]
    assert first.mask is not None
    image, mask = PurePosixPath(first.file), PurePosixPath(first.mask)
    if not mask.stem.startswith(image.stem):
        return None
    image_suffix, mask_suffix = image.suffix, mask.name[len(image.stem) :]
    images, masks = str(image.parent), str(mask.parent)
    images, masks = ('' if folder == '.' else folder for folder in (images, masks))
    for example in examples:
        file = PurePosixPath(example.file)
        stem = file.name.removesuffix(image_suffix)
        expected = f'{masks}/{stem}{mask_suffix}' if masks else f'{stem}{mask_suffix}'
        inside = str(file.parent) == (images or '.')
        if not inside or file.suffix != image_suffix or example.mask != expected:
            return None
    return images, image_suffix, masks, mask_suffix


# --- classifiers


def _classification(plan: Plan) -> list[str]:
    folder, side = plan.folder, int(plan.settings.size.value)
    target = plan.work_dir / ANNOTATIONS
    target.mkdir(parents=True, exist_ok=True)
    for split, examples in plan.splits.items():
        lines = [f'{e.file}\t{folder.classes[e.label or 0]}\n' for e in examples]
        write_text(target / f'{split}.txt', ''.join(lines))
    flip = 0.5 if may_flip(folder.classes) else 0.0
    train = dict(
        input_size=Code('image_size'), is_training=True, scale=(0.35, 1.0), hflip=flip,
        auto_augment='rand-m6-mstd0.5-inc1', interpolation='bicubic',
    )  # fmt: skip
    test = dict(input_size=Code('image_size'), crop_pct=0.9, interpolation='bicubic')
    loaders = [
        assign(
            'loader',
            dict(
                **{**_workers(plan), 'persistent_workers': False},
                worker_init_fn=dict(type='seed_worker'),
                collate_fn=dict(type='default_collate'),
            ),
        ),
        assign(
            'dataset',
            dict(
                type='TimmDataset', root=Code('data_root'), metainfo=dict(classes=Code('classes'))
            ),
        ),
    ]
    for name, split in [('train', 'train'), *_evaluated(plan)]:
        training = name == 'train'
        loaders.append(
            assign(
                f'{name}_dataloader',
                {
                    '**loader': None,
                    'batch_size': Code('batch_size'),
                    'drop_last': training and len(plan.splits['train']) > 64,
                    'sampler': dict(type='DefaultSampler', shuffle=training),
                    'dataset': {
                        '**dataset': None,
                        'ann_file': Code(f"annotations + '{split}.txt'"),
                        'transform': Code('train_transform' if training else 'test_transform'),
                    },
                },
            )
        )
        if not training:
            topk = (1, 5) if len(folder.classes) > 5 else (1,)
            loaders.append(assign(f'{name}_evaluator', dict(type='TopK', topk=topk)))
    model: dict[str, Any] = dict(
        type='TimmClassifier',
        network=plan.network,
        num_classes=Code('len(classes)'),
        smoothing=0.1,
    )
    if plan.weights.checkpoint is not None:
        model['pretrained'] = True
    return [
        _variables(plan, side),
        paragraph([assign('train_transform', train), assign('test_transform', test)]),
        paragraph(loaders + _same_test(plan)),
        assign('model', model),
        *_runtime(plan, 'Visualizer', ''),
    ]

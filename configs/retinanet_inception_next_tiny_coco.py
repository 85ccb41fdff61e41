_base_ = [
    './_base_/models/retinanet_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x_dense.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='inception_next_tiny.sail_in1k')
model = dict(
    backbone=dict(
        type='InceptionNeXt',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=pretrained,
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

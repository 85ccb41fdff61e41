# From scratch on the generated sample data set, in minutes on two CPU cores (tools/demo.py).
_base_ = [
    './_base_/models/mask_rcnn_fpn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
sample_data_root = 'data/shapes'
data_root = sample_data_root + '/coco/'
metainfo = dict(classes=('disc', 'ring', 'square', 'triangle', 'star'))
norm_cfg = dict(type='BN', requires_grad=True)
channels = 64  # a quarter of the usual: images have 128 x 128 pixels and there are 5 classes
roi_extractor = dict(out_channels=channels, finest_scale=28)  # 56 is for 800 pixels

model = dict(
    backbone=dict(type='RepNeXt', arch='m0', norm_cfg=norm_cfg),
    # From scratch, norms in the neck and in the mask head save a good part of the iterations.
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=channels, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[5], strides=[4, 8, 16, 32]),  # 20 to 160 pixels
    ),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        # One regressor for all classes sees five times the examples of one per class.
        bbox_head=dict(
            in_channels=channels, fc_out_channels=256, num_classes=5, reg_class_agnostic=True
        ),
        mask_roi_extractor=dict(**roi_extractor, roi_layer=dict(output_size=10)),
        mask_head=dict(
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=5,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32), mask_size=20),  # twice the output_size above
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # Shapes have no upright position.
    dict(
        type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']
    ),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0),  # for the meta keys that it sets
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
loader = dict(num_workers=0, persistent_workers=False)  # both cores are for the network
train_dataloader = dict(
    **loader,
    batch_size=4,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    **loader,
    batch_size=4,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 3  # x 246 iterations (982 annotated images / 4)
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-3, fused=True),
    # Adam moves every weight alike, which is too much for layers that sum 3136 inputs.
    paramwise_cfg=dict(custom_keys=dict(shared_fcs=dict(lr_mult=0.3))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=60, by_epoch=False),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        end=max_epochs,
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=20))
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)

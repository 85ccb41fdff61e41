# Shared by semantic_fpn.py and upernet.py.
# The published code meant to freeze the norms but converted them to SyncBN first, so they trained.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],  # ImageNet, RGB
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False, frozen_stages=-1
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

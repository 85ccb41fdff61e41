# 12 epochs x 7330 iterations (117266 annotated images / 16), batch 16 = 8 GPUs x 2 images.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# No gradient clipping, and one weight decay for every layer.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    # 500 iterations: mmengine's last step of a schedule is its iteration end - 1.
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=501, by_epoch=False),
    dict(type='MultiStepLR', milestones=[8, 11], gamma=0.1, begin=0, end=12, by_epoch=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images

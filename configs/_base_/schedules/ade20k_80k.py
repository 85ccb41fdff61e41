# 80k iterations x 16 images = 63 epochs of 20210 images, batch 16 = 8 GPUs x 2 images.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# No gradient clipping, no warm-up, and one weight decay for every layer.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    # (1 - i / 80000) ** 0.9: mmengine's last step of a schedule is its iteration end - 1.
    dict(type='PolyLR', power=0.9, eta_min=1e-6, begin=0, end=80001, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)  # 8 GPUs x 2 images

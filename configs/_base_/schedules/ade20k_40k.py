# 40k iterations x 32 images = 63 epochs of 20210 images, batch 32 = 8 GPUs x 4 images.
# Weight decay and final rate, which InceptionNeXt's paper leaves open: its authors' PoolFormer.
_base_ = './ade20k_80k.py'
train_cfg = dict(max_iters=40000, val_interval=4000)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    # (1 - i / 40000) ** 0.9: mmengine's last step of a schedule is its iteration end - 1.
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=40001, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=32)  # 8 GPUs x 4 images

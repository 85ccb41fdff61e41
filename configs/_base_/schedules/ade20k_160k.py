# 160k iterations x 16 images = 127 epochs of 20210 images, batch 16 = 8 GPUs x 2 images.
# Rate, batch and length are Swin's; so are warm-up, power and weight decay, which InceptionNeXt's
# paper leaves open.
_base_ = './ade20k_80k.py'
train_cfg = dict(max_iters=160000, val_interval=16000)
optim_wrapper = dict(
    optimizer=dict(lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    # 1500 iterations: mmengine's last step of a schedule is its iteration end - 1.
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1501, by_epoch=False),
    # Its counting starts over after the warm-up.
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160001, by_epoch=False),
]

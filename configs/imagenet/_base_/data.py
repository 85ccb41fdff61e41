# ImageNet-1k as folders, data/imagenet/{train,val}/CLASS/*.JPEG, or as train.tar and val.tar.
data_root = 'data/imagenet'

train_transform = dict(
    input_size=224,
    is_training=True,
    auto_augment='rand-m9-mstd0.5-inc1',
    interpolation='bicubic',
    re_prob=0.25,
    re_mode='pixel',
)
# The short side resized to 224 / 0.875 = 256, the middle 224 x 224 of it.
test_transform = dict(input_size=224, interpolation='bicubic', crop_pct=0.875)

# Workers are made anew in each epoch, and seeded from it: a resumed run augments as one that was
# not stopped.
loader = dict(
    num_workers=8,
    persistent_workers=False,
    pin_memory=True,
    worker_init_fn=dict(type='seed_worker'),
    collate_fn=dict(type='default_collate'),
)
train_dataloader = dict(
    **loader,
    batch_size=256,  # x 8 GPUs = 2048
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='TimmDataset', root=data_root + '/train', transform=train_transform),
)
val_dataloader = dict(
    **loader,
    batch_size=256,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='TimmDataset', root=data_root + '/val', transform=test_transform),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='TopK', topk=(1, 5))
test_evaluator = val_evaluator

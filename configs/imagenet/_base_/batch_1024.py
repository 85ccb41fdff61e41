# RepViT's recipe with the batch of distillation, and of all of RecNeXt.
_base_ = './repvit.py'

train_dataloader = dict(batch_size=128)  # x 8 GPUs = 1024
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # 1e-3 x 1024 / 512
auto_scale_lr = dict(base_batch_size=1024)

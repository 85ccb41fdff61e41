_base_ = './_base_/starnet.py'

model = dict(network='repnext_m1', teacher='regnety_160.deit_in1k')
train_dataloader = dict(batch_size=256)  # x 4 GPUs = 1024, at the same learning rate
auto_scale_lr = dict(base_batch_size=1024)

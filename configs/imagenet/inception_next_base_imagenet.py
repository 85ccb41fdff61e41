_base_ = './_base_/metaformer.py'

model = dict(network='inception_next_base', drop_path_rate=0.4)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.95)))
test_dataloader = val_dataloader

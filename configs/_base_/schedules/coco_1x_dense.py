# RetinaNet as PoolFormer trains it (arXiv 2111.11418, section 4.2): AdamW at 1e-4, batch 16, 1x.
_base_ = './coco_1x.py'
optim_wrapper = dict(optimizer=dict(lr=1e-4))

_base_ = './_base_/repvit.py'

model = dict(network='repnext_m5')
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))

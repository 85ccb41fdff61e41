_base_ = './_base_/batch_1024.py'

model = dict(network='repnext_m5', teacher='regnety_160.deit_in1k')
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))

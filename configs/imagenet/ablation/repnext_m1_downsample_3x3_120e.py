_base_ = '../_base_/ablation.py'

model = dict(network='repnext_m1', arch=dict(downsample='3x3'))

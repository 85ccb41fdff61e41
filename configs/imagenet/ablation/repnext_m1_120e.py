_base_ = '../_base_/ablation.py'

model = dict(network='repnext_m1')

_base_ = '../_base_/ablation.py'

model = dict(network='repnext_m1', arch=dict(medium='7x7+5x5+3x3'))

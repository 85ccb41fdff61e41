_base_ = '../_base_/ablation.py'

model = dict(network='repnext_m1', arch=dict(small='serial'))

_base_ = '../_base_/ablation_1024.py'

model = dict(network='recnext_m1', arch=dict(token_mixer=dict(mode='transposed')))

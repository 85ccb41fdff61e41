_base_ = './_base_/starnet.py'

model = dict(network='repnext_m2e')

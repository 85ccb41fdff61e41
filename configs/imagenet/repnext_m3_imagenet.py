_base_ = './_base_/repvit.py'

model = dict(network='repnext_m3')

_base_ = './_base_/batch_1024.py'

model = dict(network='recnext_t', teacher='regnety_160.deit_in1k')

_base_ = './_base_/batch_1024.py'

model = dict(network='recnext_m4', drop_path_rate=0.2)

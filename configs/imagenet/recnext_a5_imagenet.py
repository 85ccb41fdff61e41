_base_ = './_base_/batch_1024.py'

model = dict(network='recnext_a5', drop_path_rate=0.3)

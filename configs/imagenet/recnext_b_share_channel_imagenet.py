_base_ = './_base_/batch_1024.py'

model = dict(network='recnext_b_share_channel', drop_path_rate=0.2)

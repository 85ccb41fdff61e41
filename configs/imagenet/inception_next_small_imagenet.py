_base_ = './_base_/metaformer.py'

model = dict(network='inception_next_small', drop_path_rate=0.3)

_base_ = './_base_/metaformer.py'

model = dict(network='inception_next_tiny', drop_path_rate=0.1)

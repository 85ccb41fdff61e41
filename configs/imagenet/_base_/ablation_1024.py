# RecNeXt's, with its batch.
_base_ = './batch_1024.py'

max_epochs = 120
train_cfg = dict(max_epochs=max_epochs)

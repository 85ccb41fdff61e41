# The ablations of both papers: 120 epochs, without distillation.
_base_ = './repvit.py'

max_epochs = 120
train_cfg = dict(max_epochs=max_epochs)

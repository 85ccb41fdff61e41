_base_ = './runtime.py'
default_scope = 'mmdet'

default_hooks = dict(
    checkpoint=dict(by_epoch=True, interval=1),
    visualization=dict(type='DetVisualizationHook'),
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
# Without a name it takes that of the run: a second run in one process has a visualizer of its own.
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])

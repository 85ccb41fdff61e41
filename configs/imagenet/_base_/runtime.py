_base_ = '../../_base_/runtime.py'
default_scope = 'mmengine'

default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(
        by_epoch=True,
        interval=1,
        save_best='accuracy/top1',
        rule='greater',
        save_param_scheduler=False,  # a hook sets the rate, from the number of the epoch
    ),
)
log_processor = dict(type='LogProcessor', window_size=100, by_epoch=True)
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
randomness = dict(seed=0)

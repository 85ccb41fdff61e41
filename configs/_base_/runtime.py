# Shared by detection and segmentation; mmdet_runtime.py and mmseg_runtime.py add what differs.
custom_imports = dict(imports=['repnext_mm'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # A kill during the write never leaves a half checkpoint under its final name.
    checkpoint=dict(type='AtomicCheckpointHook', max_keep_ckpts=3),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
log_level = 'INFO'
load_from = None
resume = False

_base_ = './schedule_digit_scenes_det.py'

default_hooks = dict(
    checkpoint=dict(save_best='mIoU'), visualization=dict(type='SegVisualizationHook')
)

_base_ = './schedule_demo_det.py'

default_hooks = dict(visualization=dict(type='SegVisualizationHook'))

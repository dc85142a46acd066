_base_ = './default_runtime_det.py'

default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer')

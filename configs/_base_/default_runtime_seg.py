_base_ = './default_runtime_det.py'

default_scope = 'mmseg'
env_cfg = dict(cudnn_benchmark=True)
visualizer = dict(type='SegLocalVisualizer')
tta_model = dict(type='SegTTAModel')

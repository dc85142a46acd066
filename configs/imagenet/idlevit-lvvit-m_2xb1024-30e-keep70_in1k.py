_base_ = './idlevit-lvvit-s_2xb1024-30e-keep70_in1k.py'

load_from = 'checkpoints/lvvit-m_in1k.pth'
model = dict(
    backbone=dict(arch='lvvit-medium', keep_ratios=dict(type='5+5+5')),
    head=dict(in_channels=512),
)

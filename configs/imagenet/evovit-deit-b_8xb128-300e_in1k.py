_base_ = './evovit-deit-s_8xb128-300e_in1k.py'

model = dict(backbone=dict(arch='deit-base'), head=dict(in_channels=768))

_base_ = './classifier_deit-s.py'

model = dict(backbone=dict(arch='deit-tiny'), head=dict(in_channels=192))

_base_ = './classifier_lvvit-s.py'

model = dict(backbone=dict(arch='lvvit-medium'), head=dict(in_channels=512))

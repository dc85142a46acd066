_base_ = './classifier_deit-s.py'

model = dict(backbone=dict(arch='lvvit-small'), head=dict(type='LVViTClsHead'))

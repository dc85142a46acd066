_base_ = '../retinanet_idle-swin_finetune_digits.py'

# The scorer begins as a fixed one and learns what to change.
learned = dict(_delete_=True, type='learned', learns_from='importance', begins_as='mean_distance')
model = dict(backbone=dict(keep_ratios=0.63, policy=dict(scorer=learned)))

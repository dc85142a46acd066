# SegFormer of ADE20K's size; the config names the backbone and its channels.
_base_ = './segmentor.py'

model = dict(decode_head=dict(type='SegformerHead', channels=256))

_base_ = './cascade-mask-rcnn_idle-swin-t_fpn_amp-ms-crop-3x-keep70_coco.py'

load_from = 'work_dirs/cascade-mask-rcnn_idle-swin-s_fpn_amp-ms-crop-3x-dense_coco/epoch_36.pth'
model = dict(backbone=dict(depths=[2, 2, 18, 2]))

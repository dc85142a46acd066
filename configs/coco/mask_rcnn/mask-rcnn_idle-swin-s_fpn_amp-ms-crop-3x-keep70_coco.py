_base_ = './mask-rcnn_idle-swin-t_fpn_amp-ms-crop-3x-keep70_coco.py'

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth'
model = dict(backbone=dict(depths=[2, 2, 18, 2]))

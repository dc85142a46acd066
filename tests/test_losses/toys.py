"""Small models for the losses: a toy, a detector, a segmentor, and what trains them."""

import uuid

import torch
from backbone_zoo import BY_NAME, image, randomize
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn
from torch.utils.data import Dataset

# Backbones deep enough that a class of heads with four inputs is not needed.
SMALL = dict(drop_path_rate=0.0)


class ToyModel(BaseModel):
    """A backbone, and a loss that is a mean over images."""

    def __init__(self, variant='swin', keep_ratios=0.5, seed=0, double=False, **kwargs):
        super().__init__()
        self.backbone = BY_NAME[variant].build(keep_ratios=keep_ratios, **SMALL, **kwargs)
        channels = self.backbone(image((1, 3, 45, 58)))[0].shape[1]
        self.head = ToyHead(channels)
        randomize(self, seed)
        if double:
            self.double()

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.head.forward(self.extract_feat(inputs))

    def loss(self, inputs, data_samples=None):
        features = self.extract_feat(inputs)
        rest = sum(part.square().mean() for part in features[1:])
        return dict(loss_toy=self.head.forward(features).square().mean() + rest)


class ToyHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, features):
        return self.conv(features[0])


class Images(Dataset):
    metainfo = dict(classes=('a',))

    def __init__(self, count=4, size=(45, 58)):
        self.images = image((count, 3, *size))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index])


def checkpoint_of(model, path):
    """Write a model's weights as a checkpoint of a training run."""
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), path)
    return str(path)


def all_losses(checkpoint, head='head', **teacher):
    """Configs of every loss."""
    teacher = dict(checkpoint=checkpoint, **teacher)
    return [
        dict(type='TokenCutLoss'),
        dict(type='FeatureDistillation', teacher=teacher),
        dict(type='LogitDistillation', teacher=teacher, modules=(head,), temperature=2.0),
    ]


def runner_settings(work_dir, model, losses, **changes):
    settings = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Images(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=[dict(type='AuxiliaryLossHook', losses=losses)],
        log_level='WARNING',
        experiment_name=uuid.uuid4().hex,
    )
    settings.update(changes)
    return settings


def real_model(library, keep_ratios=0.5, **backbone):
    """A RetinaNet or a two-stage detector of mmdet, or an encoder-decoder of mmseg."""
    config = dict(retinanet=_retinanet, faster_rcnn=_faster_rcnn, segmentor=_segmentor)[library]()
    config['backbone'] = BY_NAME['swin'].config(keep_ratios=keep_ratios, **SMALL, **backbone)
    return MODELS.build(ConfigDict(config))


def _anchors(strides):
    return dict(type='mmdet.AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=list(strides))


_NECK = dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=2)
_CODER = dict(type='mmdet.DeltaXYWHBBoxCoder')
_ASSIGNER = dict(
    type='mmdet.MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1
)


def _retinanet():
    return dict(
        type='mmdet.RetinaNet',
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
        neck=_NECK,
        bbox_head=dict(
            type='mmdet.RetinaHead',
            num_classes=3,
            in_channels=8,
            stacked_convs=1,
            feat_channels=8,
            anchor_generator=_anchors((4, 8)),
            bbox_coder=_CODER,
            loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='mmdet.L1Loss'),
        ),
        train_cfg=dict(
            assigner=_ASSIGNER,
            sampler=dict(type='mmdet.PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=10, score_thr=0.0, max_per_img=5, nms=dict(type='nms', iou_threshold=0.5)
        ),
    )


def _faster_rcnn():
    sampler = dict(
        type='mmdet.RandomSampler', num=8, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True
    )
    assigner = dict(_ASSIGNER, match_low_quality=True)
    nms = dict(type='nms', iou_threshold=0.7)
    return dict(
        type='mmdet.FasterRCNN',
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
        neck=_NECK,
        rpn_head=dict(
            type='mmdet.RPNHead',
            in_channels=8,
            feat_channels=8,
            anchor_generator=_anchors((4, 8)),
            bbox_coder=_CODER,
            loss_cls=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='mmdet.L1Loss'),
        ),
        roi_head=dict(
            type='mmdet.StandardRoIHead',
            bbox_roi_extractor=dict(
                type='mmdet.SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=3),
                out_channels=8,
                featmap_strides=[4, 8],
            ),
            bbox_head=dict(
                type='mmdet.Shared2FCBBoxHead',
                in_channels=8,
                fc_out_channels=8,
                roi_feat_size=3,
                num_classes=3,
                bbox_coder=_CODER,
                loss_cls=dict(type='mmdet.CrossEntropyLoss'),
                loss_bbox=dict(type='mmdet.L1Loss'),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1, debug=False
            ),
            rpn_proposal=dict(nms_pre=20, max_per_img=10, nms=nms, min_bbox_size=0),
            rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=20, max_per_img=5, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.0, nms=nms, max_per_img=5),
        ),
    )


def _segmentor():
    return dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(45, 58)),
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=16,
            in_index=1,
            channels=8,
            num_convs=1,
            num_classes=5,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='mmseg.CrossEntropyLoss', avg_non_ignore=True),
        ),
        test_cfg=dict(mode='whole'),
    )


def real_batch(library, count=2, size=(45, 58)):
    """Raw images and labels as a data loader gives them."""
    images = [part * 50 + 100 for part in image((count, 3, *size))]
    return dict(inputs=images, data_samples=[_sample(library, size) for _ in images])


def _sample(library, size):
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    if library == 'segmentor':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=torch.arange(size[0] * size[1]).view(1, *size) % 5)
        return sample
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    sample = DetDataSample(metainfo=meta)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [30.0, 10.0, 44.0, 40.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.tensor([]).long())
    return sample

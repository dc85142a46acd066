"""What mmengine and mmseg get wrong works."""

import pytest
import torch
from backbone_zoo import BY_NAME, assert_same_gradients, gradients, image
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from policy_cases import Case
from toy import ToyModel, toy_runner

losses = pytest.importorskip('mmseg.models.losses')

WEIGHTS = [1.0, 2.0, 4.0]


class Segmenting(ToyModel):
    def __init__(self):
        super().__init__()
        self.loss_decode = losses.CrossEntropyLoss(class_weight=WEIGHTS)


@pytest.mark.parametrize('labels', [[0, 1, 2, 0], [0, 255, 2, 255], [255] * 4, [0] * 4])
def test_ignored_pixels_have_no_class_weight(tmp_path, labels):
    model = toy_runner(tmp_path, model=Segmenting()).model
    scores, labels = torch.randn(1, 3, 2, 2), torch.tensor(labels).reshape(1, 2, 2)
    loss = model.loss_decode(scores, labels, ignore_index=255)
    expected = torch.nn.functional.cross_entropy(
        scores, labels, torch.tensor(WEIGHTS), ignore_index=255
    )
    torch.testing.assert_close(loss, expected.nan_to_num(0.0))


def test_losses_of_mmdet_stay_as_they_are(tmp_path):
    mmdet = pytest.importorskip('mmdet.models.losses')
    model = ToyModel()
    model.loss_cls = mmdet.CrossEntropyLoss(class_weight=WEIGHTS)
    before = model.loss_cls.cls_criterion
    assert toy_runner(tmp_path, model=model).model.loss_cls.cls_criterion is before


@pytest.mark.parametrize(
    ('name', 'parts', 'policy'),
    [
        ('vit', ['layers.0', 'layers.1', 'layers.2'], dict(type='EViT')),
        ('pvtv2', ['layers.1.1.0', 'layers.1.1.1'], dict(type='EvoViT', rank_at='stage')),
        ('swin', ['stages.0', 'stages.1'], dict(across_stages=True, alpha='learned')),
    ],
)
def test_recomputed_parts_have_the_same_gradients(name, parts, policy):
    """What blocks and stages hand on reaches them again, with its gradient."""
    model = Case(name, BY_NAME[name], dict(type='EvoViT') | policy).build(drop_path_rate=0.0)
    x = image((2, 3, 45, 58), dtype=torch.float64)
    _, expected = gradients(model.double(), x)
    turn_on_activation_checkpointing(model, parts)
    assert_same_gradients(gradients(model, x)[1], expected, 1e-10)

"""Losses as the releases compute them: distilled tokens, every second cut, assisted class token."""

import math

import pytest
import torch
from backbone_zoo import image
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from toys import ToyModel, checkpoint_of

from idlevit_mm.errors import SettingError
from idlevit_mm.hooks import add_losses
from idlevit_mm.losses import AssistedLoss, FeatureDistillation, TokenCutLoss, build_losses
from idlevit_mm.losses.token_cut import kept_shares, token_cut

F64 = torch.float64
IMAGES = image((3, 3, 45, 58), dtype=F64)


def model_of(variant='vit', **kwargs):
    return ToyModel(variant, double=True, **{'keep_ratios': 0.5, **kwargs})


def last_tokens(model, x):
    """Tokens after the last norm, (B, T, C), class token behind the map where there is one."""
    seen = []
    handle = model.backbone.ln1.register_forward_hook(lambda *a: seen.append(a[-1]))
    model.backbone(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ('tokens', 'variant'),
    [
        ('class', 'vit'),
        ('class', 'vit-registers'),
        *(('kept', variant) for variant in ('vit', 'vit-registers', 'vit-no-cls', 'swin')),
    ],
)
def test_distilled_tokens(tokens, variant, tmp_path):
    """The release's mean square errors by loops, times what they are averaged over beyond ours."""
    teacher = model_of(variant, seed=1)
    path = checkpoint_of(teacher, tmp_path / 'teacher.pth')
    teacher.backbone.set_keep_ratios(1.0)
    student = model_of(variant)
    loss = FeatureDistillation(dict(checkpoint=path), tokens=tokens)
    add_losses(student, [loss])
    got = student.loss(IMAGES)['loss_distill_feature'].item()
    both = []
    for model in (student, teacher):
        if variant == 'swin':
            both.append(model.backbone(IMAGES)[-1].flatten(2).transpose(1, 2))
        else:
            both.append(last_tokens(model, IMAGES))
    total, both = 0.0, [part.detach() for part in both]
    own, other = both
    mask = student.backbone.keep_masks[-1][-1].flatten(1)
    batch, count, channels = own.shape
    for b in range(batch):
        if tokens == 'class':
            one, two = (part[b, mask.shape[1]] for part in (own, other))
            lengths = [math.sqrt(sum(float(v) ** 2 for v in part)) for part in (one, two)]
            for c in range(channels):
                total += float(one[c] / lengths[0] - two[c] / lengths[1]) ** 2
            continue
        kept = [t for t in range(count) if t >= mask.shape[1] or mask[b, t]]
        for c in range(channels):
            lengths = [math.sqrt(sum(float(part[b, t, c]) ** 2 for t in kept)) for part in both]
            for t in kept:
                total += float(own[b, t, c] / lengths[0] - other[b, t, c] / lengths[1]) ** 2
    averaged = batch if tokens == 'class' else batch * channels
    assert got == pytest.approx(2.5 * total / averaged, rel=1e-10)


@pytest.mark.parametrize('blocks', [1, 2, 3, 4])
def test_every_second_cut(blocks):
    """A list that loses its first elements while it is gone through, divided by its length."""
    ratios = [1.0] + [0.6] * blocks
    model = model_of(keep_ratios=ratios, num_layers=1 + blocks, out_indices=(0,)).backbone.train()
    model.record_inputs = True
    model(IMAGES)
    cuts = [token_cut(share, mask, 'both') for share, mask in kept_shares(model)]
    assert len(cuts) == blocks
    rest, total = list(range(blocks)), 0.0
    for index, _ in enumerate(rest):
        total += float(cuts[rest[index]])
        if index < len(rest) - 1:
            del rest[index]
    loss = TokenCutLoss(loss_weight=20.0, weighting='published').of_backbones([model])
    assert loss.item() == pytest.approx(20.0 * total / blocks)
    plain = TokenCutLoss(loss_weight=20.0).of_backbones([model])
    assert plain.item() == pytest.approx(20.0 * sum(map(float, cuts)) / blocks)


def samples(kind):
    """What is in three images of five classes; 255 is nothing."""
    found = [[0, 3, 3], [], [4, 1]]
    if kind == 'boxes':
        made = [dict(gt_instances=InstanceData(labels=torch.tensor(f).long())) for f in found]
    else:
        made = [
            dict(gt_sem_seg=PixelData(data=torch.tensor([*f, *[255] * (4 - len(f))]).view(1, 2, 2)))
            for f in found
        ]
    return found, [BaseDataElement(**one) for one in made]


@pytest.mark.parametrize(('kind', 'variant'), [('boxes', 'vit'), ('pixels', 'vit-registers')])
def test_assisted(kind, variant):
    """Half by the mean token, normalised after, and half by the class token, with its own norm."""
    policy = dict(type='EvoViT', assist=5)
    model = model_of(variant, keep_ratios=[1.0, 0.6, 0.5], policy=policy)
    found, given = samples(kind)
    add_losses(model, build_losses([dict(type='AssistedLoss', loss_weight=2.0)]))
    losses = model.loss(IMAGES, given)
    inputs = []
    handle = model.backbone.ln1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.backbone(IMAGES)
    handle.remove()
    heads, norm = model.backbone.layers[-1].policy.heads, model.backbone.ln1
    total = 0.0
    for tokens, classes in zip(inputs[0], found, strict=True):
        count = model.backbone.keep_masks[0][0][0].numel()
        mean = norm(sum(tokens[:count]) / count)
        for logits in (heads.of_mean(mean), heads.of_class(heads.norm(tokens[count]))):
            for k, logit in enumerate(logits.tolist()):
                p = 1 / (1 + math.exp(-logit))
                total -= 0.5 * math.log(p if k in classes else 1 - p)
    assert losses['loss_assisted'].item() == pytest.approx(2.0 * total / 15)
    losses['loss_assisted'].backward()
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters())
    assert model.backbone.cls_token.grad.abs().sum() > 0
    others = [layer.policy.heads for layer in model.backbone.layers[:-1]]
    assert others == [None, None]


WRONG = {
    'no heads': (dict(), AssistedLoss, 'needs classifiers, which backbone has not.*assist='),
    'no class token': (dict(variant='swin'), AssistedLoss, 'AssistedLoss needs the class token'),
    'no norm': (dict(final_norm=False), AssistedLoss, 'final_norm=True'),
    'no last block': (dict(out_indices=(0,)), AssistedLoss, 'the last block'),
    'class of a pyramid': (
        dict(variant='pvt'),
        lambda: FeatureDistillation(dict(checkpoint=__file__), tokens='class'),
        "tokens='class' needs the class token",
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_models_without(name):
    settings, loss, message = WRONG[name]
    with pytest.raises(SettingError, match=message):
        add_losses(model_of(**settings), [loss()])


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: FeatureDistillation(tokens='all'), "tokens='all' is unknown; allowed: map, class"),
        (
            lambda: FeatureDistillation(tokens='kept', stages=[0]),
            r"stages=\[0\] is for tokens='map",
        ),
        (lambda: TokenCutLoss(weighting='sum'), "weighting='sum' is unknown; allowed: mean, publ"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""What each family states about itself: dense twins, names of weights, position tables."""

import pytest
import torch
from backbone_zoo import (
    FAMILIES,
    VARIANTS,
    assert_all_close,
    image,
    parametrize,
    randomize,
)
from mmengine.registry import MODELS

from idlevit_mm.analysis.models import host_backbone
from idlevit_mm.backbones import IdleBackbone, IdleSwinTransformer
from idlevit_mm.converters import OPENMMLAB, Format, all_formats, detect
from idlevit_mm.engine.swap import twins
from idlevit_mm.registry import idle_backbones

# A promise to users: what their configs name is converted to these.
TWINS = {
    ('mmdet', 'SwinTransformer'): 'IdleSwinTransformer',
    ('mmseg', 'SwinTransformer'): 'IdleSwinTransformer',
    ('mmdet', 'PyramidVisionTransformer'): 'IdlePyramidVisionTransformer',
    ('mmdet', 'PyramidVisionTransformerV2'): 'IdlePyramidVisionTransformerV2',
    ('mmseg', 'MixVisionTransformer'): 'IdleMixVisionTransformer',
    ('mmseg', 'PCPVT'): 'IdlePCPVT',
    ('mmseg', 'SVT'): 'IdleSVT',
    ('mmseg', 'VisionTransformer'): 'IdleVisionTransformer',
    ('mmpretrain', 'ViTSAM'): 'IdleViTDet',
    ('mmdet', 'ViT'): 'IdleViTDet',
    ('mmpretrain', 'SwinTransformerV2'): 'IdleSwinTransformerV2',
    ('mmpretrain', 'VisionTransformer'): 'IdleVisionTransformer',
}
CLASSES = idle_backbones()


def each_class():
    return pytest.mark.parametrize('cls', CLASSES, ids=lambda cls: cls.__name__)


def test_every_family_is_tested():
    assert {cls.__name__ for cls in CLASSES} == {variant.type for variant in FAMILIES}
    assert all(issubclass(cls, IdleBackbone) for cls in CLASSES)
    assert twins() == TWINS


@each_class()
def test_names_of_openmmlab_come_first(cls):
    names = [known.name for known in cls.FORMATS]
    assert names[0] == OPENMMLAB
    assert len(set(names)) == len(names)
    for known in cls.FORMATS:
        assert isinstance(known, Format)
        assert known.family == cls.family
        assert known.is_foreign == (known.name != OPENMMLAB)
        assert known in all_formats()


def test_weights_are_told_by_the_first_format(subtests):
    for variant in VARIANTS:
        with subtests.test(variant.name):
            state = randomize(variant.build()).state_dict()
            found = detect(state)
            assert found is MODELS.get(variant.type).FORMATS[0]
            assert found.decode(state).state is state


def test_the_dense_class_is_the_backbone_at_1(subtests):
    for variant in VARIANTS:
        if variant.has_twin or variant.name == 'vit-no-cls':
            with subtests.test(variant.name):
                assert_dense_class_equals(variant.config())


def assert_dense_class_equals(cfg):
    model = randomize(MODELS.build(cfg)).eval()
    pytest.importorskip(model.DENSE[0][0])
    dense = host_backbone(model, cfg)
    assert type(dense).__name__ == model.DENSE[0][1]
    assert type(dense).__module__.startswith(f'{model.DENSE[0][0]}.')
    x = image((2, 3, 64, 80))
    with torch.no_grad():
        ours, theirs = model(x), dense(x)
    assert len(ours) == len(theirs)
    assert_all_close(ours, theirs, 1e-5)


@parametrize()
def test_tables_fit_weights_with_and_without_a_backbone(variant):
    """A backbone fits what it loads; the tool fits the same weights without building one."""
    cls, sides = MODELS.get(variant.type), (64, 96)
    overrides = dict(use_abs_pos_embed=True) if cls.family == 'swin' else {}
    state = dict(randomize(variant.build(**overrides)).state_dict())
    shapes = cls.table_shapes(state, sides)
    assert set(shapes) == {key for key in state if key.endswith('pos_embed')}
    window_size = 5 if cls.family == 'swin' else None
    # Only tables of square images can be told.
    for key, (height, width) in cls.table_shapes(state, (64, 64)).items():
        first = int('cls_token' in state)
        places = (height, width) if state[key].dim() == 4 else (first + height * width,)
        state[key] = torch.randn(1, *places, state[key].shape[-1])
    bare = cls.fit_tables(state, shapes, window_size, False)
    if shapes:
        overrides['img_size' if cls.family == 'vit' else 'pretrain_img_size'] = sides
    if window_size:
        overrides['window_size'] = window_size
    built = variant.build(**overrides)._fit_tables(state, False)
    assert bare.resized == built.resized
    assert len(bare.resized) == len(shapes) + (4 if window_size else 0)
    assert bare.state.keys() == built.state.keys()
    for key, value in built.state.items():
        assert torch.equal(bare.state[key], value), key


def test_heirs_do_not_take_the_place_of_their_family():
    class Heir(IdleSwinTransformer):
        """A user's own."""

    MODELS.register_module(module=Heir)
    try:
        assert Heir in idle_backbones()
        assert twins() == TWINS
        assert len(all_formats()) == len({id(known) for known in all_formats()})
    finally:
        del MODELS.module_dict['Heir']

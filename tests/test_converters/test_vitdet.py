"""Weights of ViTDet: files of detectron2, MAE, SAM and timm, and features like timm's."""

import pytest
import torch
from backbone_zoo import BY_NAME, assert_close, image, randomize

from idlevit_mm.converters import convert_weights, detect
from idlevit_mm.errors import SettingError

# An absolute table of a square image, which the place of a class token can be told from.
SQUARE = dict(pretrain_img_size=32)


def state_of(**kwargs):
    return randomize(BY_NAME['vitdet'].build(**SQUARE, **kwargs), 5).state_dict()


def loaded(state, tmp_path, **kwargs):
    torch.save(dict(model=state), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model = BY_NAME['vitdet'].build(convert_weights=True, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model.eval()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize('prefix', ['', 'net.'])
def test_detectron2_there_and_back(prefix):
    state = state_of()
    foreign = convert_weights(state, 'detectron2').weights
    assert foreign['pos_embed'].shape == (1, 1 + 64, 8)
    assert not foreign['pos_embed'][:, 0].any()
    foreign = {f'{prefix}{key}': value for key, value in foreign.items()}
    assert (detect(foreign).family, detect(foreign).name) == ('vitdet', 'detectron2')
    assert_same(convert_weights(foreign, 'mmdet').weights, state)
    foreign[f'{prefix}pos_embed'] = torch.zeros(1, 67, 8)
    with pytest.raises(SettingError, match='pos_embed has 67 places; allowed: a square number'):
        convert_weights(foreign, 'mmdet')


def test_pre_training_has_no_relative_tables(tmp_path):
    """MAE's file has timm's names: only the backbone that is to load it can tell."""
    state = state_of(use_rel_pos=False)
    file = convert_weights(state, 'detectron2').weights
    more = dict(cls_token=torch.ones(1, 1, 8), mask_token=torch.ones(1, 1, 8))
    more |= {'norm.weight': torch.ones(8), 'decoder_embed.weight': torch.ones(8, 8)}
    model = loaded(file | more, tmp_path, **SQUARE)
    new = model.state_dict()
    tables = {key for key in new if '.rel_pos_' in key}
    assert len(tables) == 6
    assert not any(new[key].any() for key in tables)
    assert_same({key: value for key, value in new.items() if key not in tables}, state)


def test_release_of_sam_and_other_sizes(tmp_path):
    """Its encoder is taken from the whole model; tables are resized as by mmpretrain's class."""
    state = state_of(out_channels=6)
    release = convert_weights(state, 'official').weights
    release = {f'image_encoder.{key}': value for key, value in release.items()}
    model = loaded(
        release | {'prompt_encoder.x': torch.ones(1)},
        tmp_path,
        out_channels=6,
        img_size=(20, 44),
        window_size=5,
    )
    twin = BY_NAME['vitdet'].build_twin(out_channels=6, img_size=(20, 44), window_size=5)
    twin.load_state_dict(state, strict=True)  # which its hooks resize
    want = twin.state_dict()
    assert model.state_dict().keys() == want.keys()
    for key, value in model.state_dict().items():
        assert_close(value, want[key], 1e-6, key)


@pytest.mark.parametrize(('dtype', 'tol'), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_features_as_timm(dtype, tol, tmp_path):
    sam = pytest.importorskip('timm.models.vision_transformer_sam')

    sizes = dict(img_size=52, patch_size=4, embed_dim=8, depth=3, num_heads=2, mlp_ratio=2)
    windows = dict(window_size=3, global_attn_indexes=(2,), use_rel_pos=True, neck_chans=6)
    theirs = randomize(sam.VisionTransformerSAM(num_classes=0, **sizes, **windows)).eval()
    for module in theirs.modules():
        # Its class has 1e-5, SAM and ViTDet have 1e-6.
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    ours = loaded(theirs.state_dict(), tmp_path, out_channels=6, img_size=52)
    x = image((2, 3, 52, 52), dtype=dtype)
    with torch.no_grad():
        assert_close(ours.to(dtype)(x)[1], theirs.to(dtype).forward_features(x), tol)

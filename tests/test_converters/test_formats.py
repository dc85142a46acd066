"""Every family in every format: there and back, against the projects' own code, same features."""

import itertools
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    VARIANTS,
    assert_all_close,
    image,
    parametrize,
    randomize,
)
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from idlevit_mm.checkpoints import FOLLOWING
from idlevit_mm.converters import (
    all_formats,
    convert_file,
    convert_weights,
    detect,
    format_of,
)
from idlevit_mm.errors import SettingError

timm = pytest.importorskip('timm')

FOREIGN = ('timm', 'official', 'evovit', 'mmpretrain', 'dinov2', 'huggingface')
# What a format has no place for, by family and format; nothing else may be lost.
_NORMS, _BUFFERS = r'norm\d+\.(weight|bias)', rf'.*({"|".join(map(re.escape, FOLLOWING))})'
NO_PLACE = {
    ('swin', 'timm'): _NORMS,
    ('swinv2', 'timm'): f'{_NORMS}|{_BUFFERS}',
    ('swinv2', 'official'): _BUFFERS,
    ('twins', 'timm'): r'norm_list\.\d\.(weight|bias)',
}
# Architectures that a project has not.
REFUSED = {
    'timm': {'pvt', 'pvt-no-abs', 'pvt-conv-norm', 'vit-conv-stem', 'swinv2-norm3'},
    'official': {'vit-scaled', 'vit-registers', 'swinv2-norm3'},
    'mmpretrain': {'vit-conv-stem', 'vit-registers'},
    'evovit': {'vit-conv-stem', 'vit-scaled', 'vit-registers'},
    'dinov2': {'vit-conv-stem'},
    'huggingface': {'vit-conv-stem', 'vit-3-heads'},  # which has a norm of patches
}


def formats_of(variant):
    """The foreign formats of its family that have a place for all of a variant."""
    known = {(one.family, one.name) for one in all_formats()}
    return [
        name
        for name in FOREIGN
        if (family_of(variant), name) in known and variant.name not in REFUSED.get(name, ())
    ]


def family_of(variant):
    return MODELS.get(variant.type).family


def build(variant, **overrides):
    return randomize(variant.build(**overrides), 5)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def without(state, pattern):
    return {key: value for key, value in state.items() if not re.fullmatch(pattern, key)}


# --- there and back --------------------------------------------------------------------------


@parametrize(VARIANTS)
def test_there_and_back(variant, subtests):
    for name in formats_of(variant):
        with subtests.test(name):
            assert_there_and_back(variant, name)


def assert_there_and_back(variant, name):
    state = build(variant).state_dict()
    family = detect(state).family
    known = format_of(family, name)
    before = {key: value.clone() for key, value in state.items()}
    foreign = known.encode(state)
    assert_same(state, before)  # the input is left alone
    found = detect(foreign.state)
    assert found.is_foreign
    # DeiT's releases have timm's names, and so has Twins's without norms of the outputs.
    is_timms = name == 'official' and variant.name in ('pcpvt', 'svt-odd')
    is_timms |= family == 'vit' and name == 'official' and variant.name != 'vit-conv-stem'
    assert (found.family, found.name) == (family, 'timm' if is_timms else name)
    no_place = NO_PLACE.get((family, name), r'(?!)')
    gone = [key for key in state if re.fullmatch(no_place, key) and not key.endswith(FOLLOWING)]
    assert sorted(foreign.dropped) == sorted(gone)
    back = found.decode(foreign.state)
    assert_same(back.state, without(state, no_place))
    # What is dropped on the way back was added on the way there.
    assert all(key in foreign.added for key in back.dropped)
    again = known.encode(back.state)
    assert_same(again.state, foreign.state)


def test_what_a_project_has_not_is_refused(subtests):
    for target, name in itertools.product(REFUSED, set().union(*REFUSED.values())):
        if name not in REFUSED[target] and (target == 'official' or not name.startswith('pvt')):
            continue
        with (
            subtests.test(f'{name} to {target}'),
            pytest.raises(SettingError, match='have no counterpart in|names are not known for pvt'),
        ):
            convert_weights(build(BY_NAME[name]).state_dict(), target)


def test_weights_of_policies_stay_behind():
    state = build(BY_NAME['swin'], policy=dict(scorer='learned')).state_dict()
    policies = [key for key in state if '.policy.' in key]
    assert policies
    for target in ('timm', 'official'):
        converted = convert_weights(state, target)
        assert set(policies) <= set(converted.report.dropped)
        assert not any('policy' in key for key in converted.weights)
    assert set(policies) <= convert_weights(state, 'mmseg').weights.keys()


@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('swin', 'layers.0.blocks.0.attn.logit_scale'),
        ('swinv2', 'layers.0.blocks.0.norm3.weight'),
        ('mit', 'block1.0.attn.gamma'),
        ('vit', 'blocks.0.attn.q_norm.weight'),
    ],
)
def test_weights_without_counterpart_are_named(name, key):
    foreign = convert_weights(build(BY_NAME[name]).state_dict(), 'official').weights
    with pytest.raises(SettingError, match=re.escape(key)) as error:
        convert_weights({**foreign, key: torch.ones(1)}, 'mmdet')
    assert '\n' not in str(error.value)
    with pytest.raises(SettingError, match=r'of no known format: its keys begin with fc\.bias'):
        convert_weights({'fc.bias': torch.ones(1)}, 'mmdet')


def test_half_of_query_and_key_value_is_refused():
    foreign = convert_weights(build(BY_NAME['mit']).state_dict(), 'official').weights
    del foreign['block2.1.attn.kv.bias']
    with pytest.raises(SettingError, match=r'without the other, such as block2\.1\.attn\.q\.bias'):
        convert_weights(foreign, 'mmseg')


# --- the projects' own converters ------------------------------------------------------------


def mmseg_tool(name, function):
    mmseg = pytest.importorskip('mmseg')
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'model_converters' / f'{name}.py'
    return runpy.run_path(str(tool))[function]


def mmdet_swin(state):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    return {key.removeprefix('backbone.'): v for key, v in swin.swin_converter(state).items()}


def mmdet_pvt(state):
    return pytest.importorskip('mmdet.models.backbones.pvt').pvt_convert(state)


def mmseg_twins(name, state):
    return mmseg_tool('twins2mmseg', 'convert_twins')(SimpleNamespace(model=name), state)


REFERENCES = {
    'mmdet-swin': ('swin', mmdet_swin),
    'mmseg-swin': ('swin', lambda state: mmseg_tool('swin2mmseg', 'convert_swin')(state)),
    'mmdet-pvt': ('pvt', mmdet_pvt),
    'mmdet-pvt-no-abs': ('pvt-no-abs', mmdet_pvt),
    'mmdet-pvtv2': ('pvtv2', mmdet_pvt),
    'mmseg-mit': ('mit', lambda state: mmseg_tool('mit2mmseg', 'convert_mit')(state)),
    'mmseg-pcpvt': ('pcpvt', lambda state: mmseg_twins('pcpvt', state)),
    'mmseg-svt': ('svt', lambda state: mmseg_twins('svt', state)),
    'mmseg-vit': ('vit', lambda state: mmseg_tool('vit2mmseg', 'convert_vit')(state)),
}


@pytest.mark.parametrize('reference', REFERENCES)
def test_same_as_the_converters_of_mmdet_and_mmseg(reference):
    name, theirs = REFERENCES[reference]
    state = build(BY_NAME[name]).state_dict()
    released = convert_weights(state, 'official').weights
    released |= {'head.weight': torch.ones(3, 3), 'head.bias': torch.ones(3)}
    converted = convert_weights(released, 'mmseg')
    assert {'head.weight', 'head.bias'} <= set(converted.report.dropped)
    assert_same(theirs(released), converted.weights)


# timm's factories fix patch size and widths; sizes are set as far as they let us.
TIMM_SWIN = dict(img_size=64, window_size=4, embed_dim=8, depths=(2, 3), num_heads=(2, 4))
TIMM_PVT = dict(
    depths=(1, 2, 1, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4), sr_ratios=(2, 1, 2, 1)
)
OUR_SWIN = dict(
    type='IdleSwinTransformer',
    window_size=4,
    embed_dims=8,
    depths=(2, 3),
    num_heads=(2, 4),
    strides=(4, 2),
    out_indices=(0, 1),
)
OUR_SWIN2 = dict(
    type='IdleSwinTransformerV2',
    window_size=4,
    arch=dict(embed_dims=8, depths=(2, 3), num_heads=(2, 4), extra_norm_every_n_blocks=0),
    out_indices=(0, 1),
)
OUR_PVT = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=8,
    num_layers=[1, 2, 1, 1],
    num_heads=[1, 2, 2, 4],
    sr_ratios=[2, 1, 2, 1],
    mlp_ratios=[8, 8, 4, 4],
)


def timm_swin():
    from timm.models.swin_transformer import SwinTransformer

    return randomize(SwinTransformer(num_classes=5, **TIMM_SWIN)).eval()


def timm_swin2():
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return randomize(SwinTransformerV2(num_classes=5, **TIMM_SWIN)).eval()


def timm_pvt():
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    return randomize(PyramidVisionTransformerV2(num_classes=5, **TIMM_PVT)).eval()


# In the second stage one row of windows is padded, at the bottom alone: mmseg's mask hides nothing.
TWINS = dict(depths=(3, 2), num_heads=(1, 2), mlp_ratios=(2, 3), sr_ratios=(2, 1))
WINDOWS = {'pcpvt': None, 'svt': (4, 3)}


def timm_twins(name):
    from timm.models.twins import Twins

    options = dict(TWINS, embed_dims=(8, 16), wss=WINDOWS[name])
    return randomize(Twins(num_classes=5, **options)).eval()


def our_twins(name):
    return dict(
        TWINS,
        type='IdlePCPVT' if name == 'pcpvt' else 'IdleSVT',
        embed_dims=[8, 16],
        qkv_bias=True,
        norm_after_stage=False,
        **(dict(windiow_sizes=WINDOWS[name]) if WINDOWS[name] else {}),
    )


TIMM = {
    'swin': (timm_swin, OUR_SWIN),
    'swinv2': (timm_swin2, OUR_SWIN2),
    'pvtv2': (timm_pvt, OUR_PVT),
    **{name: (partial(timm_twins, name), our_twins(name)) for name in WINDOWS},
}


@pytest.mark.parametrize('name', ['swin', 'pvtv2'])
def test_same_as_the_filters_of_timm(name):
    """timm reads the releases' files as well: the two ways to its names must meet."""
    from timm.models import pvt_v2, swin_transformer, swin_transformer_v2

    filters = dict(swin=swin_transformer, swinv2=swin_transformer_v2, pvtv2=pvt_v2)
    model = TIMM[name][0]()
    ours = convert_weights(model.state_dict(), 'mmdet').weights
    released = convert_weights(ours, 'official').weights
    theirs = filters[name].checkpoint_filter_fn(released, model)
    own = without(model.state_dict(), r'head\..*|norm\.(weight|bias)')
    assert_same(theirs, own)
    assert_same(convert_weights(ours, 'timm').weights, own)


# --- features --------------------------------------------------------------------------------


def timm_maps(model, x):
    """Maps of each stage, before any norm of Swin."""
    with torch.no_grad():
        if hasattr(model, 'stages'):
            x = model.patch_embed(x)
            return [x := stage(x) for stage in model.stages]
        return model.forward_intermediates(x, norm=False, intermediates_only=True)


def our_maps(model, x):
    """Maps of our model; Swin's without the norms, which are those of the outputs alone."""
    for index in range(len(model.depths)):
        if hasattr(model, f'norm{index}'):
            setattr(model, f'norm{index}', torch.nn.Identity())
    with torch.no_grad():
        return list(model(x))


@pytest.mark.parametrize('name', TIMM)
def test_same_features_as_timm(name, tmp_path):
    make, config = TIMM[name]
    theirs = make()
    for module in theirs.modules():
        # timm and the releases mix both, mmdet and mmseg have one everywhere.
        if isinstance(module, torch.nn.LayerNorm) and name != 'swin':
            module.eps = 1e-6 if name == 'pvtv2' else 1e-5
    torch.save(theirs.state_dict(), tmp_path / 'timm.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))
    ours = MODELS.build(dict(config, convert_weights=True, init_cfg=init_cfg)).eval()
    ours.init_weights()
    # Both Swins of timm are built for one size of image; Twins leaves out what fills no patch.
    sizes = dict(swin=(2, 3, 64, 64), swinv2=(2, 3, 64, 64), pvtv2=(2, 3, 75, 107))
    x = image(sizes.get(name, (2, 3, 64, 96)), dtype=torch.float64)
    expected = timm_maps(theirs.double(), x)
    actual = our_maps(ours.double(), x)
    assert len(actual) == len(expected)
    assert_all_close(actual, expected, 1e-10)


@parametrize(tuple(v for v in FAMILIES if v.twins))
def test_dense_twins_read_what_we_write(variant, tmp_path):
    """From the release's names to files that mmdet's and mmseg's own classes load."""
    state = build(variant).state_dict()
    released = convert_weights(state, 'official').weights
    torch.save(dict(model=released), tmp_path / 'released.pth')
    for library in variant.twins:
        path = tmp_path / f'{library}.pth'
        # ViTSAM's names are OpenMMLab's here.
        convert_file(tmp_path / 'released.pth', path, library.replace('mmpretrain', 'mmdet'))
        init_cfg = ConfigDict(type='Pretrained', checkpoint=str(path))
        # mmdet's PVT would take the names for those of the release.
        options = dict(convert_weights=False) if variant.name in ('pvt', 'pvtv2') else {}
        twin = variant.build_twin(library, init_cfg=init_cfg, **options)
        randomize(twin, 99)
        twin.init_weights()
        assert_same(twin.state_dict(), state)

"""Whole checkpoints: detectors, position tables, the tool's output and its refusals."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_zoo import (
    BY_NAME,
    FAMILIES,
    assert_all_close,
    assert_close,
    image,
    parametrize,
    randomize,
)
from mmengine.logging import MMLogger
from mmengine.registry import MODELS

from idlevit_mm.checkpoints import read_checkpoint, read_weights, write_weights
from idlevit_mm.converters import convert_file, convert_weights
from idlevit_mm.errors import SettingError, UsageError

TOOL = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'convert_checkpoint.py'
HEADS = {
    'neck.conv.weight': torch.ones(1),
    'bbox_head.a': torch.ones(2),
    'bbox_head.b': torch.ones(3),
}


def state_of(name, **overrides):
    return dict(randomize(BY_NAME[name].build(**overrides), 5).state_dict())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def with_prefix(state):
    return {f'backbone.{key}': value for key, value in state.items()}


# --- whole models ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['swin', 'pvtv2', 'mit', 'vit'])
def test_heads_stay_among_openmmlabs_names(name):
    state = state_of(name)
    released = with_prefix(convert_weights(state, 'official').weights) | HEADS
    for to in ('mmdet', 'mmseg'):
        converted = convert_weights(released, to)
        assert_same(converted.weights, with_prefix(state) | HEADS)
        assert sorted(converted.report.matched) == sorted(converted.weights)
        assert not converted.report.dropped


def test_other_formats_take_the_backbone_and_say_so():
    state = state_of('swin')
    for to in ('timm', 'official'):
        whole = convert_weights(with_prefix(state) | HEADS, to)
        alone = convert_weights(state, to)
        assert_same(whole.weights, alone.weights)
        left = [name for name in whole.report.dropped if name not in alone.report.dropped]
        assert left == ['neck.* (1 weight)', 'bbox_head.* (2 weights)']


def test_files_of_mmseg_0():
    """Its converted releases keep masks and the classifier's norm under new names."""
    leftovers = {
        'norm.weight': torch.ones(16),
        'norm.bias': torch.ones(16),
        'stages.0.blocks.1.attn_mask': torch.ones(4, 16, 16),
    }
    state = state_of('swin')
    for to in ('timm', 'official'):
        converted = convert_weights(state | leftovers, to)
        assert_same(converted.weights, convert_weights(state, to).weights)
        assert set(leftovers) <= set(converted.report.dropped)
    assert_same(convert_weights(state | leftovers, 'mmseg').weights, state | leftovers)


def test_class_tokens_of_pvt_are_told():
    options = dict(
        num_stages=4,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        paddings=[0, 0, 0, 0],
        sr_ratios=[2, 1, 1, 1],
        mlp_ratios=[1, 1, 1, 1],
        out_indices=(3,),
    )
    state = state_of('pvt', pretrain_img_size=128, **options)
    released = convert_weights(state, 'official')
    assert released.report.added == ['cls_token', 'pos_embed4[:, 0]']
    assert released.weights['pos_embed4'].shape == (1, 17, 8)
    assert not released.weights['pos_embed4'][:, 0].any()
    back = convert_weights(released.weights, 'mmdet')
    assert back.report.dropped == ['cls_token']
    assert_same(back.weights, state)


# --- position tables -------------------------------------------------------------------------


def test_bias_tables_of_another_window():
    """As in Swin's release: bicubic over the (2 * window - 1) ** 2 places; the index is anew."""
    converted = convert_weights(state_of('swin-w7'), 'mmseg', window_size=12)
    key = 'stages.1.blocks.2.attn.w_msa.relative_position_'
    old = state_of('swin-w7')[f'{key}bias_table']
    grid = old.T.reshape(1, 4, 13, 13)
    expected = F.interpolate(grid, size=(23, 23), mode='bicubic').view(4, 529).T
    assert_close(converted.weights[f'{key}bias_table'], expected, 1e-6)
    assert converted.report.resized[f'{key}bias_table'] == ((169, 4), (529, 4))
    assert len(converted.report.resized) == 5, 'one of each block'
    fresh = BY_NAME['swin-w7'].build(window_size=12)
    fresh.load_state_dict(converted.weights, strict=True)
    assert torch.equal(converted.weights[f'{key}index'], fresh.state_dict()[f'{key}index'])
    same = convert_weights(state_of('swin-w7'), 'mmseg', window_size=7)
    assert not same.report.resized
    assert_same(same.weights, state_of('swin-w7'))


ABSOLUTE = {
    'swin': (
        dict(use_abs_pos_embed=True, pretrain_img_size=32),
        dict(use_abs_pos_embed=True, pretrain_img_size=(36, 60)),
        {'absolute_pos_embed': ((1, 64, 8), (1, 135, 8))},
    ),
    'pvt': (
        dict(pretrain_img_size=32),
        dict(pretrain_img_size=(36, 60)),
        {
            'layers.0.1.0.pos_embed': ((1, 64, 8), (1, 135, 8)),
            'layers.1.1.0.pos_embed': ((1, 16, 16), (1, 28, 16)),
        },
    ),
    'vit': (
        dict(img_size=32),
        dict(img_size=(36, 60)),
        {'pos_embed': ((1, 65, 8), (1, 136, 8))},
    ),
}


@pytest.mark.parametrize('name', ABSOLUTE)
@pytest.mark.parametrize('by', ['tool', 'init_cfg'])
def test_absolute_tables_of_another_image(name, by, tmp_path):
    before, after, resized = ABSOLUTE[name]
    old = state_of(name, **before)
    released = convert_weights(old, 'official').weights
    torch.save(released, tmp_path / 'released.pth')
    if by == 'tool':
        converted = convert_weights(released, 'mmseg', img_size=(36, 60))
        assert converted.report.resized == resized
        new = converted.weights
    else:
        model = pretrained(tmp_path / 'released.pth', name, **after)
        new = model.state_dict()
    assert_same(dict(BY_NAME[name].build(**after).state_dict()) | dict(new), dict(new))
    for key, value in new.items():
        if key not in resized:
            assert torch.equal(value, old[key]), key
            continue
        first = int(name == 'vit')
        side = round((old[key].shape[1] - first) ** 0.5)
        grid = old[key][:, first:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        size = (9, 15) if value.shape[1] > 28 else (4, 7)
        mode = 'bilinear' if name == 'pvt' else 'bicubic'
        expected = F.interpolate(grid, size=size, mode=mode).flatten(2).transpose(1, 2)
        assert_close(value[:, first:], expected, 1e-6, key)
        assert torch.equal(value[:, :first], old[key][:, :first])


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('pvt', dict(window_size=7), r'window_size=7 for mmdet and mmseg PVT and MiT; allowed'),
        ('swin', dict(window_size=0), r'window_size=0 .* allowed: positive'),
        ('swin', dict(img_size=(64, 64)), r'img_size=\(64, 64\) .*no absolute position table'),
        ('mit', dict(img_size=(64, 64)), r'no absolute position table'),
        ('vit', dict(img_size=(64, 3)), r'img_size=\(64, 3\) must be at least 4'),
    ],
)
def test_sizes_without_use_are_refused(name, options, message):
    with pytest.raises(SettingError, match=message):
        convert_weights(state_of(name), 'mmseg', **options)


# --- init_cfg --------------------------------------------------------------------------------


def pretrained(path, name, **overrides):
    """Our model, initialised from a checkpoint the way a config does it."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = BY_NAME[name].build(init_cfg=init_cfg, convert_weights=True, **overrides)
    randomize(model, 99)
    model.init_weights()
    return model


@pytest.fixture
def log():
    """Records that mmengine's logger gets."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    logger, handler = MMLogger.get_current_instance(), Keep()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def record_of_loading(log):
    """Level and text of the last report of what was loaded."""
    return [(r.levelno, r.getMessage()) for r in log if ': loaded from ' in r.getMessage()][-1]


@pytest.mark.parametrize(
    ('name', 'to', 'suffix'),
    [
        *((variant.name, 'official', '.pth') for variant in FAMILIES),
        *((name, 'timm', '.safetensors') for name in ('swin', 'pvtv2', 'vit')),
    ],
)
def test_init_cfg_takes_every_format_and_file(name, to, suffix, tmp_path, log):
    variant, state = BY_NAME[name], state_of(name)
    converted = convert_weights(state, to)
    path = tmp_path / f'weights{suffix}'
    write_weights(converted.weights, path, converted.target.place)
    model = pretrained(path, variant.name, keep_ratios=0.5)
    lost = [key for key in converted.report.dropped if key in state]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or key in lost, key
    _, line = record_of_loading(log)
    assert line.startswith(variant.type)
    assert f'loaded from {path}' in line
    # Two buffers of four blocks are in no file.
    lacking = len(lost) + (8 if name == 'swinv2' else 0)
    assert f': {len(state) - lacking} weights' in line
    assert ('missing: norm0.weight' in line) == bool(lost)


@parametrize()
def test_foreign_names_without_convert_weights(variant, tmp_path):
    """Not even those few weights are loaded whose names agree."""
    write_weights(convert_weights(state_of(variant.name), 'official').weights, tmp_path / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    model = variant.build(init_cfg=init_cfg, convert_weights=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SettingError, match=r'keys are those of .*; set convert_weights=True'):
        model.init_weights()
    assert_same(model.state_dict(), before)


# The first layer is the same part in all families.
@pytest.mark.parametrize(
    ('name', 'how', 'channels'),
    [
        *(('swin', None, 4), ('swin', 'mean', 1), ('swin', 'repeat', 6), ('pvt', 'mean', 4)),
        *(('pvtv2', 'repeat', 6), ('mit', None, 4), ('vit', 'mean', 1), ('vit', 'mean', 4)),
    ],
)
def test_images_of_other_channels(name, how, channels, tmp_path, log):
    """All else is loaded; a grey image gives the same features where the layer is adapted."""
    plain = randomize(BY_NAME[name].build()).eval()
    write_weights(plain.state_dict(), tmp_path / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), in_channels=how)
    model = BY_NAME[name].build(init_cfg=init_cfg, in_channels=channels).eval()
    model.init_weights()
    level, line = record_of_loading(log)
    assert ('of another shape: ' in line) == (how is None)
    assert (level == logging.WARNING) == (how is None)
    grey = image((1, 1, 40, 48))
    with torch.no_grad():
        outs = model(grey.expand(-1, channels, -1, -1)), plain(grey.expand(-1, 3, -1, -1))
    if how is not None:
        assert_all_close(*(torch.utils._pytree.tree_leaves(out) for out in outs), 1e-4)


def test_channels_are_adapted_in_known_ways_only(tmp_path):
    write_weights(state_of('pvt'), tmp_path / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), in_channels='max')
    with pytest.raises(SettingError, match=r"in_channels='max' is unknown; allowed: mean, repeat"):
        BY_NAME['pvt'].build(init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('name', ['swin', 'pvtv2', 'vit'])
def test_files_of_another_width_are_refused(name, tmp_path):
    write_weights(state_of(name), tmp_path / 'w.pth')
    with pytest.raises(SettingError, match='has another shape than'):
        pretrained(tmp_path / 'w.pth', name, **BY_NAME[name].wide(16))


@pytest.mark.parametrize('name', ['swin', 'pvt', 'vit'])
def test_files_of_another_family(name, tmp_path):
    other = 'vit' if name == 'swin' else 'swin'
    write_weights(state_of(other), tmp_path / 'w.pth')
    with pytest.raises(SettingError, match=r'has no weight of Idle.*its keys are those of mm'):
        pretrained(tmp_path / 'w.pth', name)


@pytest.mark.parametrize(
    ('depths', 'words'), [((2, 3), 'missing: stages.1.blocks.2'), ((2, 1), 'not used: stages.1.bl')]
)
def test_files_of_another_depth_are_warned_of(depths, words, tmp_path, log):
    write_weights(convert_weights(state_of('swin'), 'official').weights, tmp_path / 'w.pth')
    pretrained(tmp_path / 'w.pth', 'swin', depths=depths)
    level, line = record_of_loading(log)
    assert level == logging.WARNING
    assert words in line
    pretrained(tmp_path / 'w.pth', 'swin')
    assert record_of_loading(log)[0] == logging.INFO


def test_init_cfg_takes_addresses(served):
    folder, address = served
    state = state_of('mit')
    write_weights(convert_weights(state, 'official').weights, folder / 'mit_b0.pth')
    assert_same(pretrained(f'{address}mit_b0.pth', 'mit').state_dict(), state)


def tiny_vit(name, **overrides):
    init_cfg = dict(type='Pretrained', checkpoint=f'timm://{name}')
    config = dict(arch='deit-tiny', convert_weights=True, output_cls_token=True)
    return MODELS.build(
        dict(config, type='IdleVisionTransformer', init_cfg=init_cfg, **overrides)
    ).eval()


def test_init_cfg_takes_names_of_timm(pretrained_timm, log):
    import timm

    name, _ = pretrained_timm
    model = tiny_vit(name)
    model.init_weights()
    assert '(timm vit_*, deit_* or DeiT): 150 weights' in record_of_loading(log)[1]
    theirs = timm.create_model(name, pretrained=True).eval()
    x = image((1, 3, 224, 224))
    with torch.no_grad():
        feature_map, cls = model(x)[0]
        expected = theirs.forward_features(x)
    assert_close(cls, expected[:, 0], 1e-5)
    assert_close(feature_map.flatten(2).transpose(1, 2), expected[:, 1:], 1e-5)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (dict(num_layers=14), r'of another size than IdleVisionTransformer: it lacks layers\.12\.'),
        (dict(num_layers=7), r'of another size .*: it has layers\.7\.ln1.* and 57 more'),
        (dict(qkv_bias=False), r'of another size .*: it has layers\.0\.attn\.attn\.in_proj_bias'),
        (dict(arch='deit-small'), r'another shape than IdleVisionTransformer: cls_token \(1, 1, 1'),
        (dict(convert_weights=False), r'set convert_weights=True'),
    ],
)
def test_timm_models_of_another_size(pretrained_timm, overrides, message):
    with pytest.raises(SettingError, match=message) as error:
        tiny_vit(pretrained_timm[0], **overrides).init_weights()
    assert '\n' not in str(error.value)


def test_timm_models_of_another_family(pretrained_timm):
    with pytest.raises(SettingError, match='keys are those of timm vit_'):
        pretrained(f'timm://{pretrained_timm[0]}', 'swin')


# --- the tool --------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool in this process: exit code, and what it printed."""
    spec = importlib.util.spec_from_file_location('convert_checkpoint', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
        code = 0
        try:
            module.run_tool(module.convert)
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_tool_converts_and_reports(tool, tmp_path):
    state = state_of('swin')
    source, target = tmp_path / 'detector.pth', tmp_path / 'timm.safetensors'
    torch.save({'state_dict': with_prefix(state) | HEADS, 'meta': {}}, source)
    code, out, err = tool(source, target, '--to', 'timm', '--window-size', 6)
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[0] == f'{source}: mmdet and mmseg Swin'
    assert lines[1] == f'{target}: timm swin_*'
    assert lines[2] == f'{len(read_weights(target))} weights'
    table = 'stages.0.blocks.0.attn.w_msa.relative_position_bias_table'
    assert lines[3:5] == ['4 resized:', f'  {table} (49, 2) to (121, 2)']
    assert lines[-7:] == [
        '6 dropped:',
        *(f'  norm{index}.{leaf}' for index in (0, 1) for leaf in ('weight', 'bias')),
        '  neck.* (1 weight)',
        '  bbox_head.* (2 weights)',
    ]


def test_the_tool_writes_as_the_projects_do(tool, tmp_path):
    torch.save(state_of('swin'), tmp_path / 'ours.pth')
    for to, place in (('mmdet', 'state_dict'), ('official', 'model'), ('timm', None)):
        assert tool(tmp_path / 'ours.pth', tmp_path / f'{to}.pth', '--to', to)[0] == 0
        written = read_checkpoint(tmp_path / f'{to}.pth')
        assert list(written)[0] == place if place else 'patch_embed.proj.weight' in written


def test_the_tool_refuses_in_one_line(tool, tmp_path):
    good, target = tmp_path / 'good.pth', tmp_path / 'new.pth'
    torch.save(state_of('pvt'), good)
    torch.save({'fc.weight': torch.ones(1)}, tmp_path / 'other.pth')
    torch.save({'meta': print, 'state_dict': state_of('pvt')}, tmp_path / 'evil.pth')
    (tmp_path / 'empty.pth').touch()
    for source, goal, options, message in (
        (tmp_path / 'gone.pth', target, (), 'gone.pth does not exist'),
        (tmp_path / 'empty.pth', target, (), 'cannot be read'),
        (tmp_path / 'other.pth', target, (), 'is of no known format'),
        (tmp_path / 'evil.pth', target, (), 'is refused as unsafe'),
        (tmp_path, target, (), 'is a folder, not a file'),
        (good, good, (), 'exists already'),
        (good, tmp_path / 'good.pth' / 'x.pth', (), 'x.pth cannot be written'),
        (good, target, ('--config', tmp_path / 'gone.py'), 'gone.py does not exist'),
        (good, tmp_path / 'new.txt', (), 'must end in one of'),
        (good, target, ('--window-size', 7), 'window_size=7'),
        ('timm://swin_tiny', target, (), 'swin_tiny_patch4_window7_224'),
    ):
        code, out, err = tool(source, goal, '--to', 'mmseg', *options)
        assert (code, out) == (2, ''), message
        assert message in err
        assert len(err.splitlines()) == 1
    code, _, err = tool(good, target, '--to', 'timm')
    assert code == 2
    assert 'have no counterpart in timm' in err
    assert not target.exists()


def test_the_tool_compares_with_a_config(tool, tmp_path):
    """What would be missing and left over in the model that shall have the weights."""
    config = tmp_path / 'config.py'
    model = BY_NAME['swin'].config(depths=(2, 3))
    config.write_text(f"custom_imports = dict(imports=['idlevit_mm'])\nmodel = {model!r}\n")
    torch.save(convert_weights(state_of('swin-w7'), 'official').weights, tmp_path / 'w.pth')
    code, out, _ = tool(
        *(tmp_path / 'w.pth', tmp_path / 'new.pth', '--to', 'mmdet', '--config', config)
    )
    assert code == 0
    lines = out.splitlines()
    at = lines.index(f'compared with the model of {config}:')
    # The windows differ, and nothing was asked to resize their tables; indices are made anew.
    weights = len(read_weights(tmp_path / 'new.pth'))
    assert lines[at + 1] == f'{weights - 5} weights'
    assert lines[at + 2] == '5 of another shape:'
    assert '(169, 2) not (49, 2)' in lines[at + 3]
    code, _, err = tool(
        *(tmp_path / 'w.pth', tmp_path / 'x.pth', '--to', 'timm', '--config', config)
    )
    assert code == 2
    assert 'config' in err


def test_the_target_is_checked_before_anything_is_fetched(tmp_path):
    target = tmp_path / 'there.pth'
    target.touch()
    with pytest.raises(UsageError, match='exists already'):
        convert_file('https://host.invalid/weights.pth', target, 'mmdet')

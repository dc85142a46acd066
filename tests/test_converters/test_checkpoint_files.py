"""Weights from files, addresses and timm; to .pth and .safetensors files; and what is told."""

import functools
import os
import sys

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint

from idlevit_mm.checkpoints import (
    WeightsReport,
    compare,
    read_checkpoint,
    read_weights,
    split_backbone,
    write_weights,
)
from idlevit_mm.errors import (
    BrokenCheckpointError,
    MissingFileError,
    UnsafeCheckpointError,
    UsageError,
)

WEIGHTS = {
    'stages.0.weight': torch.arange(6.0).view(2, 3),
    'stages.0.index': torch.arange(4),
    'norm.bias': torch.ones(3, dtype=torch.float16),
}


def assert_same(actual, expected=None):
    expected = WEIGHTS if expected is None else expected
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
@pytest.mark.parametrize('place', ['', 'state_dict', 'model'])
def test_what_is_written_is_read(suffix, place, tmp_path):
    path = tmp_path / 'new' / f'weights{suffix}'
    write_weights(WEIGHTS, path, place)
    assert_same(read_weights(path))
    if suffix != '.safetensors':
        assert (place in read_checkpoint(path)) == bool(place)
    assert list(path.parent.iterdir()) == [path], 'nothing else stays behind'


def test_views_and_shared_tensors_are_written_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    weights = {'turned': base.t(), 'part': base[:, :2], 'again': base}
    write_weights(weights, tmp_path / 'w.safetensors')
    assert_same(read_weights(tmp_path / 'w.safetensors'), weights)
    write_weights({'part': torch.zeros(10**6)[:2]}, tmp_path / 'w.pth')
    assert (tmp_path / 'w.pth').stat().st_size < 10**4


def test_writing_refuses(tmp_path, monkeypatch):
    path = tmp_path / 'there.pth'
    path.write_bytes(b'mine')
    with pytest.raises(UsageError, match=r'there\.pth exists already'):
        write_weights(WEIGHTS, path)
    assert path.read_bytes() == b'mine'
    with pytest.raises(UsageError, match=r'x\.onnx must end in one of \.pth, \.pt, \.safetensors'):
        write_weights(WEIGHTS, tmp_path / 'x.onnx')

    def fail(_weights, path):
        path.write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(UsageError, match=r'full\.pth cannot be written: no space'):
        write_weights(WEIGHTS, tmp_path / 'full.pth')
    assert list(tmp_path.iterdir()) == [path], 'no half of a file stays behind'


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04 cut off'])
def test_damaged_files(content, suffix, tmp_path):
    path = tmp_path / f'damaged{suffix}'
    path.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match='cannot be read') as error:
        read_weights(path)
    assert '\n' not in str(error.value)


def test_files_without_weights(tmp_path):
    torch.save({'meta': dict(epoch=1), 'state_dict': {}}, tmp_path / 'empty.pth')
    with pytest.raises(BrokenCheckpointError, match=r'empty\.pth holds no weights'):
        read_weights(tmp_path / 'empty.pth')
    with pytest.raises(MissingFileError, match=r'gone\.pth does not exist'):
        read_weights(tmp_path / 'gone.pth')


def test_mmengine_reads_safetensors_as_well(tmp_path):
    """So ``load_from`` can name such a file."""
    path = tmp_path / 'w.safetensors'
    write_weights(WEIGHTS, path)
    assert_same(CheckpointLoader.load_checkpoint(str(path), map_location='cpu'))


def test_backbones_are_taken_out_of_models():
    whole = {'backbone.a': torch.ones(1), 'neck.b': torch.ones(2), 'bbox_head.c': torch.ones(3)}
    backbone, others = split_backbone(whole)
    assert_same(backbone, {'a': torch.ones(1)})
    assert list(others) == ['neck.b', 'bbox_head.c']
    assert split_backbone(WEIGHTS) == (WEIGHTS, {})


# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_addresses(suffix, served):
    folder, address = served
    write_weights(WEIGHTS, folder / f'w{suffix}', 'state_dict')
    assert_same(read_weights(f'{address}w{suffix}'))


def test_downloads_are_read_safely(served, tmp_path, monkeypatch):
    """torch.hub, which mmengine downloads with, would run the code in a file."""
    folder, address = served
    made = tmp_path / 'made'
    torch.save({'state_dict': WEIGHTS, 'meta': Payload(made)}, folder / 'evil.pth')
    for variable in (None, '1'):
        if variable:
            monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', variable)
        # A runner's `load_from` goes by mmengine's own function.
        for reader in (read_weights, functools.partial(load_checkpoint, torch.nn.Identity())):
            with pytest.raises(UnsafeCheckpointError, match=r'evil\.pth is refused as unsafe'):
                reader(f'{address}evil.pth')
        assert not made.exists()
        assert os.environ.get('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD') == variable
        assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


def test_addresses_that_lead_nowhere(served):
    _, address = served
    for reader in (read_weights, functools.partial(load_checkpoint, torch.nn.Identity())):
        with pytest.raises(UsageError, match=r'gone\.pth cannot be fetched \(HTTPError: .*404'):
            reader(f'{address}gone.pth')
    with pytest.raises(UsageError, match='openmmlab://nothing cannot be fetched'):
        read_weights('openmmlab://nothing')


# --- timm ------------------------------------------------------------------------------------


def test_timm_models_by_name(pretrained_timm):
    name, weights = pretrained_timm
    before = torch.random.get_rng_state()
    assert_same(read_weights(f'timm://{name}'), weights)
    assert torch.equal(torch.random.get_rng_state(), before), 'the seed of the training is left'


def test_timm_names_that_lead_nowhere():
    pytest.importorskip('timm')
    with pytest.raises(UsageError, match=r'timm [\d.]+ has no such model; similar: deit_small_'):
        read_weights('timm://deit_small')
    with pytest.raises(UsageError, match=r'no such weights; similar:.* vit_tiny.*\.augreg_in21k_f'):
        read_weights('timm://vit_tiny_patch16_224.augreg_in22k_ft_in1k')


def test_without_network(monkeypatch):
    pytest.importorskip('timm')
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', 'nowhere')
    with pytest.raises(UsageError, match='cannot be fetched by timm .*name its path') as error:
        read_weights('timm://swin_tiny_patch4_window7_224.ms_in1k')
    assert '\n' not in str(error.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UsageError, match='needs timm, which cannot be imported'):
        read_weights('timm://vit_tiny_patch16_224')


def test_without_safetensors(monkeypatch, tmp_path):
    """OpenMMLab does not bring it."""
    write_weights(WEIGHTS, tmp_path / 'w.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(UsageError, match=r'\.safetensors files need safetensors'):
        read_weights(tmp_path / 'w.safetensors')
    with pytest.raises(UsageError, match=r'\.safetensors files need safetensors'):
        write_weights(WEIGHTS, tmp_path / 'x.safetensors')


# --- the report ------------------------------------------------------------------------------


def test_report():
    own = {
        'a': torch.ones(2),
        'b': torch.ones(3),
        'c': torch.ones(1),
        'x.policy.w': torch.ones(1),
        'd': torch.ones(4, 5),
    }
    given = {'a': torch.ones(2), 'd': torch.ones(4, 6), **{f'e{i}': own['a'] for i in range(7)}}
    report = compare(own, given)
    assert report.matched == ['a']
    assert report.missing == ['b', 'c', 'x.policy.w']
    assert compare(own, given, policy_too=False).missing == ['b', 'c']
    assert report.unexpected == [f'e{i}' for i in range(7)]
    assert report.mismatched == {'d': ((4, 6), (4, 5))}
    assert report.misfit() == (
        'lacks 3 weights (such as b), has unknown 7 weights (such as e0), '
        'has another shape of 1 weight (such as d)'
    )
    report.resized['a'] = (1,), (2,)
    assert report.summary() == (
        '1 weight; resized: a (1,) to (2,); of another shape: d (4, 6) not (4, 5); '
        'missing: b, c, x.policy.w; not used: e0, e1, e2, e3, e4 and 2 more'
    )
    lines = report.lines()
    assert lines[:3] == ['1 weight', '1 resized:', '  a (1,) to (2,)']
    assert lines[-8:] == ['7 not used:', *(f'  e{i}' for i in range(7))]
    assert WeightsReport(matched=['a']).lines() == ['1 weight']
    assert compare(own, own).misfit() == ''

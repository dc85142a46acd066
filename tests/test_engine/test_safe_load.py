"""Checkpoints of mmengine are read; anything that could run code is refused."""

import argparse
import importlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from toy import toy_runner

import idlevit_mm
from idlevit_mm.engine import (
    BrokenCheckpointError,
    UnsafeCheckpointError,
    UsageError,
    load_checkpoint,
    strip_checkpoint,
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Work dir of a run that uses much of what mmengine stores."""
    folder = tmp_path_factory.mktemp('trained')
    toy_runner(
        folder,
        hooks=[dict(type='EMAHook')],
        checkpoint=dict(save_best='toy/acc', rule='greater', max_keep_ckpts=2),
    ).train()
    return folder


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_every_checkpoint_of_mmengine_is_read(trained):
    paths = list(trained.glob('*.pth'))
    assert len(paths) == 3, 'two epochs and the best'
    for path in paths:
        checkpoint = load_checkpoint(path)
        log = checkpoint['message_hub']['log_scalars']['train/loss']
        assert isinstance(log, HistoryBuffer)
        assert log.mean() == np.mean(log.data[0])
        np.testing.assert_array_equal(checkpoint['meta']['dataset_meta']['table'], [0, 1, 2])
        assert torch.load(path)['state_dict'].keys() == checkpoint['state_dict'].keys()


def test_reading_depends_on_the_list_and_importing_the_package_fills_it(trained):
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        with pytest.raises(pickle.UnpicklingError):
            torch.load(trained / 'epoch_4.pth')
        importlib.reload(idlevit_mm)
        torch.load(trained / 'epoch_4.pth')
    finally:
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        (b'numpy._core.multiarray', b'numpy.core.multiarray'),
        (b'numpy.core.multiarray', b'numpy._core.multiarray'),
    ],
)
def test_files_of_the_other_numpy(trained, tmp_path, ours, theirs):
    with (
        zipfile.ZipFile(trained / 'epoch_4.pth') as source,
        zipfile.ZipFile(tmp_path / 'other.pth', 'w') as target,
    ):
        for name in source.namelist():
            data = source.read(name)
            if name.endswith('data.pkl'):
                data = data.replace(ours, theirs)
                assert theirs in data
            target.writestr(name, data)
    # Rewritten like this, the tensors lose the alignment that mapping needs, not their values.
    checkpoint = torch.load(tmp_path / 'other.pth', weights_only=True)
    assert checkpoint['message_hub']['log_scalars']['train/loss'].data[0].dtype == np.float64


@pytest.mark.parametrize('zipped', [True, False])
def test_a_payload_is_refused_and_does_not_run(tmp_path, zipped):
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    torch.save(
        {'state_dict': {'w': torch.ones(2)}, 'meta': Payload(made)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        UnsafeCheckpointError, match=r'evil\.pth is refused.*posix.*strip_checkpoint'
    ):
        load_checkpoint(path)
    assert not made.exists()

    assert strip_checkpoint(path, tmp_path / 'stripped.pth') == (1, ['meta'])
    assert not made.exists()
    stripped = load_checkpoint(tmp_path / 'stripped.pth')
    assert torch.equal(stripped['state_dict']['w'], torch.ones(2))


def test_namespace_of_older_projects(tmp_path):
    weights = {'a.weight': torch.rand(3, 2), 'a.bias': torch.nn.Parameter(torch.rand(3))}
    torch.save(
        {'model': weights, 'args': argparse.Namespace(lr=1), 'epoch': 3}, tmp_path / 'old.pth'
    )
    with pytest.raises(UnsafeCheckpointError, match=r'argparse\.Namespace'):
        load_checkpoint(tmp_path / 'old.pth')
    count, dropped = strip_checkpoint(tmp_path / 'old.pth', tmp_path / 'new.pth')
    assert (count, dropped) == (2, ['args', 'epoch'])
    loaded = load_checkpoint(tmp_path / 'new.pth')['state_dict']
    for name, value in weights.items():
        assert torch.equal(loaded[name], value)


def test_strip_keeps_every_tensor_of_mmengine(trained, tmp_path):
    strip_checkpoint(trained / 'epoch_4.pth', tmp_path / 'new.pth')
    old = load_checkpoint(trained / 'epoch_4.pth')['state_dict']
    new = load_checkpoint(tmp_path / 'new.pth')
    assert new.keys() == {'state_dict'}
    assert old.keys() == new['state_dict'].keys()
    assert all(torch.equal(old[name], new['state_dict'][name]) for name in old)


def test_strip_refuses(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'empty.pth')
    with pytest.raises(UsageError, match='holds no tensors'):
        strip_checkpoint(tmp_path / 'empty.pth', tmp_path / 'new.pth')
    with pytest.raises(UsageError, match='exists already'):
        strip_checkpoint(tmp_path / 'empty.pth', tmp_path / 'empty.pth')
    with pytest.raises(UsageError, match='does not exist'):
        strip_checkpoint(tmp_path / 'none.pth', tmp_path / 'new.pth')
    assert not (tmp_path / 'new.pth').exists()


def test_missing_and_odd_files(tmp_path):
    with pytest.raises(UsageError, match=r'none\.pth does not exist'):
        load_checkpoint(tmp_path / 'none.pth')
    with zipfile.ZipFile(tmp_path / 'archive.pth', 'w') as archive:
        archive.writestr('readme.txt', 'no weights')
    with pytest.raises(UsageError, match=r'archive\.pth (cannot be read|is refused)'):
        load_checkpoint(tmp_path / 'archive.pth')
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    with pytest.raises(BrokenCheckpointError, match='holds a list'):
        load_checkpoint(tmp_path / 'list.pth')


def test_histories_can_be_used_in_a_process_that_has_made_none(tmp_path, monkeypatch):
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    torch.save({'log': buffer}, tmp_path / 'a.pth')
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    assert load_checkpoint(tmp_path / 'a.pth')['log'].statistics('mean') == 2.0

"""What is wrong with paths and checkpoints is said before any work."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict

from idlevit_mm.engine import UsageError
from idlevit_mm.engine.checks import (
    check_datasets,
    check_pretrained,
    check_weights,
    find_resumable,
    leaf_datasets,
)


def coco(root):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
    )


@pytest.fixture
def data(tmp_path):
    root = tmp_path / 'set'
    (root / 'annotations').mkdir(parents=True)
    (root / 'images').mkdir()
    (root / 'annotations' / 'train.json').write_text('{}')
    return root


def config(dataset, **more):
    return Config(dict(train_dataloader=dict(dataset=dataset), **more))


WRAPPERS = [
    (lambda d: d, ''),
    (lambda d: dict(type='RepeatDataset', times=2, dataset=d), '.dataset'),
    (lambda d: dict(type='ConcatDataset', datasets=[d, d]), '.datasets.0'),
    (
        lambda d: dict(
            type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[d])
        ),
        '.dataset.datasets.0',
    ),
]


def test_wrapped_data_sets_are_found(data):
    for wrap, key in WRAPPERS:
        (data / 'annotations' / 'train.json').write_text('{}')
        check_datasets(config(wrap(coco(data))), ('train',))
        assert next(leaf_datasets(wrap(coco(data)), 'x'))[0] == f'x{key}'
        (data / 'annotations' / 'train.json').unlink()
        missing = rf'train_dataloader\.dataset{key}\.ann_file {data}/annotations/train\.json'
        with pytest.raises(UsageError, match=missing):
            check_datasets(config(wrap(coco(data))), ('train',))


def test_missing_folders(data):
    (data / 'images').rmdir()
    with pytest.raises(UsageError, match=r'dataset\.data_prefix\.img .*images/ does not exist'):
        check_datasets(config(coco(data)), ('train',))
    with pytest.raises(UsageError, match=r'dataset\.data_root .*nowhere does not exist'):
        check_datasets(config(coco(data / 'nowhere')), ('train',))


def test_only_what_the_run_reads_is_checked(data):
    cfg = config(coco(data), val_dataloader=dict(dataset=coco(data / 'nowhere')))
    check_datasets(cfg, ('train',))
    with pytest.raises(UsageError, match='val_dataloader'):
        check_datasets(cfg, ('train', 'val'))


def test_evaluators_annotations(data):
    cfg = config(coco(data), train_evaluator=[dict(type='CocoMetric', ann_file='nowhere.json')])
    with pytest.raises(UsageError, match=r'train_evaluator\.ann_file nowhere\.json'):
        check_datasets(cfg, ('train',))


def test_remote_data_is_not_looked_for():
    check_datasets(config(dict(coco('s3://bucket/coco'))), ('train',))
    check_datasets(config(dict(coco('nowhere'), backend_args=dict(backend='petrel'))), ('train',))


def test_the_message_says_where_data_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = 'tools/dataset_converters/digit_scenes.py data/digit_scenes --layout coco ade'
    hints = {
        'data/digit_scenes/coco/': digits,
        'data/coco/': 'https://cocodataset.org',
        'data/ade/ADEChallengeData2016': 'sceneparsing.csail.mit.edu',
        'data/mine': '--cfg-options train_dataloader.dataset.data_root=PATH',
    }
    for root, hint in hints.items():
        with pytest.raises(UsageError) as error:
            check_datasets(config(coco(root)), ('train',))
        assert hint in str(error.value)


def test_pretrained_files(tmp_path):
    def cfg(path):
        init = dict(type='Pretrained', checkpoint=path)
        return Config(dict(model=dict(neck=[dict()], backbone=dict(init_cfg=init))))

    with pytest.raises(UsageError, match=r'model\.backbone\.init_cfg\.checkpoint nowhere\.pth'):
        check_pretrained(cfg('nowhere.pth'))
    check_pretrained(cfg('https://host/weights.pth'))
    torch.save({'w': torch.ones(1)}, tmp_path / 'w.pth')
    check_pretrained(cfg(str(tmp_path / 'w.pth')))


def save(path, iteration=1, **more):
    meta = dict(iter=iteration, epoch=iteration // 10)
    state = dict(state_dict={'w': torch.ones(1)}, meta=meta, optimizer={}, message_hub={})
    torch.save({**state, **more}, path)
    return path


NOTES = {
    'older': lambda folder: b'epoch_2.pth',
    'no text': lambda folder: b'\xff\xfe\0',
}


# Whatever the note says, files are looked at: what cannot be read, and none.
@pytest.mark.parametrize('note', ['older', 'no text', 'folder', None])
def test_the_checkpoint_with_the_most_progress_is_found_whatever_the_note_says(tmp_path, note):
    assert find_resumable(tmp_path / 'nowhere') == (None, [])
    assert find_resumable(tmp_path) == (None, [])
    if note == 'folder':
        (tmp_path / 'last_checkpoint').mkdir()
    elif note:
        (tmp_path / 'last_checkpoint').write_bytes(NOTES[note](tmp_path))
    save(tmp_path / 'epoch_2.pth', 20)
    newest = save(tmp_path / 'epoch_10.pth', 100)
    assert find_resumable(tmp_path) == (str(newest), [])
    newest = save(tmp_path / 'epoch_3.pth', 120)  # copied from elsewhere
    save(tmp_path / 'iter_110.pth', 110)
    torch.save({'state_dict': {'w': torch.ones(1)}}, tmp_path / 'best_acc_epoch_12.pth')
    assert find_resumable(tmp_path) == (str(newest), [])


def test_the_folder_of_the_hook_is_looked_at_too(tmp_path):
    (tmp_path / 'out' / 'run').mkdir(parents=True)
    newest = save(tmp_path / 'out' / 'run' / 'iter_7.pth', 7)
    assert find_resumable(tmp_path / 'run', str(tmp_path / 'out')) == (str(newest), [])
    assert find_resumable(tmp_path / 'run', 's3://bucket') == (None, [])


def zeros(data):
    return data[:2000] + bytes(8192) + data[2000 + 8192 :]


def zeros_at_the_end(data):
    return data[:-8192] + bytes(8192)


def one_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def zeroed_names(data):
    start = data.rindex(b'PK\x01\x02')
    return data[: start + 46] + bytes(4) + data[start + 50 :]


@pytest.mark.parametrize(
    'damage', [zeros, zeros_at_the_end, one_bit, zeroed_names, lambda data: data[:500]]
)
def test_damaged_checkpoints_are_passed_over_and_named(tmp_path, damage):
    older = save(tmp_path / 'iter_100.pth', 100)
    newer = save(tmp_path / 'iter_200.pth', 200, more=torch.ones(30000))
    assert find_resumable(tmp_path) == (str(newer), [])
    newer.write_bytes(damage(newer.read_bytes()))
    path, passed_over = find_resumable(tmp_path)
    assert path == str(older)
    assert len(passed_over) == 1
    assert re.search(r'iter_200\.pth (cannot be read|is refused)', passed_over[0])
    older.unlink()
    assert find_resumable(tmp_path)[0] is None


def test_files_without_checksums_can_be_resumed(tmp_path):
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('torch always writes them')
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / 'iter_1.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert find_resumable(tmp_path) == (str(path), [])


def test_what_lacks_the_state_of_a_training_is_passed_over(tmp_path):
    for more in [
        dict(meta=dict(iter='x', epoch=1)),
        dict(meta=dict(iter=1, epoch=-1)),
        dict(meta=dict(iter=1, epoch=1, seed='x')),
        dict(message_hub=None),
        dict(optimizer=[]),
        dict(param_schedulers=3),
        dict(meta=3),
    ]:
        save(tmp_path / 'epoch_1.pth', **more)
        path, passed_over = find_resumable(tmp_path)
        assert path is None, more
        assert re.search(r'epoch_1\.pth (holds weights only|has no usable \w)', *passed_over)


class Net(torch.nn.Module):
    def __init__(self, width=4, classes=3, deep=False):
        super().__init__()
        self.backbone = torch.nn.Linear(2, width)
        self.bbox_head = torch.nn.Conv2d(width, classes, 1)
        if deep:
            self.neck = torch.nn.Linear(width, width)


def checkpoint_of(model, prefix=''):
    return dict(state_dict={prefix + k: v for k, v in model.state_dict().items()})


PURPOSES = ('resume', 'test', 'load_from')


def test_fitting_weights():
    for purpose in PURPOSES:
        for prefix in ('', 'module.'):
            assert check_weights(Net(), checkpoint_of(Net(), prefix), 'x.pth', purpose) == []


def test_other_shapes():
    message = r'x\.pth .*has other shapes.*backbone\.weight \(5, 2\) but the model has \(4, 2\)'
    for purpose in PURPOSES:
        with pytest.raises(UsageError, match=message):
            check_weights(Net(), checkpoint_of(Net(width=5)), 'x.pth', purpose)


@pytest.mark.parametrize('name', ['bbox_head.weight', 'backbone.bias'])
def test_what_fits_is_loaded_and_the_rest_is_listed(name):
    given = checkpoint_of(Net())
    given['state_dict'][name] = torch.ones(80, 3)
    (warning,) = check_weights(Net(), given, 'x.pth', 'load_from')
    assert f'{name} (80, 3) but the model has (' in warning
    for purpose in ('resume', 'test'):
        with pytest.raises(UsageError, match='other shapes'):
            check_weights(Net(), given, 'x.pth', purpose)
    # And mmengine does so.
    load_state_dict(Net(), given['state_dict'], strict=False)


def test_missing_weights():
    given = checkpoint_of(Net())
    assert check_weights(Net(deep=True), given, 'x.pth', 'load_from') == []
    for purpose in ('resume', 'test'):
        with pytest.raises(UsageError, match=r'lacks weights of the model: neck\.weight'):
            check_weights(Net(deep=True), given, 'x.pth', purpose)


def test_foreign_weights():
    bare = {k.removeprefix('backbone.'): v for k, v in Net().state_dict().items() if 'back' in k}
    with pytest.raises(UsageError, match=r'shares no backbone.*init_cfg\.checkpoint=x\.pth'):
        check_weights(Net(), dict(state_dict=bare), 'x.pth', 'load_from')
    with pytest.raises(UsageError, match='belongs to another model'):
        check_weights(Net(), {'blocks.0': torch.ones(1)}, 'x.pth', 'test')
    with pytest.raises(UsageError, match='holds no weights'):
        check_weights(Net(), {}, 'x.pth', 'test')


def test_long_lists_are_capped():
    given = {'state_dict': {f'k{i}': torch.ones(1) for i in range(50)}}
    with pytest.raises(UsageError, match='and 45 more') as error:
        check_weights(Net(), given, 'x.pth', 'test')
    assert len(str(error.value)) < 600


def test_pre_trained_weights_fit_whatever_was_around_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prefix in ('', 'backbone.', 'encoder.', 'model.', 'student.backbone.', 'model.backbone.'):
        assert_fit_within(prefix)


def assert_fit_within(prefix):
    config = dict(embed_dims=16, depths=[1], num_heads=[1], strides=(4,), out_indices=(0,))
    backbone = MODELS.build(dict(type='IdleSwinTransformer', **config))
    given = {prefix + name: value for name, value in backbone.state_dict().items()}
    given |= {f'{prefix}mask_token': torch.ones(1), 'decoder.0.weight': torch.ones(1)}
    torch.save(dict(model={f'module.{name}': value for name, value in given.items()}), 'w.pth')
    init = dict(type='Pretrained', checkpoint='w.pth')
    other = MODELS.build(dict(type='IdleSwinTransformer', init_cfg=init, **config))
    other.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)

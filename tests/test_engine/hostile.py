"""Checkpoints that want to run, or to take memory, and whatever opens a checkpoint."""

import os
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from torch._utils import _rebuild_tensor_v2
from toy import toy_runner

from idlevit_mm import checkpoints
from idlevit_mm.converters import convert_file
from idlevit_mm.engine import ResumableRunner, launch
from idlevit_mm.engine.checks import check_pretrained, check_teachers

TEXT = "import os\nos.system('touch {made}')\ntrain_dataloader = dict(batch_size=3)\n"
WEIGHTS = {'backbone.weight': torch.ones(4, 3), 'backbone.bias': torch.ones(4)}


class Call:
    """Is pickled as the call of a function, and the state of what it returns."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Program(torch.nn.Module):
    """Writes a file when torch reads it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = torch.ones(2)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.path, self.training = state
        torch.save(self.weight, self.path)

    def forward(self, x):
        return x + self.weight


def array_of(dtype, raw=b'\x08' * 8):
    start = (np.ndarray, (0,), b'b')
    return Call(np._core.multiarray._reconstruct, start, (1, (1,), dtype, False, raw))


def dtype_of(code, *state):
    """A dtype with another state than numpy gives it."""
    return Call(np.dtype, (code, False, True), (3, '<', *state))


def objects(code='O8'):
    """A dtype of objects, less the state that numpy writes and torch would refuse."""
    return Call(np.dtype, (code, False, True))


def fields(inner):
    return dtype_of('f8', None, ('a',), {'a': (inner, 0)}, 8, 8, 0)


def nested():
    """A tuple of 2 ** 48 parts in some hundred bytes."""
    value = ()
    for _ in range(48):
        value = (value, value)
    return value


def tensor_of(size, stride):
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    return Call(_rebuild_tensor_v2, (storage, 0, size, stride, False, OrderedDict()))


def rewritten(path, change, folder=None, compression=zipfile.ZIP_STORED):
    """Write a zip archive again, its members changed and in another folder."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as target:
        for name, data in members.items():
            inner = name.partition('/')[2]
            target.writestr(f'{folder or name.partition("/")[0]}/{inner}', change(inner, data))


# What is beside the weights; they themselves can be had by stripping.
BESIDE = {
    'payload': lambda made: Call(os.mkdir, (str(made),)),
    'import': lambda made: Call(__import__, ('antigravity',)),
    'text to run': lambda made: Call(eval, (f'__import__("os").mkdir({str(made)!r})',)),
    'object field': lambda made: array_of(fields(objects())),
    'object field of a field': lambda made: array_of(fields(fields(objects()))),
    'object fields by their names': lambda made: array_of(objects([('a', 'O')])),
    'object fields in a text': lambda made: array_of(objects('O,i4'), b'\x08' * 12),
    'sub-array of objects': lambda made: array_of(
        dtype_of('f8', (objects(), (1,)), None, None, 8, 8, 0)
    ),
    'object field of a text': lambda made: array_of(
        dtype_of('U2', None, ('a',), {'a': (objects(), 0)}, 8, 8, 0)
    ),
    'dtype alone': lambda made: fields(objects()),
    'objects': lambda made: np.array([Call(os.mkdir, (str(made),))], dtype=object),
    'records': lambda made: np.zeros(2, [('a', 'f4'), ('b', 'O')]),
    'scalar of objects': lambda made: Call(
        np._core.multiarray.scalar, (fields(objects()), b'\x08' * 8)
    ),
    'object as a scalar': lambda made: Call(np._core.multiarray.scalar, (objects(), 'a')),
    'byte order': lambda made: np.arange(3.0).astype('>f8'),
    'array larger than its bytes': lambda made: Call(
        np._core.multiarray._reconstruct,
        (np.ndarray, (0,), b'b'),
        (1, (2**40,), np.dtype('f8'), False, b'\x08' * 8),
    ),
    'array by its class': lambda made: Call(np.ndarray, ((2**40,), 'f8')),
    'large scalar': lambda made: Call(
        np._core.multiarray.scalar, (Call(np.dtype, ('U999999999',)), b'')
    ),
    'array of nested tuples': lambda made: Call(HistoryBuffer, (nested(), nested())),
    'record that is called': lambda made: Call(HistoryBuffer.mean, (HistoryBuffer(),)),
    'name of many': lambda made: Call(np.dtype, (nested(),)),
    'large bytes': lambda made: Call(bytearray, (2**40,)),
    'large tensor': lambda made: Call(torch.Tensor, (2**40,)),
    'sparse': lambda made: torch.sparse_coo_tensor([[0]], [1.0], (2**40,)),
    'quantized': lambda made: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    'meta': lambda made: torch.empty(2**40, device='meta'),
}
# What is wrong with the weights or the file.


def deep(order):
    """A tuple of two tuples that are one, and so on: it hashes for ever, and is a key."""
    levels = b')q\0' + b''.join(b'h%ch%c\x86q%c' % (n, n, n + 1) for n in range(60))
    key = b'h<'
    return (
        b'\x80\x04'
        + levels
        + {
            'entry': b'}' + key + b'K\x01s.',
            'entries': b'}(' + key + b'K\x01u.',
            'set': b'\x8f(' + key + b'\x90.',
            'frozen set': b'(' + key + b'\x91.',
            'set of old': b'c__builtin__\nset\n]' + key + b'a\x85R.',
            'counter': b'ccollections\nCounter\n]' + key + b'a\x85R.',
            'ordered': b'ccollections\nOrderedDict\n]]' + key + b'aK\x01aa\x85R.',
        }[order]
    )


def repeated():
    """200 texts of a megabyte, of which the file has one."""
    text = b'x' * 10**6
    call = b'h\2h\1X\6\0\0\0latin1\x86Ra'
    start = b'\x80\2X' + len(text).to_bytes(4, 'little') + text + b'q\x010c_codecs\nencode\nq\x020]'
    return start + call * 200 + b'.'


def archive(path, pickled):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a/data.pkl', pickled)
        file.writestr('a/byteorder', 'little')


DEEP = ('entry', 'entries', 'set', 'frozen set', 'set of old', 'counter', 'ordered')
WHOLE = {
    'repeated text': lambda path, made: archive(path, repeated()),
    'view of one number': lambda path, made: torch.save({'w': torch.ones(1).expand(2**40)}, path),
    'many views': lambda path, made: torch.save(
        {f'w{i}': torch.ones(1).expand(2**28) for i in range(64)}, path
    ),
    'view beyond': lambda path, made: torch.save({'w': tensor_of((2, 2), (4, 1))}, path),
    'large view beyond': lambda path, made: torch.save({'w': tensor_of((2**40,), (1,))}, path),
    'negative view': lambda path, made: torch.save({'w': tensor_of((-1,), (1,))}, path),
    'large storage': lambda path, made: large_storage(path, False),
    'large storage, older': lambda path, made: large_storage(path, True),
    'program': lambda path, made: program(path, made),
    'program in an odd folder': lambda path, made: (
        program(path, made),
        rewritten(path, lambda name, data: data, 'Ünïcode .pkl'),
    ),
    'program in folders': lambda path, made: (
        program(path, made),
        rewritten(path, lambda name, data: data, 'a/../b'),
    ),
    'bomb': lambda path, made: (
        torch.save({'w': torch.zeros(2**22)}, path),
        rewritten(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED),
    ),
    'overlapping members': lambda path, made: overlapping(path),
    'second pickle': lambda path, made: (
        torch.save(WEIGHTS, path),
        zipfile.ZipFile(path, 'a').writestr('hostile/data.pkl', b'\x80\x02}.'),
    ),
    'tar': lambda path, made: tarred(path),
}


def program(path, made):
    torch.jit.script(Program(str(made))).save(str(path))
    Path(made).unlink(missing_ok=True)


def large_storage(path, older):
    torch.save({'w': torch.ones(3)}, path, _use_new_zipfile_serialization=not older)

    def change(name, data):
        # Three numbers, then a shape of three and a step of one.
        return data.replace(b'K\x03', b'J\xff\xff\xff\x7f') if name == 'data.pkl' else data

    if older:
        path.write_bytes(change('data.pkl', path.read_bytes()))
    else:
        rewritten(path, change)


def overlapping(path):
    torch.save({'w': torch.zeros(2**14), 'v': torch.zeros(2**14)}, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [i.header_offset for i in archive.infolist() if 'data/' in i.filename]
    size = len(data)
    for _ in range(2):  # the list of members is behind the members
        data = data.replace(places[1].to_bytes(4, 'little'), places[0].to_bytes(4, 'little'))
    data = data.replace((2**16).to_bytes(4, 'little') * 2, (size - 2**12).to_bytes(4, 'little') * 2)
    path.write_bytes(data)


def tarred(path):
    folder = path.with_suffix('.d')
    folder.mkdir()
    for name in ('pickle', 'storages'):
        (folder / name).write_bytes(b'\x80\x02K\x00.')
    with tarfile.open(path, 'w') as archive:
        for name in ('pickle', 'storages'):
            archive.add(folder / name, name)


def write(name, path, made):
    """Write a hostile checkpoint; its code, if any, makes something at ``made``."""
    if name in BESIDE:
        meta = dict(epoch=1, iter=3, hostile=BESIDE[name](made))
        torch.save(dict(state_dict=WEIGHTS, meta=meta, optimizer={}), path)
    else:
        WHOLE[name](path, made)


# --- whatever opens a checkpoint ----------------------------------------------------------------

CONFIG = """
default_scope = 'mmdet'
model = dict(type='RetinaNet', bbox_head=dict(init_cfg=None))
train_dataloader = test_dataloader = test_evaluator = dict(dataset=dict())
train_cfg = test_cfg = optim_wrapper = dict()
work_dir = 'work'
"""


def _config(place):
    (place / 'config.py').write_text(CONFIG)
    return str(place / 'config.py')


def _auto(path, place):
    (place / 'work').mkdir()
    shutil.copy(path, place / 'work' / 'epoch_1.pth')
    return launch.train_from_config(_config(place), str(place / 'work'), 'auto')


def _pretrained(path, place):
    module = BaseModule(dict(type='Pretrained', checkpoint=str(path)))
    module.backbone = torch.nn.Linear(3, 4)
    module.init_weights()


def _teacher(path, place):
    losses = [dict(type='FeatureDistillationLoss', teacher=dict(checkpoint=str(path)))]
    check_teachers(dict(custom_hooks=[dict(losses=losses)]))


def _resume(path, place, runner=Runner):
    toy_runner(place / 'work', runner=runner, load_from=str(path), resume=True).train()


TOOLS = {
    'load_checkpoint': lambda path, place: checkpoints.load_checkpoint(path),
    'read_weights': lambda path, place: checkpoints.read_weights(path),
    'convert': lambda path, place: convert_file(path, place / 'new.pth', 'timm'),
    'train --resume FILE': lambda path, place: launch.train_from_config(
        _config(place), str(place / 'work'), str(path)
    ),
    'train --resume': _auto,
    'train with load_from': lambda path, place: launch.train_from_config(
        _config(place), str(place / 'work'), cfg_options=dict(load_from=str(path))
    ),
    'test': lambda path, place: launch.evaluate_from_config(
        _config(place), str(path), str(place / 'work')
    ),
    'init_cfg': lambda path, place: check_pretrained(
        dict(model=dict(init_cfg=dict(type='Pretrained', checkpoint=str(path))))
    ),
    'teacher': _teacher,
    'CheckpointLoader': lambda path, place: CheckpointLoader.load_checkpoint(str(path)),
    'mmengine.load_checkpoint': lambda path, place: load_checkpoint(
        torch.nn.Linear(3, 4), str(path), 'cpu'
    ),
    'init_cfg of any module': _pretrained,
    'Runner.load_checkpoint': lambda path, place: toy_runner(
        place / 'work', runner=Runner
    ).load_checkpoint(str(path)),
    'Runner.resume': _resume,
    'ResumableRunner.resume': lambda path, place: _resume(path, place, ResumableRunner),
}
# These take out of a file what is sound, and leave the rest.
LENIENT = {
    'strip': lambda path, place: checkpoints.strip_checkpoint(path, place / 'stripped.pth'),
    'print_config': lambda path, place: checkpoints.config_text(path),
}

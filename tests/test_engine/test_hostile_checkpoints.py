"""Nothing in a checkpoint runs, or takes more memory than the file has bytes, whoever opens it."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import (
    BESIDE,
    DEEP,
    LENIENT,
    TEXT,
    TOOLS,
    WEIGHTS,
    WHOLE,
    Call,
    archive,
    deep,
    fields,
    rewritten,
    write,
)
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner
from toy import toy_runner

from idlevit_mm.checkpoints import config_text, load_checkpoint
from idlevit_mm.checkpoints.safe_load import read
from idlevit_mm.checkpoints.ways import settings_of
from idlevit_mm.engine import ResumableRunner, launch
from idlevit_mm.errors import BrokenCheckpointError, UnsafeCheckpointError, UsageError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    """Writes a hostile checkpoint once: its path, and what its code would make."""
    place, written = tmp_path_factory.mktemp('hostile'), {}

    def get(name):
        path, made = place / name.replace(' ', '_') / 'hostile.pth', place / f'made_{name}'
        if name not in written:
            path.parent.mkdir()
            written[name] = path
            write(name, path, made)
        return path, made

    return get


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """No reading goes by what would run a file."""

    def run(*args, **kwargs):
        pytest.fail('contents of a checkpoint were about to run')

    monkeypatch.setattr(torch.jit, 'load', run)
    monkeypatch.setattr(Config, 'fromstring', run)


# All of them where reading differs, the worst where the rest goes by the same readers.
READERS = ('load_checkpoint', 'CheckpointLoader', 'strip')
WORST = ('payload', 'object field', 'program', 'view of one number')


@pytest.mark.parametrize('name', [*BESIDE, *WHOLE])
def test_refused_by_everything_that_opens_it(hostile, tmp_path, name):
    path, made = hostile(name)
    for number, (tool, call) in enumerate({**TOOLS, **LENIENT}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        if tool not in READERS and name not in WORST:
            continue
        if tool == 'strip' and name in BESIDE:
            assert call(path, folder)[0] == len(WEIGHTS)
            stripped = load_checkpoint(folder / 'stripped.pth')['state_dict']
            assert stripped.keys() == WEIGHTS.keys()
        else:
            with pytest.raises(UsageError) as error:
                call(path, folder)
            of_weights = tool in LENIENT and name in BESIDE
            check_refusal(error.value, name, 'holds no config' if of_weights else '')
        assert not made.exists(), tool


def check_refusal(error, name, other):
    """Check what is said of a hostile checkpoint; something other if only part of it was read."""
    message = str(error)
    assert other in message
    assert message.count('checkpoint ') >= 1
    assert 'weights_only' not in message, "torch's advice to read it all the same"
    assert '\n' not in message
    if other:
        return
    assert 'hostile.pth' in message or 'epoch_1.pth' in message
    if name not in ('tar', 'large storage, older'):  # as if cut off
        assert isinstance(error, UnsafeCheckpointError) or 'can be resumed' in message
        assert ('strip_checkpoint' in message) == (name in BESIDE)


@pytest.mark.parametrize(
    ('scheme', 'name'),
    [*zip(['http', 'petrel', 'openmmlab'], WORST, strict=False), ('http', WORST[3])],
)
def test_refused_from_other_places(hostile, tmp_path, monkeypatch, scheme, name):
    path, made = hostile(name)
    backend = type('Backend', (), {'get': lambda self, name: path.read_bytes()})
    monkeypatch.setattr('mmengine.runner.checkpoint.get_file_backend', lambda *a, **k: backend())
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text(json.dumps({'there': str(path)}))
    monkeypatch.setattr(
        torch.hub,
        'download_url_to_file',
        lambda url, target, *a, **k: Path(target).write_bytes(path.read_bytes()),
    )
    address = dict(http='http://there/a.pth', petrel='petrel://a', openmmlab='openmmlab://there')
    with pytest.raises(UnsafeCheckpointError) as error:
        CheckpointLoader.load_checkpoint(address[scheme], map_location='cpu')
    assert not made.exists()
    assert 'weights_only' not in str(error.value)


def test_torch_itself_gives_no_dtype_objects(hostile):
    """Our list makes torch's own reader accept numpy's classes; fields stay out of them."""
    for name in (n for n in BESIDE if 'object' in n or 'dtype' in n):
        path, _ = hostile(name)
        found = np.dtype('f8')
        with contextlib.suppress(Exception):  # torch and numpy have many
            found = torch.load(path)['meta']['hostile']
        dtype = getattr(found, 'dtype', found)
        assert dtype == np.float64, name
        assert not dtype.hasobject, name
        assert dtype.fields is None, name


def test_dtypes_of_numpy_stay_as_they_are(tmp_path):
    """numpy gives the same dtype to everybody."""
    torch.save([fields(np.dtype('i4')), np.arange(2.0)], tmp_path / 'bad.pth')
    dtype, array = torch.load(tmp_path / 'bad.pth')
    assert dtype == array.dtype == np.float64
    assert dtype.fields is None
    with pytest.raises(UnsafeCheckpointError, match='dtype with fields'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'bad.pth'))


# --- what is sound is read as by torch ------------------------------------------------------------


@pytest.mark.parametrize('kind', ['older', 'newer', 'rewritten'])
@pytest.mark.parametrize('buffer', [True, False])
def test_read_as_by_torch(tmp_path, kind, buffer):
    base = torch.arange(24.0).view(4, 6)
    weights = {
        str(dtype): torch.ones(3, 2).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    }
    weights.update(
        view=base[1:, ::2], turned=base.t(), again=base, scalar=torch.tensor(2.0),
        empty=torch.empty(0, 3), spread=torch.ones(1).expand(5), own=torch.nn.Parameter(base),
    )  # fmt: skip
    others = dict(
        numbers=(1, -(2**70), 1.5, 1j, True, None),
        text='a\u00e4',
        data=b'\x00\xff',
        array=np.arange(6.0).reshape(2, 3),
        words=np.array(['a', 'bcd']),
        scalar=np.float32(2),
        kinds=[torch.float32, torch.Size([1, 2]), torch.device('cpu')],
        sets={1, 2},
    )
    path = tmp_path / 'a.pth'
    both = dict(state_dict=weights, **others)
    torch.save(both, path, _use_new_zipfile_serialization=kind != 'older')
    if kind == 'rewritten':
        rewritten(path, lambda name, data: data)  # numbers lie at any place
    found = read(io.BytesIO(path.read_bytes())) if buffer else load_checkpoint(path)
    state = found.pop('state_dict')
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert state[name].dtype == value.dtype
        assert state[name].stride() == value.stride()
        assert torch.equal(state[name], value), name
    assert state['turned'].data_ptr() == state['again'].data_ptr(), 'what was shared stays shared'
    assert type(state['own']) is torch.nn.Parameter
    for name in ('array', 'words'):
        np.testing.assert_array_equal(found.pop(name), others.pop(name))
    assert found == others
    assert isinstance(found['scalar'], np.float32)


@pytest.mark.parametrize('place', ['meta', torch.device('meta'), {'cpu': 'meta'}, None])
def test_places(tmp_path, place):
    torch.save(WEIGHTS, tmp_path / 'a.pth')
    wanted = torch.load(tmp_path / 'a.pth', map_location=place)
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), map_location=place)
    assert {k: (v.device, v.shape) for k, v in found.items()} == {
        k: (v.device, v.shape) for k, v in wanted.items()
    }
    seen = []
    CheckpointLoader.load_checkpoint(
        str(tmp_path / 'a.pth'), map_location=lambda storage, location: seen.append(location)
    )
    assert seen == ['cpu', 'cpu']


def test_what_the_user_trusts_is_read(tmp_path):
    torch.save({'a': Mine(3)}, tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError, match=r'Mine'):
        load_checkpoint(tmp_path / 'a.pth')
    with torch.serialization.safe_globals([Mine]):
        assert load_checkpoint(tmp_path / 'a.pth')['a'].value == 3


class Mine:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.99])
def test_cut_off_files_of_both_kinds(tmp_path, share):
    for zipped in (True, False):
        path = tmp_path / 'cut.pth'
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        for reading in (load_checkpoint, config_text):
            with pytest.raises(BrokenCheckpointError, match=r'cut\.pth cannot be read'):
                reading(path)


def test_safetensors_that_declare_more_than_they_have(tmp_path):
    for size, end in ((2**40, 2**42), (2**40, 4), (1, 2**42)):
        header = json.dumps({'w': dict(dtype='F32', shape=[size], data_offsets=[0, end])}).encode()
        for length in (len(header), 2**62):
            path = tmp_path / 'w.safetensors'
            path.write_bytes(length.to_bytes(8, 'little') + header + b'\0' * 4)
            with pytest.raises(BrokenCheckpointError, match=r'w\.safetensors cannot be read'):
                load_checkpoint(path)


# --- configs are text -----------------------------------------------------------------------------


def runner_to_resume(folder, change, **settings):
    """Train, change the checkpoint, and have a runner that goes on from it."""
    toy_runner(folder, train_cfg=dict(by_epoch=True, max_epochs=1)).train()
    path = folder / 'epoch_1.pth'
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    return toy_runner(folder, load_from=str(path), resume=True, **settings), path


TEXTS = [
    TEXT,
    'gpu_ids = __import__("os").system("touch {made}")',
    "_base_ = '{made}'\ncustom_imports = dict(imports=['antigravity'])",
    '{{{{fileDirname}}}} = (',
    'gpu_ids = 3',
    'gpu_ids = range(0, 1)',
    '-' * 10**5 + '1',
    'x = ' + '[' * 10**4,
    'x = 1' + '+1' * 10**5,
    'x' * 2**21,
    '\0',
    3,
    None,
    b'x = 1',
    torch.ones(2),
    ['x = 1'],
]


@pytest.mark.parametrize('runner', [Runner, ResumableRunner])
def test_a_config_does_not_run_on_resuming(tmp_path, runner, subtests):
    made = tmp_path / 'made'
    # What reads the text does not depend on the runner.
    for number, text in enumerate(TEXTS if runner is Runner else TEXTS[:3]):
        text = text.replace('{made}', str(made)) if isinstance(text, str) else text

        def change(checkpoint, text=text):
            checkpoint['meta'].update(config=text, cfg=text)
            checkpoint['message_hub']['runtime_info'].update(cfg=text)
            checkpoint['message_hub']['resumed_keys'].update(cfg=True)

        with subtests.test(repr(text)[:30]):
            resumed, path = runner_to_resume(tmp_path / str(number), change, runner=runner)
            resumed.train()
            assert resumed.iter == 12
            assert not made.exists()
            if text == TEXT.replace('{made}', str(made)):
                assert config_text(path) == text


def test_a_key_that_would_be_hashed_for_ever_is_refused(tmp_path):
    for order in DEEP:
        archive(tmp_path / 'a.pth', deep(order))
        with pytest.raises(UnsafeCheckpointError, match='a key of very many parts'):
            load_checkpoint(tmp_path / 'a.pth')


def test_flexible_runners_too():
    assert FlexibleRunner.resume.__globals__['mmengine'].Config.fromstring is settings_of
    assert Runner.resume.__globals__['mmengine'].__version__


def test_the_number_of_gpus_is_read_as_data():
    """It is all that mmengine reads of a config in a checkpoint."""
    for gpus in ([0, 1, 2], (0, 1, 2), range(1, 4)):
        text = Config(dict(a=dict(b='gpu_ids = [7]'), gpu_ids=gpus, z=[1])).pretty_text
        assert len(settings_of(text)['gpu_ids']) == 3
    for text in ("gpu_ids = [open('x')]", 'gpu_ids = range(0, 10 ** 9)', 'gpu_ids = 3', 'a = 1'):
        assert settings_of(text) == {}
    for endless in (
        'gpu_ids = [' + ' 1,' * 10**6,
        'gpu_ids = ' + '\n' * 10**6,
        'gpu_ids\n' * 10**6,
    ):
        assert settings_of(endless) == {}


def test_another_number_of_gpus_is_one_line(tmp_path):
    runner, _ = runner_to_resume(
        tmp_path, lambda checkpoint: checkpoint['meta'].update(config='gpu_ids = range(0, 8)')
    )
    with pytest.raises(UsageError, match=r'another number of GPUs \(gpu_ids\).*--auto-scale-lr'):
        launch.naming_the_remedy(runner.train)


def test_the_tools(hostile, tmp_path, monkeypatch, capsys):
    text = TEXT.format(made=tmp_path / 'made') + '\x1b[2J\rhidden'
    torch.save({'meta': dict(cfg=text), 'a': Call(print, ('ran',))}, tmp_path / 'a.pth')

    def run(tool, *args):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        runpy.run_path(str(ROOT / 'tools' / 'model_converters' / tool), run_name='__main__')
        return capsys.readouterr().out

    printed = run('print_config.py', tmp_path / 'a.pth')
    assert printed == text.replace('\x1b', '?').replace('\r', '?') + '\n'
    for name in ('program', 'view of one number'):
        path, made = hostile(name)
        with pytest.raises(SystemExit, match='2'):
            run('strip_checkpoint.py', path, tmp_path / 'new.pth')
        error = capsys.readouterr().err.strip()
        assert error.startswith('error: checkpoint ')
        assert '\n' not in error
        assert not made.exists()
        assert not (tmp_path / 'new.pth').exists()

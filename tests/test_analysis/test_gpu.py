"""The run for whoever has a GPU, on tiny backbones and the CPU; what only a GPU can do is faked."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import measures
import parity
import pytest
import torch
import traffic
from mmengine.registry import MODELS
from presets import PRESETS
from traffic import Traffic

from idlevit_mm import analysis
from idlevit_mm.analysis.models import noise_image
from idlevit_mm.kernels.triton import ops
from idlevit_mm.policies import scorers

pytestmark = pytest.mark.usefixtures('tiny_presets')

ROOT = Path(__file__).parents[2]
TINY = ('--device', 'cpu', '--models', 'tiny-swin', '--shapes', '64x72', '--batches', '1')
TINY += ('--parity-models', 'tiny-swin', 'tiny-pvt', '--parity-shapes', '61x45')
TINY += ('--rounds', '3', '--modes', 'eager', 'captured')


@pytest.fixture
def gpu(run_tool, tmp_path, monkeypatch):
    """Runs the tool on tiny backbones, with more options, to its exit code and lines of results."""
    # In maps of a few tokens a single one is a large share.
    limits = {dtype: (error, 0.8) for dtype, (error, _) in parity.LIMITS.items()}
    monkeypatch.setattr(parity, 'LIMITS', limits)

    def run(*options):
        code = run_tool('gpu', *TINY, '--out-dir', tmp_path, *options)
        lines = (tmp_path / 'results.jsonl').read_text(encoding='utf-8').splitlines()
        return code, [json.loads(line) for line in lines]

    return run


def test_all_is_measured_once(gpu, tmp_path, capsys):
    code, lines = gpu()
    assert code == 0
    assert [line.get('what', 'run') for line in lines] == (
        ['run'] + (['parity'] * 6 + ['gradients'] * 2) * 2 + ['traffic'] * 2 + ['times']
    )
    run, checked, dense, half, times = lines[0], lines[1], *lines[-3:]
    assert 0 < lines[7]['relative_error'] < 3e-3
    assert 'cores' in run['machine']
    assert 'torch' in run['versions']
    assert checked['backend'] == 'cpu'
    assert 'cpu' in checked['why_not']
    assert dense['operations'] < half['operations']
    assert dense['bytes'] > 1e5
    assert set(times['candidates']) == {'keep 1', 'keep 0.7', 'keep 0.5', "mmdet's dense"}
    assert times['candidates']['keep 1']['own'] == [1, 1, 1]
    told = capsys.readouterr().out
    assert '[19/19, ' in told
    report = (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert report in told
    assert '| tiny-swin | 1×64×72 | eager |' in report
    assert (tmp_path / 'times.png').stat().st_size > 0
    code, again = gpu('--max-minutes', '0')
    assert code == 0
    assert again[:-1] == lines
    assert again[-1] == run | dict(command=again[-1]['command'])
    assert '19 of 19 cases are in' in capsys.readouterr().out


def test_what_fails_is_named_and_tried_again(gpu, tool, monkeypatch, capsys):
    wanted, tried = '2×61×45 keep 0.5', []

    def broken(self, seen):
        raise RuntimeError('no\nscores')

    with monkeypatch.context() as patch:
        patch.setattr(scorers.MeanDistance, 'forward', broken)
        code, lines = gpu('--parity-models', 'tiny-pvt')
    assert code == 1
    # Whatever keeps all tokens asks for none.
    failed = {line['keep']: line['error'] for line in lines if line.get('what') == 'parity'}
    assert failed == {1.0: None, 0.5: 'RuntimeError: no scores', 0.3: 'RuntimeError: no scores'}
    assert f'parity tiny-pvt fp16 {wanted}: FAILED: RuntimeError: no scores' in (
        capsys.readouterr().out
    )
    assert 'keep 0.7: RuntimeError: no scores' in lines[-1]['error']

    def fail(case, *_):
        tried.append(case['what'])
        raise RuntimeError('again')

    measures = dict.fromkeys(('parity', 'gradients', 'traffic', 'times'), fail)
    monkeypatch.setattr(tool('gpu'), 'MEASURES', measures)
    gpu()
    # Eight are new; eight have failed before, of all kinds.
    new, old = ['parity'] * 6 + ['gradients'] * 2, ['parity'] * 4 + ['gradients'] * 2
    assert tried == [*new, *old, 'traffic', 'times']


def test_no_case_is_started_that_would_end_late(gpu, capsys):
    code, lines = gpu('--max-minutes', '0')
    assert code == 0
    assert len(lines) == 1
    assert '19 cases are left: the same command' in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_one_line(run_tool, tmp_path, capsys):
    assert run_tool('gpu', '--out-dir', tmp_path / 'none') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: no GPU')
    assert not (tmp_path / 'none').exists()


def test_it_needs_no_library_of_tasks_nor_of_tables(gpu, monkeypatch, capsys):
    """What is there where the kernels are to run: torch, mmengine, mmcv-lite, timm."""
    for name in ('mmdet', 'mmseg', 'mmcv.ops', 'pandas', 'tabulate', 'matplotlib'):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ('mmdet.models', 'matplotlib.figure'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # All that the tool imports is imported anew, but for the tiny presets.
    for name in ('models', 'results'):
        monkeypatch.setattr(analysis, name, getattr(analysis, name, None), raising=False)
        monkeypatch.delitem(sys.modules, f'idlevit_mm.analysis.{name}', raising=False)
    for name in ('gpu', 'gpu_report', 'measures', 'parity', 'traffic'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # What was imported here is not kept, as little as what was there.
    with mock.patch.dict(sys.modules):
        code, lines = gpu('--models', 'tiny-pvt', '--parity-models')
    assert code == 0
    told = capsys.readouterr().out
    assert 'matplotlib is not installed' in told
    assert '| tiny-pvt | 1×64×72 | eager | – |' in told
    assert 'note: the dense class of IdlePyramidVisionTransformerV2' in told
    assert [line.get('what') for line in lines] == [None, 'traffic', 'traffic', 'times']


def test_make_gpu_takes_another_interpreter_as_it_is():
    def make(*args):
        command = ['make', '--no-print-directory', *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert 'make gpu ' in make('help')
    told = make('-n', 'gpu', 'GPU_PYTHON=python3.12', 'GPU_ARGS=--rounds 9')
    assert 'python3.12 tools/analysis_tools/gpu.py --rounds 9' in told
    assert 'setup' not in told
    assert 'setup' in make('-n', 'gpu')


# --- Parity -----------------------------------------------------------------------------------


@pytest.fixture
def runs():
    """A tiny backbone in float32, images, and what it gives: maps and active tokens."""
    model = MODELS.build(dict(PRESETS['tiny-swin'], keep_ratios=0.5)).eval()
    parity.randomize(model)
    images = noise_image((2, 3, 61, 93))
    with torch.no_grad():
        return model, images, list(model(images)), model.keep_masks


def test_a_run_is_equal_to_itself(runs):
    model, images, outs, masks = runs
    found = parity.difference(outs, masks, model, images)
    assert found.relative_error < 1e-6
    assert found.shared == 1
    assert not found.wrong(torch.float16)


def test_other_tokens_are_told_from_other_numbers(runs):
    model, images, outs, masks = runs
    idle = [[~mask for mask in stage] for stage in masks]
    assert parity.difference(outs, idle, model, images).shared < 0.5
    with torch.no_grad():
        model.stages[0].blocks[0].attn.w_msa.proj.bias.add_(0.1)
    found = parity.difference(outs, masks, model, images)
    assert found.relative_error > 3e-3
    (text,) = found._replace(shared=1.0).wrong(torch.float16)
    assert text.startswith('relative error ')
    outs[1][0, 0, 0, 0] = torch.nan
    assert parity.difference(outs, masks, model, images).wrong(torch.bfloat16)


def test_a_compiler_that_computes_something_else_is_found(runs, monkeypatch):
    model, images, *_ = runs
    monkeypatch.setattr(torch, 'compile', lambda model, dynamic: model)
    with torch.no_grad():
        assert len(parity.checked_call(model, images, 'compiled')()) == 2
        monkeypatch.setattr(torch, 'compile', lambda *_, **__: lambda x: [-y for y in model(x)])
        with pytest.raises(RuntimeError, match='compiled differ by 2.0e'):
            parity.checked_call(model, images, 'compiled')


# --- Traffic ----------------------------------------------------------------------------------


def moved(function, *args):
    with Traffic() as counted:
        function(*args)
    return counted.bytes.total(), counted.operations.total()


def test_bytes_of_operations():
    x, ids = torch.zeros(100, 4), torch.tensor([3, 5])
    rows = torch.zeros(2, 4)
    assert moved(lambda: x.t().view(4, 100)) == (0, 0)
    assert moved(lambda: torch.empty(9)) == (0, 0)
    assert moved(lambda: x @ x.t()) == (2 * 1600 + 100 * 100 * 4, 1)
    assert moved(lambda: x + x[:1].expand_as(x)) == (1600 + 16 + 1600, 1)
    assert moved(x.zero_) == (1600, 1)
    assert moved(lambda: x.add_(1)) == (3200, 1)
    # Ids, and two rows read and written.
    assert moved(lambda: x.index_select(0, ids)) == (16 + 64, 1)
    assert moved(lambda: x[ids]) == (16 + 64, 1)
    assert moved(lambda: x.index_copy_(0, ids, rows)) == (16 + 64, 1)
    assert moved(lambda: x.index_add_(0, ids, rows)) == (16 + 96, 1)
    # Not in place: all is copied before.
    assert moved(lambda: x.index_copy(0, ids, rows)) == (3200 + 16 + 64, 1)


def test_operators_tell_what_they_move():
    x = torch.zeros(1, 100, 16, device='meta')
    ids = torch.zeros(1, 2, dtype=torch.long, device='meta')
    with Traffic() as counted:
        ops.take_norm(x, ids, None, None, None, 0.0)
    assert counted.bytes == {'idlevit_mm::take_norm': 2 * 64 + 16 + 2 * 64}
    assert counted.kernels == 1


def test_launches_are_events_of_the_device(monkeypatch):
    times = type('Range', (), dict(elapsed_us=lambda self: 5))()
    on = [traffic.DeviceType.CPU, traffic.DeviceType.CUDA, traffic.DeviceType.CUDA]
    events = [
        type('Event', (), dict(device_type=where, time_range=times, name='copy')) for where in on
    ]
    recorded = type('Recorded', (), dict(events=lambda self: events))()
    monkeypatch.setattr(traffic, 'profile', lambda **_: contextlib.nullcontext(recorded))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    assert traffic.launches(lambda: None) == {'copy': [5e-6, 5e-6]}


# --- CUDA graphs ------------------------------------------------------------------------------


def test_a_call_is_recorded_after_it_was_warm(monkeypatch):
    diary = []

    class Stream:
        def wait_stream(self, other):
            diary.append('wait')

    class Graph:
        def replay(self):
            diary.append('replay')

    for name, fake in (
        ('Stream', Stream),
        ('current_stream', Stream),
        ('stream', lambda stream: contextlib.nullcontext()),
        ('CUDAGraph', Graph),
        ('graph', lambda graph: contextlib.nullcontext(diary.append('record'))),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = measures.captured(lambda: diary.append('call') or len(diary), warmup=2)
    assert diary == ['wait', 'call', 'call', 'wait', 'record', 'call']
    assert replay() == replay() == 6
    assert diary[6:] == ['replay', 'replay']

"""The benchmark tool on tiny backbones: cases, candidates, failures, files and tables."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import measures
import pytest
import torch
from measures import allocations, peak_of
from mmengine.registry import MODELS
from PIL import Image
from presets import PRESETS, TIMM, timm_twin

from idlevit_mm.errors import UsageError

pytestmark = pytest.mark.usefixtures('tiny_presets')

ROOT = Path(__file__).parents[2]
TIMINGS = ROOT / 'docs' / 'studies' / 'speed'


@pytest.fixture
def benchmark(tool):
    return tool('benchmark')


@pytest.fixture
def report(tool):
    return tool('benchmark_report')


@pytest.fixture
def timed(benchmark, monkeypatch):
    """Measures a dense and a half as wide convolution that takes 2 of its 4 seconds, and more."""

    def run(*more, first=None, seconds=2.0, **conditions):
        first = first or benchmark.Candidate('dense', 'host', _always(torch.nn.Conv2d(3, 8, 1)))
        half = benchmark.Candidate('half', 'idle', _always(torch.nn.Conv2d(3, 4, 1)), keep=0.5)
        running = []
        for candidate in (first, half, *more):
            candidate.build(None).register_forward_hook(
                lambda *_, name=candidate.name: running.append(name)
            )
        spans = {'half': seconds}
        monkeypatch.setattr(
            measures, 'seconds_of', lambda call: (call(), spans.get(running[-1], 4.0))[1]
        )
        case = dict(target='tiny', part='backbone', shape=[33, 47], batch=1, dtype='float32')
        case |= dict(mode='inference', compile='none', device='cpu', threads=1) | conditions
        args = benchmark.parse_args(['swin-t', '--rounds', '3', '--warmup', '1', '--memory'])
        benchmark.measure(case, [first, half, *more], args)
        return case

    return run


def _always(module):
    return lambda shape: module


def _failing(benchmark, name, kind):
    """A candidate that cannot be trained."""
    module = torch.nn.Conv2d(3, 8, 1)

    def fail(*_):
        if torch.is_grad_enabled():
            raise RuntimeError('out of\nmemory ' + 'x' * 200)

    module.register_forward_pre_hook(fail)
    return benchmark.Candidate(name, kind, _always(module))


# --- Memory, presets --------------------------------------------------------------------------


def test_peak_of_a_call():
    weight = torch.ones(1000, requires_grad=True)

    def call():
        return weight.exp().sin().exp().cos().sum()

    # Each result of 4000 bytes is freed once the next is there.
    with torch.no_grad():
        assert peak_of(allocations(call)) == 8_000
    # Both exp() are saved; at the end cos() and the sum, one number, are there as well.
    assert peak_of(allocations(call)) == 12_004
    assert [peak_of(changes) for changes in ((), (-8,), (-50, 100, 20))] == [0, 0, 70]


def test_twins_of_timm_have_the_architecture_and_take_odd_sizes():
    pytest.importorskip('timm')
    for name in ('swin-t', 'swin-l', 'pvtv2-b0', 'pvtv2-b5', 'pcpvt-s', 'svt-s', 'dinov2-s'):
        own = MODELS.build(dict(PRESETS[name]))
        with torch.device('meta'):
            twin = timm_twin(TIMM[name], (384, 384), 0.0)
        # Norms of the outputs timm has none; in maps below a window its tables are smaller.
        sizes = [sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (twin, own)]
        assert sizes[0] == sizes[1], name
    for name, maps in (('swin-t', 4), ('pvtv2-b0', 4), ('dinov2-s', 1)):
        twin = timm_twin(TIMM[name], (225, 230), 0.0).eval()
        with torch.no_grad():
            assert len(twin(torch.zeros(1, 3, 225, 230))) == maps


# --- Candidates -------------------------------------------------------------------------------


def _target(benchmark, *arguments):
    args = benchmark.parse_args(arguments)
    candidates, notes = benchmark.load_target(args.targets[0], args)
    return candidates, [candidate.name for candidate in candidates], notes


def test_candidates_of_a_preset(benchmark):
    pytest.importorskip('mmdet')
    candidates, names, _ = _target(benchmark, 'tiny-swin')
    assert names == ["mmdet's dense", 'keep 1', 'keep 0.7', 'keep 0.5']
    image = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        host, dense, _, idle = (c.build((33, 47))(image) for c in candidates)
    assert torch.allclose(host[1], dense[1], atol=1e-4)
    assert not torch.allclose(host[1], idle[1], atol=1e-3)
    _, names, notes = _target(benchmark, 'tiny-swin', '--against-own')
    assert names == ['keep 1', 'keep 0.7', 'keep 0.5']
    assert 'tiny-swin: the reference is keep 1' in notes


def test_references_without_mmdet(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet.models', None)
    _, names, notes = _target(benchmark, 'tiny-pvt', '--keep-ratios', '0.5')
    assert names == ['keep 1', 'keep 0.5']
    assert any('no dense class' in note for note in notes)
    assert 'tiny-pvt: the reference is keep 1' in notes
    pytest.importorskip('timm')
    _, names, notes = _target(benchmark, 'pvtv2-b0', '--keep-ratios', '0.5', '--timm')
    assert names == ["timm's dense", 'keep 0.5']
    assert "pvtv2-b0: timm's twin is pvt_v2_b0" in notes
    assert 'mit-b0: timm has no twin of it' in _target(benchmark, 'mit-b0', '--timm')[2]


def test_options_of_presets(benchmark):
    options = ('--keep-ratios', '1', '0.5', '--cfg-options', 'model.policy.scope=windows')
    candidates, names, _ = _target(benchmark, 'tiny-swin', *options)
    assert names[-2:] == ['keep 1', 'keep 0.5']
    models = [candidate.build((33, 47)) for candidate in candidates[-2:]]
    assert [m.idle_blocks[0][0].policy.scope for m in models] == ['windows'] * 2
    assert len({m.patch_embed.projection.weight.data_ptr() for m in models}) == 1
    assert 'policy' not in PRESETS['tiny-swin']


def test_what_is_wrong_is_said_before_anything_is_measured(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, 'measure', None)
    for line, message in (
        ('tiny-swin swin-x', 'swin-x is neither a config file nor a preset'),
        ('README.md', 'README.md cannot be read'),
        ('tiny-swin --keep-ratios 2', 'keep_ratios=2.0'),
        ('tiny-swin --shapes 64x', 'HEIGHTxWIDTH'),
        ('tiny-swin tiny-swin', 'tiny-swin is named twice'),
        ('tiny-swin --device tpu', '--device tpu'),
        ('tiny-swin --device cuda:99', '--device cuda:99'),
        ('tiny-swin --part model', 'tiny-swin is a bare backbone'),
        ('', 'name a config file or a preset'),
        ('tiny-swin --rounds 0', 'argument --rounds: 0 must be at least 1'),
        ('tiny-swin --batches 0', 'argument --batches: 0 must be at least 1'),
        ('tiny-swin --dtypes fp8', 'argument --dtypes: invalid choice'),
        ('tiny-swin --compile reduce-overhead', '--compile reduce-overhead'),
        ('tiny-swin --part model --timm', '--part model goes neither with --timm'),
        ('tiny-swin --part model --mode train', '--part model goes neither'),
        ('tiny-swin --checkpoints a b', '--checkpoints: 2 for 1 targets'),
        ('tiny-swin --from a', '--from measures nothing'),
    ):
        device = [] if '--device' in line else ['--device', 'cpu']
        monkeypatch.chdir(ROOT)
        try:
            code = benchmark.main([*line.split(), *device])
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        assert message in capsys.readouterr().err, line


# --- Measuring --------------------------------------------------------------------------------


def test_figures_of_a_case(timed, report):
    case = timed(batch=2)
    assert (case['reference'], case['rounds']) == ('dense', 3)
    dense, half = case['candidates']
    assert dense['multiply_adds'] == 33 * 47 * 3 * 8
    assert [half[name] for name in report.TIMES] == [1000] * 3 + [0.5] * 3
    assert half['memory'] < 0.8 * dense['memory']
    assert dense['memory'] >= 2 * 33 * 47 * 8 * 4
    rows = report.rows_of([case])
    assert rows['operations'].tolist() == [1.0, 0.5]
    assert rows['realised'].tolist()[1] == pytest.approx(1.0)


def test_training_and_autocast(timed, benchmark):
    module = torch.nn.Conv2d(3, 8, 1, bias=False)
    seen, gradients = [], []
    module.register_forward_hook(lambda m, _, out: seen.append((m.training, out.dtype)))
    module.weight.register_hook(lambda g: gradients.append(module.weight.grad is None))
    candidate = benchmark.Candidate('keep 1', 'dense', _always(module))
    case = timed(candidate, mode='train', dtype='bf16')
    assert not any(candidate['error'] for candidate in case['candidates'])
    # Counted at inference; then a warm-up, three rounds and once for the memory.
    assert seen == [(False, torch.float32)] + [(True, torch.bfloat16)] * 5
    assert gradients == [True] * 5
    assert module.weight.grad is None


def test_a_failure_has_a_reason_and_the_rest_goes_on(timed, benchmark, report):
    broken = _failing(benchmark, 'broken', 'idle')
    lost = benchmark.Candidate('lost', 'idle', _always(torch.nn.Identity(0)))
    case = timed(broken, lost, mode='train')
    errors = [candidate['error'] for candidate in case['candidates']]
    assert errors[:2] == [None, None]
    assert errors[2].startswith('RuntimeError: out of memory x')
    assert len(errors[2]) < 180
    assert errors[3] == 'StopIteration: StopIteration'
    shown = report.case_table(case)
    assert 'broken failed: RuntimeError: out of memory' in shown
    assert re.search(r'\| half +\|.* 2\.000 .* 1\.00 \|', shown)


def test_nothing_is_compared_with_a_failed_reference(timed, benchmark, report):
    case = timed(first=_failing(benchmark, 'broken', 'host'), mode='train')
    assert (case['reference'], case['rounds']) == ('broken', 0)
    assert case['candidates'][1]['error'] == 'nothing to compare with: broken failed'
    assert 'half failed: nothing' in report.case_table(case)
    text = report.document([case])
    assert re.search(r'\| tiny +\| 33×47 +\| 1 +\| train +\| float32 +\| failed +\|', text)


def test_compiled_for_one_shape_and_only_for_this_case(benchmark, monkeypatch):
    asked = []

    def compiled(module, **options):
        asked.append((type(module).__name__, options))
        return torch.nn.Sequential(module)

    monkeypatch.setattr(torch, 'compile', compiled)
    whole = torch.nn.Module()
    whole.backbone = own = torch.nn.Conv2d(3, 8, 1)
    whole.decode_head = None
    for part in ('backbone', 'model'):
        case = dict(mode='inference', compile='default', part=part, dtype='float32')
        benchmark.call_of(whole, torch.zeros(1), case)
    assert asked == [('Conv2d', dict(mode=None, dynamic=False))] * 2
    assert whole.backbone is own


# --- Files and tables -------------------------------------------------------------------------


def test_the_tool_resumes(benchmark, tmp_path, capsys):
    out = tmp_path / 'new' / 'out.jsonl'
    line = f'tiny-swin tiny-pvt --keep-ratios 1 0.5 --out {out} --shapes 33x47'
    arguments = f'{line} --device cpu --rounds 3 --warmup 1'.split()
    assert benchmark.main(arguments) == 0
    assert '| tiny-pvt' in capsys.readouterr().out
    before = [json.loads(line) for line in out.read_text().splitlines()]
    assert before[0].keys() == {'command', 'machine', 'versions', 'notes'}
    assert [case['target'] for case in before[1:]] == ['tiny-swin', 'tiny-pvt']
    assert benchmark.main(arguments) == 2  # never overwritten
    assert '--resume' in capsys.readouterr().err
    assert benchmark.main([*arguments, '--resume', '--mode', 'inference', 'train']) == 0
    after = [json.loads(line) for line in out.read_text().splitlines()]
    assert after[:3] == before
    assert [case['mode'] for case in after[4:]] == ['train'] * 2


def test_a_failed_case_is_measured_again_and_an_unknown_file_refused(report, timed, tmp_path):
    lines, case, path = [], timed(), tmp_path / 'out.jsonl'
    names = [candidate['name'] for candidate in case['candidates']]
    case['candidates'][0]['error'] = 'no'
    report.add(lines, case, path)
    assert not report.is_measured(lines, case, names)
    report.add(lines, timed(seconds=1.0), path)
    again = report.read(path)
    assert again == lines
    assert len(again) == 1
    assert report.is_measured(again, case, names)
    assert not report.is_measured(again, case, [*names, 'third'])
    assert not report.is_measured(again, {**case, 'batch': 3}, names)
    for text in ('{', '[]', '{}', '3', '{"candidates": []}'):
        path.write_text(text)
        with pytest.raises(UsageError, match='not a file'):
            report.read(path)
    with pytest.raises(UsageError, match='cannot be read'):
        report.read(tmp_path / 'none.jsonl')


def test_the_committed_timings_are_those_of_the_documentation(report):
    """Every speed-up and every share of memory in docs/speed.md is in a file of raw timings."""
    page = (ROOT / 'docs' / 'speed.md').read_text(encoding='utf-8')
    checked = 0
    for table in re.finditer(r'^(\| model \| shape .*)\n\|[-| ]+\n((?:\|.*\n)+)', page, re.M):
        name = re.search(r'--out (\w+)\.jsonl', page[table.end() :]).group(1)
        path = TIMINGS / f'{name.replace("train", "training")}.jsonl'
        figures = {}
        for _, row in report.rows_of(report.read(path)).iterrows():
            place = row['target'], row['shape'], str(row['batch'])
            share = f' ({row["realised"]:.2f})' if row['realised'] > 0 else ''
            figures[(*place, row['name'])] = f'{row["speedup"]:.2f}{share}'
            figures[(*place, f'memory at {row["name"]}')] = f'{row["memory_ratio"]:.2f}'
        _, *header = (cell.strip() for cell in table.group(1).split('|'))
        for line in table.group(2).splitlines():
            _, *cells = (cell.strip() for cell in line.split('|'))
            for title, cell in zip(header[3:], cells[3:], strict=True):
                if cell and title != 'mmdet, MiB':
                    assert figures[(*cells[:3], title)] == cell
                    checked += 1
    assert checked > 150


def test_tables_and_picture_of_what_was_measured(benchmark, report, tmp_path, capsys):
    sources = sorted(TIMINGS.glob('*.jsonl'))
    text, picture = tmp_path / 'a' / 'tables.md', tmp_path / 'b' / 'plot.png'
    options = ['--markdown', str(text), '--plot', str(picture)]
    assert benchmark.main(['--from', *map(str, sources), *options]) == 0
    assert capsys.readouterr().out.count(', batch ') == 96
    lines = text.read_text(encoding='utf-8').splitlines()
    assert sum('| inference' in line or '| train' in line for line in lines) >= 42
    assert '- AMD EPYC, 2 cores; Python 3.11.7' in '\n'.join(lines)
    with Image.open(picture) as image:
        assert image.info['dpi'][0] == pytest.approx(150, abs=0.1)
        assert image.width > 2 * image.height

    points = report.points_of(report.read(TIMINGS / 'scopes.jsonl'))
    assert set(points['line']) == {'swin-t map', 'swin-t window_tokens', 'swin-t windows'}
    points = report.points_of(report.read(TIMINGS / 'bf16.jsonl'))
    assert points['panel'].unique().tolist() == ['backbone inference, bf16, CPU, 2 threads']
    assert len(points) == 18
    summary = report.summary(report.read(TIMINGS / 'bf16.jsonl'))
    gain = report.geometric_mean(points.loc[points['name'] == 'keep 0.5', 'speedup'])
    assert re.search(
        rf'\| all +\| backbone inference +\|.*\| keep 0.5 +\| +6 \| +{gain:.2f} ', summary
    )


# --- The documentation ------------------------------------------------------------------------


def test_the_documentation_names_every_option_and_its_commands_can_be_read(benchmark):
    page = (ROOT / 'docs' / 'benchmark.md').read_text(encoding='utf-8')
    source = (ROOT / 'tools' / 'analysis_tools' / 'benchmark.py').read_text(encoding='utf-8')
    names = set(re.findall(r"add\('(--[a-z-]+)'", source))
    assert len(names) > 20
    assert {name for name in names if f'| `{name}' not in page} == set()
    assert all(f'`{name}`' in page for name in PRESETS if not name.startswith('tiny'))
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', page, re.S)).replace('\\\n', ' ')
    parsers = {'benchmark': benchmark.parse_args, 'gpu': importlib.import_module('gpu').parse_args}
    commands = [line for line in blocks.splitlines() if line.startswith('python')]
    assert len(commands) == 5
    for command in commands:
        _, tool, *options = shlex.split(command, comments=True)
        args = parsers[Path(tool).stem](options)
        if 'gpu' in tool:
            continue
        assert args.sources or list(benchmark.cases_of('x', args))
        assert all(target in PRESETS or (ROOT / target).is_file() for target in args.targets)

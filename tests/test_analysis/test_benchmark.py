"""The benchmark tool on tiny backbones: cases, candidates, failures, files and tables."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

from idlevit_mm.analysis.benchmark_plot import curves, mean_curve
from idlevit_mm.analysis.benchmark_report import (
    case_table,
    failures,
    geometric_mean,
    markdown,
    summarize,
)
from idlevit_mm.analysis.candidates import Candidate, Choice, Label, load_target, together
from idlevit_mm.analysis.cases import Case, expand
from idlevit_mm.analysis.measuring import Effort, _compiled, measure, reason
from idlevit_mm.analysis.memory import allocations, peak_of
from idlevit_mm.analysis.models import parse_shapes
from idlevit_mm.analysis.presets import PRESETS, Preset, preset_of, timm_twin
from idlevit_mm.analysis.results import Results
from idlevit_mm.errors import UsageError

ROOT = Path(__file__).parents[2]

_SWIN = dict(
    type='IdleSwinTransformer',
    embed_dims=8,
    depths=(1, 2),
    num_heads=(2, 4),
    strides=(4, 2),
    window_size=4,
    out_indices=(0, 1),
)
_PVTV2 = dict(
    type='IdlePyramidVisionTransformerV2',
    embed_dims=8,
    num_layers=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 1],
)
QUICK = Effort(rounds=3, warmup=1)


def _tool():
    spec = importlib.util.spec_from_file_location(
        'benchmark_tool', ROOT / 'tools' / 'analysis_tools' / 'benchmark.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(monkeypatch):
    """Presets of tiny backbones; the module's table is one object, which all importers share."""
    monkeypatch.setitem(PRESETS, 'tiny-swin', Preset(_SWIN))
    monkeypatch.setitem(PRESETS, 'tiny-pvt', Preset(_PVTV2))


@pytest.fixture
def no_mmdet(monkeypatch):
    """As on a machine without mmdet."""
    monkeypatch.setitem(sys.modules, 'mmdet.models', None)


def _case(target='tiny-swin', **conditions):
    values = dict(
        part='backbone', shape=(33, 47), batch=1, dtype='float32', mode='inference'
    ) | dict(compile='none', device='cpu', threads=1)
    return Case(target, **{**values, **conditions})


class _Clock:
    """Seconds by candidate, whatever it really took."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.names = {}

    def candidates(self, *labels):
        made = []
        for label in labels:
            module = torch.nn.Conv2d(3, int(8 * (label.keep or 1)), 1, bias=False)
            made.append(Candidate(label, lambda shape, module=module: module))
            module.register_forward_hook(self._hook(label.name))
        return made

    def _hook(self, name):
        def hook(*_):
            self.last = name

        return hook

    def __call__(self, call):
        call()
        return self.seconds[self.last.replace(' ', '_').replace('.', '_')]


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'peak'),
    [
        ((), 0),
        ((-8,), 0),
        ((100, 50, -100, 60), 150),
        ((100, -100, 70, 70, -70), 140),
        ((-50, 100, 20), 70),
    ],
)
def test_peak_of_changes(changes, peak):
    assert peak_of(changes) == peak


def test_peak_of_a_call_without_gradients():
    def call():
        first = torch.empty(1000)  # 4000
        second = torch.empty(2000)  # 12000: both alive
        del first  # 8000
        third = torch.empty(500)  # 10000
        return second, third

    assert peak_of(allocations(call)) == 12_000


def test_peak_of_a_call_with_tensors_saved_for_backward():
    weight = torch.ones(1000, requires_grad=True)

    def call():
        return weight.exp().sin().exp().cos().sum()

    # Each result of 4000 bytes is freed once the next is there.
    with torch.no_grad():
        assert peak_of(allocations(call)) == 8_000
    # Both exp() are saved; at the end cos() and the sum, one number, are there as well.
    assert peak_of(allocations(call)) == 12_004


# --- Presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['swin-t', 'pvtv2-b0'])
def test_timm_twin_has_the_architecture(name):
    """The same parameters but for norms: of the outputs timm has none."""
    pytest.importorskip('timm')
    twin = timm_twin(PRESETS[name].timm, (224, 224), 0.1)
    own = MODELS.build(dict(PRESETS[name].backbone))

    def size(module):
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    assert size(twin) == size(own)


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'pvt_v2_b0'])
def test_timm_twin_takes_odd_sizes(name):
    pytest.importorskip('timm')
    with torch.no_grad():
        outputs = timm_twin(name, (33, 70), 0.0).eval()(torch.zeros(1, 3, 33, 70))
    assert len(outputs) == 4


def test_preset_of_a_config():
    config = dict(type='IdlePyramidVisionTransformerV2', embed_dims=64, num_layers=[3, 4, 6, 3])
    assert preset_of({**config, 'keep_ratios': 0.7}) is PRESETS['pvtv2-b2']
    assert preset_of({**config, 'embed_dims': 48}) is None
    assert preset_of(dict(type='IdleSwinTransformer')) is PRESETS['swin-t']
    mit = dict(type='IdleMixVisionTransformer', embed_dims=32, num_layers=[2, 2, 2, 2])
    assert preset_of({**mit, 'num_heads': [1, 2, 5, 8]}) is PRESETS['mit-b0']
    # The class's default, as in mmseg, is no published model.
    assert preset_of(mit) is None


# --- Candidates -------------------------------------------------------------------------------


def _names(target):
    return [candidate.label.name for candidate in target.candidates]


def test_candidates_of_a_preset(tiny):
    pytest.importorskip('mmdet')
    target = load_target('tiny-swin', Choice())
    assert _names(target) == ["mmdet's dense", 'keep 1', 'keep 0.7', 'keep 0.5']
    image = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        host, dense, _, idle = (c.build((33, 47))(image) for c in target.candidates)
    assert torch.allclose(host[1], dense[1], atol=1e-4)
    assert not torch.allclose(host[1], idle[1], atol=1e-3)


def test_without_mmdet_the_idle_class_is_the_reference(tiny, no_mmdet):
    target = load_target('tiny-pvt', Choice(keep_ratios=[0.5]))
    assert _names(target) == ['keep 1', 'keep 0.5']
    assert any('no dense class' in note for note in target.notes)
    assert any('the reference is keep 1' in note for note in target.notes)


def test_without_mmdet_timm_is_the_reference(no_mmdet):
    pytest.importorskip('timm')
    target = load_target('pvtv2-b0', Choice(keep_ratios=[0.5]))
    assert _names(target) == ["timm's dense", 'keep 0.5']
    assert "pvtv2-b0: timm's twin is pvt_v2_b0" in target.notes


def test_scopes(tiny):
    choice = Choice(keep_ratios=[1.0, 0.5], scopes=['map', 'windows'], host=False)
    target = load_target('tiny-swin', choice)
    assert _names(target) == ['keep 1', 'keep 0.5 map', 'keep 0.5 windows']
    models = [candidate.build((33, 47)) for candidate in target.candidates]
    assert [m.idle_blocks[0][0].policy.scope for m in models] == ['map', 'map', 'windows']
    weights = {m.patch_embed.projection.weight.data_ptr() for m in models}
    assert len(weights) == 1
    # Named alike, so that tables of several targets have one column for it.
    assert _names(load_target('tiny-pvt', choice)) == ['keep 1', 'keep 0.5 map']


def test_targets_together(tiny):
    choice = Choice(keep_ratios=[0.5], host=False)
    both = together([load_target(name, choice) for name in ('tiny-swin', 'tiny-pvt')])
    assert _names(both) == [
        *('tiny-swin keep 1', 'tiny-swin keep 0.5', 'tiny-pvt keep 1', 'tiny-pvt keep 0.5'),
    ]
    assert both.name == 'tiny-swin + tiny-pvt'


@pytest.mark.parametrize(
    ('spec', 'choice', 'message'),
    [
        ('swin-x', Choice(), 'swin-x is neither'),
        ('configs/none.py', Choice(), 'configs/none.py is neither'),
        (str(ROOT / 'README.md'), Choice(), 'not a config file'),
        ('tiny-swin', Choice(keep_ratios=[0.0]), '--keep-ratios 0:'),
        ('tiny-swin', Choice(keep_ratios=[0.5, 1.5]), '--keep-ratios 1.5:'),
        ('tiny-swin', Choice(scopes=['rows']), '--scopes rows:'),
        ('tiny-pvt', Choice(scopes=['windows']), '--scopes windows: tiny-pvt'),
        ('tiny-swin', Choice(part='model'), 'tiny-swin is a bare backbone'),
        ('tiny-swin', Choice(part='model', timm=True), '--timm with --part model'),
    ],
)
def test_wrong_targets(tiny, spec, choice, message):
    with pytest.raises(UsageError) as error:
        load_target(spec, choice)
    assert message in str(error.value)


# --- Cases ------------------------------------------------------------------------------------


def test_expand():
    cases = expand(
        ['a', 'b'], shapes=[(32, 48), (64, 64)], batches=[1, 2], modes=['inference', 'train']
    )
    assert len(cases) == 16
    assert len(set(cases)) == 16
    assert [case.target for case in cases] == ['a'] * 8 + ['b'] * 8
    assert cases[0] == Case.from_dict(json.loads(json.dumps(cases[0].as_dict())))
    assert str(cases[0]) == 'a backbone inference, 1×3×32×48, float32, 1 thread'


@pytest.mark.parametrize(
    ('conditions', 'message'),
    [
        (dict(part='neck'), '--part neck'),
        (dict(modes=['eval']), '--mode eval'),
        (dict(dtypes=['fp8']), '--dtypes fp8'),
        (dict(dtypes=['fp16']), '--dtypes fp16 on the CPU'),
        (dict(compiles=['max']), '--compile max'),
        (dict(compiles=['reduce-overhead']), '--compile reduce-overhead on the CPU'),
        (dict(batches=[0]), '--batches 0'),
        (dict(threads=0), '--threads 0'),
        (dict(device='tpu'), '--device tpu'),
        (dict(device='meta'), '--device meta'),
        (dict(part='model', modes=['train']), '--mode train with --part model'),
    ],
)
def test_wrong_conditions(conditions, message):
    with pytest.raises(UsageError) as error:
        expand(['a'], **{'shapes': [(32, 32)], **conditions})
    assert message in str(error.value)


# --- Measuring --------------------------------------------------------------------------------

_DENSE = Label('dense', 'host')
_HALF = Label('half', 'idle', 0.5, target='tiny-swin')


def test_figures_of_a_case():
    clock = _Clock(dense=4.0, half=2.5)
    result = measure(_case(batch=2), clock.candidates(_DENSE, _HALF), QUICK, timer=clock)
    assert (result.reference, result.rounds, result.failed) == ('dense', 3, False)
    dense, half = (entry.row for entry in result.entries)
    assert dense.multiply_adds == 33 * 47 * 3 * 8
    assert half.operation_ratio == 0.5
    assert half.milliseconds.median == 1250
    assert half.realised == pytest.approx((4.0 / 2.5) / 2)


def test_training_clears_gradients_and_modes():
    clock = _Clock(dense=1.0, half=1.0)
    candidates = clock.candidates(_DENSE, _HALF)
    module = candidates[0].build((1, 1))
    modes, gradients = [], []
    module.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    module.weight.register_hook(lambda g: gradients.append(module.weight.grad is None))
    result = measure(_case(mode='train'), candidates, QUICK, timer=clock)
    assert not result.failed
    assert modes == [False] + [True] * 4  # counted at inference, then a warm-up and three rounds
    assert gradients == [True] * 4
    assert module.weight.grad is None
    assert not module.training


def test_memory_on_the_cpu():
    clock = _Clock(dense=1.0, half=1.0)
    effort = Effort(rounds=3, warmup=1, memory=True)
    result = measure(_case(), clock.candidates(_DENSE, _HALF), effort, timer=clock)
    dense, half = result.entries
    assert dense.memory >= 33 * 47 * 8 * 4
    assert half.memory_ratio == half.memory / dense.memory
    assert half.memory_ratio < 0.8


def test_autocast():
    clock = _Clock(dense=1.0)
    (candidate,) = clock.candidates(_DENSE)
    seen = []
    candidate.build((1, 1)).register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    measure(_case(dtype='bf16'), [candidate], QUICK, timer=clock)
    assert seen[-1] == torch.bfloat16


def _failing(label, message='out of memory\nand more'):
    module = torch.nn.Conv2d(3, 8, 1)

    def fail(*_):
        if torch.is_grad_enabled() or not module.counting:
            raise RuntimeError(message)

    module.counting = True
    module.register_forward_pre_hook(fail)
    return Candidate(label, lambda shape: module)


def test_a_failure_has_a_reason_and_the_rest_goes_on():
    clock = _Clock(dense=4.0, half=2.0)
    broken = _failing(Label('broken', 'idle', 0.7))
    dense, half = clock.candidates(_DENSE, _HALF)
    result = measure(_case(mode='train'), [dense, broken, half], QUICK, timer=clock)
    assert result.failed
    assert [entry.row is None for entry in result.entries] == [False, True, False]
    assert result.entries[1].error == 'RuntimeError: out of memory'
    assert result.entries[2].row.time_ratio.median == 0.5


def test_the_next_dense_candidate_stands_in_for_a_failed_reference():
    clock = _Clock(keep_1=4.0, half=2.0)
    keep, half = clock.candidates(Label('keep 1', 'dense', 1.0), _HALF)
    result = measure(_case(mode='train'), [_failing(_DENSE), keep, half], QUICK, timer=clock)
    assert result.reference == 'keep 1'
    alone = measure(_case(mode='train'), [_failing(_DENSE), half], QUICK, timer=clock)
    assert alone.reference is None
    assert 'nothing to compare with' in alone.entries[1].error


def test_a_model_that_cannot_be_built_has_a_reason():
    def fail(shape):
        raise ValueError('no')

    clock = _Clock(dense=1.0)
    candidates = [*clock.candidates(_DENSE), Candidate(_HALF, fail)]
    assert measure(_case(), candidates, QUICK, timer=clock).entries[1].error == 'ValueError: no'


@pytest.mark.parametrize('part', ['backbone', 'model'])
def test_compiled_for_one_shape_and_only_for_this_case(monkeypatch, part):
    asked = []

    def compiled(module, **options):
        asked.append((type(module).__name__, options))
        return torch.nn.Sequential(module)

    monkeypatch.setattr(torch, 'compile', compiled)
    whole = torch.nn.Module()
    whole.backbone = torch.nn.Conv2d(3, 8, 1)
    own = whole.backbone
    made = _compiled(whole, _case(compile='default', part=part))
    assert asked == [('Conv2d', dict(mode=None, dynamic=False))]
    assert whole.backbone is own
    assert (made if part == 'backbone' else made.backbone)[0] is own


def test_reasons_are_one_short_line():
    assert reason(RuntimeError('a\nb')) == 'RuntimeError: a'
    assert reason(KeyError()) == 'KeyError'
    assert len(reason(RuntimeError('x' * 1000))) == 160


# --- Results ----------------------------------------------------------------------------------


def _measured(clock_seconds=2.0, target='tiny-swin', **conditions):
    clock = _Clock(dense=4.0, half=clock_seconds)
    return measure(_case(target, **conditions), clock.candidates(_DENSE, _HALF), QUICK, timer=clock)


def test_results_are_read_as_they_were_written(tmp_path):
    results = Results({'command': 'x'})
    results.add(_measured())
    results.add(_measured(1.0))  # of the same conditions: replaces
    results.add(_measured(batch=2))
    path = tmp_path / 'new' / 'out.json'
    results.save(path)
    again = Results.load(path)
    assert again == results
    assert len(again.results) == 2
    assert again.results[0].entries[1].row.time_ratio.median == 0.25
    assert again.has(_case(), ['dense', 'half'])
    assert not again.has(_case(), ['dense', 'third'])
    assert not again.has(_case(batch=3), ['dense'])
    assert [p.name for p in path.parent.iterdir()] == ['out.json']


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"cases": [{}]}', '{"cases": 3}'])
def test_wrong_files(tmp_path, text):
    path = tmp_path / 'out.json'
    path.write_text(text)
    with pytest.raises(UsageError, match='not a file'):
        Results.load(path)
    with pytest.raises(UsageError, match='cannot be read'):
        Results.load(tmp_path / 'none.json')


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_table_of_a_case():
    clock = _Clock(dense=4.0, half=2.5)
    dense, half = clock.candidates(_DENSE, _HALF)
    broken = _failing(Label('broken', 'idle', 0.7))
    result = measure(_case(mode='train'), [dense, broken, half], QUICK, timer=clock)
    header, cells = case_table(result)
    assert all(len(line) == len(header) for line in cells)
    named = [dict(zip(header, line, strict=True)) for line in cells]
    assert [line['speed-up'] for line in named] == ['1.000', '', '1.600']
    assert [line['realised'] for line in named] == ['–', '', '0.80']
    assert failures(result) == ['broken failed: RuntimeError: out of memory']


def test_summary():
    results = [_measured(2.0), _measured(0.5, batch=2), _measured(1.0, mode='train')]
    lines = summarize(results)
    assert [(line.what, line.name, line.cases) for line in lines] == [
        ('backbone inference, against dense', 'half', 2),
        ('backbone train, against dense', 'half', 1),
    ]
    assert lines[0].speedup == pytest.approx(4.0)
    assert lines[0].realised == pytest.approx((2.0, 1.0, 4.0))
    assert lines[0].low == (2.0, '1×3×33×47, float32, 1 thread')
    assert lines[0].high == (8.0, '2×3×33×47, float32, 1 thread')


def test_summary_over_all_targets():
    lines = summarize([_measured(2.0), _measured(0.5, target='tiny-pvt')])
    assert [line.target for line in lines] == ['tiny-swin', 'tiny-pvt', 'all']
    assert lines[-1].speedup == pytest.approx(4.0)
    assert lines[-1].low[1] == 'tiny-swin, 1×3×33×47, float32, 1 thread'


def test_markdown():
    results = [_measured(2.0), _measured(0.5, batch=2, compile='none'), _measured(mode='train')]
    text = markdown(results, ['a machine'])
    assert '- a machine' in text
    assert '| model | shape | batch | mode | dtype | half |' in text
    assert '| tiny-swin | 33×47 | 1 | inference | float32 | 2.00 (1.00) |' in text
    assert '| tiny-swin | 33×47 | 2 | inference | float32 | 8.00 (4.00) |' in text
    widths = {line.count('|') for line in text.split('**Geometric')[0].splitlines() if '|' in line}
    assert widths == {7}


def test_curves():
    panels = curves([_measured(2.0), _measured(0.5, batch=2), _measured(1.0, mode='train')])
    assert list(panels) == [
        'backbone inference, float32, CPU, 1 threads',
        'backbone train, float32, CPU, 1 threads',
    ]
    model = panels['backbone inference, float32, CPU, 1 threads']['tiny-swin']
    assert model == {'half': [(0.5, 2.0), (0.5, 8.0)]}
    assert mean_curve(model) == [pytest.approx((0.5, 4.0))]


def test_curves_of_scopes_share_the_dense_point():
    clock = _Clock(dense=4.0, keep_1=4.0, a=2.0, b=1.0)
    labels = [Label('keep 1', 'dense', 1.0, target='t')]
    labels += [Label(name, 'idle', 0.5, scope, 't') for name, scope in (('a', 'map'), ('b', 'w'))]
    (models,) = curves(
        [measure(_case(), clock.candidates(_DENSE, *labels), QUICK, timer=clock)]
    ).values()
    assert {name: mean_curve(model) for name, model in models.items()} == {
        't, map': [(1.0, 1.0), pytest.approx((0.5, 2.0))],
        't, w': [(1.0, 1.0), pytest.approx((0.5, 4.0))],
    }


# --- The tool ---------------------------------------------------------------------------------


def _run(*arguments):
    options = ('--device', 'cpu', '--threads', '1', '--rounds', '3', '--warmup', '1')
    return _tool().main([*arguments, '--shapes', '33x47', *options])


def test_tool_resumes(tiny, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / 'out.json')
    arguments = ('tiny-swin', 'tiny-pvt', '--no-host', '--keep-ratios', '1', '0.5', '--out', out)
    assert _run(*arguments) == 0
    assert 'geometric means' in capsys.readouterr().out
    before = json.loads(Path(out).read_text())
    assert len(before['cases']) == 2
    assert {'command', 'machine', 'versions', 'notes'} == before['runs'][0].keys()
    assert _run(*arguments) == 2  # never overwritten
    assert '--resume' in capsys.readouterr().err
    assert _run(*arguments, '--resume', '--mode', 'inference', 'train') == 0
    after = json.loads(Path(out).read_text())
    assert after['cases'][:2] == before['cases']
    assert [case['mode'] for case in after['cases']] == ['inference'] * 2 + ['train'] * 2


def test_tool_draws_what_was_measured(tmp_path, capsys):
    source = tmp_path / 'out.json'
    results = Results()
    results.add(_measured(2.0))
    results.add(_measured(2.5, mode='train'))
    results.save(source)
    text, picture = tmp_path / 'a' / 'tables.md', tmp_path / 'b' / 'plot.png'
    options = ['--from', str(source), '--markdown', str(text), '--plot', str(picture)]
    tool = _tool()
    assert tool.main(options) == 0
    assert 'geometric means' in capsys.readouterr().out
    assert '2.00 (1.00)' in text.read_text()
    with Image.open(picture) as image:
        assert image.info['dpi'][0] == pytest.approx(150, abs=0.1)
        assert image.width > 2 * image.height
    assert tool.main(['swin-t', *options]) == 2
    assert '--from measures nothing' in capsys.readouterr().err


def test_tool_says_what_is_wrong_before_anything_is_measured(tiny, capsys, monkeypatch):
    for arguments, message in (
        (('tiny-swin', 'swin-x'), 'swin-x is neither'),
        (('tiny-swin', '--keep-ratios', '2'), '--keep-ratios 2'),
        (('tiny-swin', '--shapes', '64x'), 'HEIGHTxWIDTH'),
        (('tiny-swin', '--rounds', '0'), '--rounds 0'),
        (('tiny-swin', 'tiny-swin'), 'named twice'),
        ((), 'name a config file or a preset'),
    ):
        tool = _tool()
        monkeypatch.setattr(tool, 'measure', None)
        assert tool.main([*arguments, '--device', 'cpu']) == 2
        assert message in capsys.readouterr().err


def test_tool_fails_with_a_failed_case(tiny, capsys, monkeypatch):
    tool = _tool()
    load = tool.load_target

    def with_broken(spec, choice, checkpoint):
        target = load(spec, choice, checkpoint)
        broken = _failing(Label('broken', 'idle', 0.1))
        return type(target)(target.name, (*target.candidates, broken))

    monkeypatch.setattr(tool, 'load_target', with_broken)
    options = ('--shapes', '33x47', '--rounds', '1', '--device', 'cpu', '--mode', 'train')
    assert tool.main(['tiny-pvt', '--no-host', *options]) == 1
    assert 'out of memory' in capsys.readouterr().out


# --- The documentation ------------------------------------------------------------------------

_PAGE = (ROOT / 'docs' / 'benchmark.md').read_text(encoding='utf-8')


def test_every_option_is_documented():
    source = (ROOT / 'tools' / 'analysis_tools' / 'benchmark.py').read_text(encoding='utf-8')
    options = set(re.findall(r"^ +'(--[a-z-]+)',|add_argument\('(--[a-z-]+)'", source, re.M))
    names = {a or b for a, b in options}
    assert len(names) > 20
    assert {name for name in names if f'| `{name}' not in _PAGE} == set()
    assert all(f'`{name}`' in _PAGE for name in PRESETS)


def test_commands_of_the_documentation_can_be_read():
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', _PAGE, re.S)).replace('\\\n', ' ')
    commands = [line for line in blocks.splitlines() if line.startswith('python')]
    assert len(commands) == 4
    for command in commands:
        args = _tool().parse_args(shlex.split(command)[2:])
        if args.sources is None:
            cases = expand(
                args.targets,
                part=args.part,
                shapes=parse_shapes(args.shapes),
                batches=args.batches,
                dtypes=args.dtypes,
                modes=args.mode,
                compiles=[] if args.device == 'cuda' else args.compile,
            )
            assert cases or args.device == 'cuda'
            targets = [t for t in args.targets if t not in PRESETS]
            assert all((ROOT / target).is_file() for target in targets)

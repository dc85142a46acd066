"""Exported graphs do what eager PyTorch does, tokens kept included, or are refused in a line."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from backbone_zoo import BY_NAME, image, randomize

from idlevit_mm.analysis import export
from idlevit_mm.errors import UsageError
from idlevit_mm.kernels import Reference

TOOLS = Path(__file__).parents[2] / 'tools'
SIZE = (21, 30)
# Every kind of block once: recording takes long.
FEW = {
    'swin': dict(depths=(2, 1), use_abs_pos_embed=True, pretrain_img_size=32),
    'pvt': dict(num_layers=[1, 1]),
    'pvtv2': dict(num_layers=[1, 1, 1, 1]),
    'mit': dict(num_layers=[1, 1]),
    'vit': dict(num_layers=2, out_indices=(0, 1)),
}

pytestmark = pytest.mark.filterwarnings('ignore')


def build(name, keep=0.5, **kwargs):
    settings = {**FEW[name], 'drop_path_rate': 0.0, **kwargs}
    model = randomize(BY_NAME[name].build(keep_ratios=keep, **settings)).eval()
    return model.requires_grad_(False)


def exported(model, path, batch=1, dynamic=False):
    graph = export.Graph(export.fixed(model, SIZE), with_masks=True)
    program = export.record_graph(graph, image((batch, 3, *SIZE)), dynamic)
    export.save_graph(program, path)
    return program


def rows(model, run, *batches):
    """Of graphs whose outputs and masks are in one."""
    shipped = len(export.Graph(model)(image((1, 3, *SIZE))))
    images = {str(batch): image((batch, 3, *SIZE), 1) for batch in batches}
    graph = export.Graph(model, with_masks=True)
    return export.compare_graphs(graph, lambda x: run(x)[:shipped], run, images)


def assert_right(found):
    for row in found:
        assert not row.refused
        assert row.is_right
        assert row.largest < 1e-5
        assert row.others == 0


# PVTv2 is MiT with other numbers.
@pytest.mark.parametrize('name', [name for name in FEW if name != 'pvtv2'])
def test_onnx_keeps_the_same_tokens(name, tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    # Of MiT, which is the cheapest, with fewer tokens that attend.
    policy = dict(attention_ratios=0.2) if name == 'mit' else None
    model = build(name, policy=policy)
    path, dynamic = tmp_path / 'graph.onnx', name in ('swin', 'vit')
    exported(model, path, dynamic=dynamic)
    # Tables are folded: nothing is resized.
    assert b'Resize' not in path.read_bytes()
    assert_right(rows(model, export.runtimes(path)['onnxruntime'], *([1, 3] if dynamic else [1])))


def test_openvino(tmp_path):
    pytest.importorskip('openvino')
    model, path = build('swin'), tmp_path / 'graph.xml'
    exported(model, path, batch=2)
    (run,) = export.runtimes(path).values()
    right, refused = rows(model, run, 2, 3)
    assert_right([right])
    assert refused.refused


@pytest.mark.parametrize('name', ['swin', 'pvt'])
def test_torch_export_is_right_or_refuses(name, tmp_path):
    model, path = build(name), tmp_path / 'graph.pt2'
    exported(model, path)
    (run,) = export.runtimes(path).values()
    right, refused = rows(model, run, 1, 2)
    assert_right([right])
    assert refused.refused


def test_the_first_of_equal_tokens_is_kept_everywhere(tmp_path):
    pytest.importorskip('onnxscript')
    counts = 5, 2, 5

    class Best(torch.nn.Module):
        def forward(self, scores):
            return (Reference().best(scores, counts),)

    scores = image((3, len(counts), 40), 2).round()
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    groups = [
        (number * 40 + order[:, number, :count]).sort(dim=-1).values
        for number, count in enumerate(counts)
    ]
    program = torch.export.export(Best(), (scores,), strict=False)
    found = {'eager': Best()(scores)}
    for suffix, package in (('.pt2', 'torch'), ('.onnx', 'onnxruntime'), ('.xml', 'openvino')):
        pytest.importorskip(package)
        export.save_graph(program, tmp_path / f'best{suffix}')
        found |= {
            f'{name} of {suffix}': run(scores)
            for name, run in export.runtimes(tmp_path / f'best{suffix}').items()
        }
    for name, (chosen,) in found.items():
        assert torch.equal(chosen.long(), torch.cat(groups, dim=1)), name


def test_what_tensorrt_takes(monkeypatch):
    model = build('swin', policy=dict(scope='map'))
    program = export.record_graph(export.Graph(model), image((1, 3, *SIZE)), False)
    assert 'at most 24' in export.tensorrt_note(program, model)
    monkeypatch.setattr(export, 'TENSORRT_K', 20)
    note = export.tensorrt_note(program, model)
    assert 'K=24' in note
    assert "policy.scope='window_tokens' or 'windows'" in note


@pytest.mark.parametrize(
    ('row', 'right'),
    [
        (export.Row('x', 1, 1e-5, 1e-6, 0.0), True),
        (export.Row('x', 1, 1e-2, 1e-3, 0.0), False),
        (export.Row('x', 1, 1e-2, 1e-3, None), False),
        # A token whose score is nearly another's.
        (export.Row('x', 1, 0.5, 1e-2, 1e-3), True),
        (export.Row('x', 1, 0.5, 0.2, 1e-3), False),
        (export.Row('x', 1, 1e-5, 1e-6, 0.1), False),
        (export.Row('x', 1, float('inf'), float('inf'), None), False),
    ],
)
def test_what_counts_as_right(row, right):
    assert row.is_right == right


def test_images_that_a_backbone_cannot_take():
    def refuse(*_):
        raise RuntimeError('too small')

    model = build('pvt')
    model.register_forward_pre_hook(refuse)
    with pytest.raises(UsageError, match='IdlePyramidVisionTransformer takes no images of 24x24'):
        export.fixed(model, (24, 24))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOOLS)
    module = importlib.import_module('export')
    small = dict(BY_NAME['mit'].config(**FEW['mit']), keep_ratios=0.5)
    monkeypatch.setitem(module.PRESETS, 'small', small)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
        return module.main()

    return run


def test_the_tool_verifies_and_times(tool, tmp_path, capsys):
    import cv2

    cv2.imwrite(str(tmp_path / 'x.png'), image((40, 50, 3)).mul(60).add(99).byte().numpy())
    options = ('--images', tmp_path / 'x.png', '--time', '--rounds', 3)
    sizes = ('--shape', '21x30', '24x24')
    assert tool('small', tmp_path / 'out.pt2', *sizes, *options) == 0
    assert {path.name for path in tmp_path.glob('*.pt2')} == {'out_21x30.pt2', 'out_24x24.pt2'}
    text = capsys.readouterr().out
    assert 'refuses a batch of 2' in text
    assert 'files, 1' in text
    assert 'dense / idle' in text
    assert 'WRONG' not in text


def test_a_wrong_graph_is_told(tool, tmp_path, capsys, monkeypatch):
    runtimes = export.runtimes

    def twisted(path):
        return {
            name: lambda images, run=run: [out.flip(-1) for out in run(images)]
            for name, run in runtimes(path).items()
        }

    monkeypatch.setattr(export, 'runtimes', twisted)
    assert tool('small', tmp_path / 'out.pt2', '--shape', '21x30') == 1
    assert 'something else than PyTorch' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('small', 'out.trt'), 'out.trt must end in .pt2, .onnx, .xml'),
        (('small', 'out.pt2', '--shape', '0x4'), 'must be HEIGHTxWIDTH'),
        (('small', 'out.pt2', '--keep-ratios', '1.5'), '1.5'),
        (('small', 'out.pt2', '--part', 'model'), 'is a bare backbone'),
        (('small', 'out.pt2', '--batch', '0'), 'must be at least 1'),
        (('small', 'other.pth', 'out.pt2'), 'does not fit IdleMixVisionTransformer'),
        (('small', 'out.pt2', '--shape', '24x24', '--images', 'no.png'), 'no.png is no image'),
        (('none.py', 'out.pt2'), 'none.py does not exist'),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_bad_input_is_one_line(tool, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'norm.weight': torch.zeros(3)}}, 'other.pth')
    assert tool(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert error.count('\n') == 1


def test_missing_packages_are_named(tool, monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
    assert tool('small', 'out.onnx') == 2
    assert 'out.onnx needs onnx, onnxscript, onnxruntime' in capsys.readouterr().err


def test_what_a_target_lacks_is_one_line(tmp_path):
    pytest.importorskip('onnxscript')

    class Odd(torch.nn.Module):
        def forward(self, x):
            return (torch.linalg.eigvals(x),)

    program = torch.export.export(Odd(), (torch.eye(3),), strict=False)
    with pytest.raises(UsageError, match='ONNX opset 18 cannot express this model') as error:
        export.save_graph(program, tmp_path / 'x.onnx')
    assert '\n' not in str(error.value)

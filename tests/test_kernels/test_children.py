"""Every child module is called as a module by whoever has changed it: no backend passes it over.

Hooks, pruning, parametrisations, adapters and quantisation change a child and expect that it is
called. Children without a forward pass of their own (lists, policies) are none.
"""

import copy

import pytest
import torch
from backbone_zoo import BY_NAME, all_equal, assert_all_close, image, randomize
from policy_cases import CASES, each
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize as parametrization
from torch.nn.utils import prune

from idlevit_mm.kernels.cpu import pieces
from idlevit_mm.policies.scorers import Scorer

IMAGES = image((3, 3, 13, 18))
# PVTv2's blocks are MiT's, which has fewer here.
NAMES = ('swin', 'pvt', 'mit', 'svt', 'vit', 'vit-conv-stem', 'swinv2')
FAMILIES = pytest.mark.parametrize('name', NAMES)


@pytest.fixture(autouse=True)
def _in_small_pieces(monkeypatch):
    """Inference cuts what it may cut, so that a child that is called in pieces is found out."""
    monkeypatch.setattr(pieces, '_PIECE', 1)
    monkeypatch.setattr(pieces, '_MIN_ROWS', 20)


def build(name, keep, **kwargs):
    """A model with every kind of child, most of them once."""
    if name.startswith('vit'):
        few = dict(num_layers=1, out_indices=0)
    elif name.startswith('swin'):
        few = dict(depths=(1, 1))
    elif name == 'svt':
        few = dict(depths=[2, 1])
    elif name == 'mit':
        # Hidden features of a convolution are cut by channels, and 32 of them no further.
        few = dict(num_layers=[1, 1], mlp_ratio=9)
    else:
        few = dict(num_layers=[1, 1])
    # Two tokens are equally far from their mean, and scores by the class token's query need the
    # weights of a plain attention: another scorer than the defaults.
    few['policy'] = dict(scorer='activation_norm')
    model = BY_NAME[name].build(keep_ratios=keep, drop_path_rate=0.0, **(few | kwargs))
    return randomize(model).eval()


def children(model):
    """Names and modules of all that has a forward pass, each as often as it is registered."""
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module).forward is not nn.Module.forward
    ]


def is_called(model, module):
    """Whether the model has use for a child at all."""
    keeps_all = all(ratio == 1.0 for stage in model.keep_ratios for ratio in stage)
    return not (isinstance(module, Scorer) and keeps_all)


def infer(model):
    with torch.no_grad():
        return model(IMAGES)


def differs(outs, want, tol=1e-5):
    for out, other in zip(outs, want, strict=True):
        if not torch.allclose(out, other, rtol=tol, atol=tol * float(other.abs().max())):
            return f'differs by {float((out - other).abs().max()):.3g}'
    return ''


class Wrapper(nn.Module):
    """Calls what it wraps, and has nothing of it."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.wrapped(*args, **kwargs)


class Proxy(Wrapper):
    """Lends its attributes, as wrappers for sharding and checkpointing do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('wrapped'), name)


def wrapper_of(module):
    """A wrapper; parts of the package are asked for their settings by those around them."""
    own = type(module).__module__.startswith('idlevit_mm')
    # mmcv's merging reads sizes of the unfolding, in the dense class too.
    return (Proxy if own or isinstance(module, nn.Unfold) else Wrapper)(module)


def replace(model, name, module):
    parent, _, leaf = name.rpartition('.')
    setattr(model.get_submodule(parent), leaf, module)


def check_all(model, change, also=lambda changed: ''):
    """Change one child after the other: it must be called, and nothing come out otherwise.

    Args:
        model: The model.
        change: From a name and a child to what undoes the change and a list of calls.
        also: What is wrong with the calls in words.
    """
    want, faults, count = infer(model), {}, 0
    for name, module in children(model):
        if not is_called(model, module):
            continue
        count += 1
        undo, calls = change(name, module)
        try:
            fault = differs(infer(model), want)
            faults[name] = fault or ('' if calls() else 'was not called') or also(calls())
        except Exception as error:
            faults[name] = repr(error)
        finally:
            undo()
    assert not differs(infer(model), want, 0.0), 'a change was not undone'
    assert count > 15
    assert not {name: fault for name, fault in faults.items() if fault}


@pytest.mark.parametrize('keep', [1.0, 0.5])
@FAMILIES
def test_a_wrapper_in_its_place(name, keep):
    model = build(name, keep)

    def change(path, module):
        wrapper = wrapper_of(module)
        replace(model, path, wrapper)
        return lambda: replace(model, path, module), lambda: wrapper.calls

    check_all(model, change)


# What a wrapper in its place shows, for both ratios, is not shown again: who is asked is the same.
# What makes the biases of Swin V2 sees no images.
@pytest.mark.parametrize(
    ('name', 'keep'), [*((name, 0.5) for name in NAMES[:-1]), ('swin', 1.0), ('mit', 1.0)]
)
def test_a_forward_hook(name, keep):
    model = build(name, keep)

    def change(path, module):
        shapes = []
        handle = module.register_forward_hook(lambda *args: shapes.append(first_shape(args[2])))
        return handle.remove, lambda: shapes

    def also(shapes):
        # Images come first, or windows of images; second in torch's attention, which is called
        # with tokens first.
        shape, batch = shapes[-1], len(IMAGES)
        if shape[0] % batch == 0 or shape[1] == batch:
            return ''
        return f'its last output is {tuple(shape)}'

    check_all(model, change, also)


def first_shape(output):
    while not isinstance(output, Tensor):
        output = output[0]
    return output.shape


@pytest.mark.parametrize('name', ['swin', 'mit', 'vit'])
@pytest.mark.parametrize('kind', ['pre', 'own forward'])
def test_a_hook_before_it_or_a_forward_of_its_own(name, kind):
    model = build(name, 0.5)

    def change(path, module):
        calls = []
        if kind == 'pre':
            handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
            return handle.remove, lambda: calls

        def forward(*args, **kwargs):
            calls.append(1)
            return type(module).forward(module, *args, **kwargs)

        module.forward = forward
        return lambda: delattr(module, 'forward'), lambda: calls

    check_all(model, change)


def test_hooks_on_all_modules_at_once_change_nothing():
    """Counters and profilers set them: who measures must see what runs without it."""
    for name in NAMES:
        model = build(name, 0.5)
        want, seen = infer(model), set()
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, s=seen: s.add(m))
        try:
            got = infer(model)
        finally:
            handle.remove()
        assert all_equal(got, want), name
        assert {block for stage in model.idle_blocks for block in stage} <= seen, name


# What changes weights: two steps of training, so that none is from the step before


def two_steps(model):
    """Outputs of the second step, and gradients of both."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.zero_grad()
    for step in range(2):
        outs = model(IMAGES)
        sum(out.square().mean() for out in outs).backward()
        if step == 0:
            optimizer.step()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return [*(out.detach() for out in outs), torch.stack(grads).square().sum()]


def owners(model):
    """Modules with parameters of their own, and the name of one of them."""
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own:
            yield name, module, own[0]


def prune_nothing(module, key):
    prune.l1_unstructured(module, key, amount=0)
    return lambda: prune.remove(module, key)


def parametrize_by_itself(module, key):
    parametrization.register_parametrization(module, key, nn.Identity())
    return lambda: parametrization.remove_parametrizations(module, key, leave_parametrized=False)


@pytest.mark.parametrize('name', NAMES[:4])
@pytest.mark.parametrize('change', [prune_nothing, parametrize_by_itself])
def test_changed_weights(name, change):
    model = build(name, 0.5).train()
    faults, before = {}, copy.deepcopy(model.state_dict())
    want = two_steps(model)
    model.load_state_dict(before)
    for path, module, key in list(owners(model)):
        undo = change(module, key)
        try:
            faults[path] = differs(two_steps(model), want)
        except Exception as error:
            faults[path] = repr(error)
        undo()
        model.load_state_dict(before)
    assert not {path: fault for path, fault in faults.items() if fault}


@pytest.mark.parametrize(
    ('name', 'scorer'),
    [
        ('swin', 'learned'),
        ('swin', 'mean_query'),
        ('pvt', 'mean_query'),
        ('vit', 'mean_query'),
        ('vit', 'class_query'),
    ],
)
def test_changed_weights_that_scores_are_computed_with(name, scorer):
    for change in (prune_nothing, parametrize_by_itself):
        assert_changed_weights_serve(name, scorer, change)


def assert_changed_weights_serve(name, scorer, change):
    model = build(name, 0.5, policy=dict(scorer=scorer)).train()
    want = two_steps(copy.deepcopy(model))
    for _, module, key in list(owners(model)):
        # Torch's attention, when it is called, does not call its output: pruned both at once they
        # fail in the dense class too.
        if not (change is prune_nothing and isinstance(module, NonDynamicallyQuantizableLinear)):
            change(module, key)
    assert not differs(two_steps(model), want)


class Adapter(nn.Module):
    """A low-rank addition to a layer that is frozen; it has no weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


@FAMILIES
def test_adapters_in_place_of_linear_layers(name):
    """One after the other, and at last all of them."""
    for keep in (1.0, 0.5):
        model = build(name, keep).train()
        want, faults = model(IMAGES), {}
        layers = [(path, m) for path, m in children(model) if isinstance(m, nn.Linear)]
        for path, module in layers:
            faults[path] = replaced(model, [(path, module)], want)
            replace(model, path, module)
        faults['all'] = replaced(model, layers, want)
        inferred = infer(model.eval())
        for path, module in layers:
            replace(model, path, module)
        assert not differs(inferred, infer(model))
        assert len(faults) > 1
        assert not {path: fault for path, fault in faults.items() if fault}


def replaced(model, layers, want):
    """What is wrong with a model that has adapters in place of layers, in words."""
    adapters = [Adapter(module) for _, module in layers]
    for (path, _), adapter in zip(layers, adapters, strict=True):
        replace(model, path, adapter)
    outs = model(IMAGES)
    sum(out.square().mean() for out in outs).backward()
    if any(one.up.grad is None or not one.up.grad.abs().max() > 0 for one in adapters):
        return 'no gradient reaches it'
    return differs(outs, want)


@pytest.mark.filterwarnings('ignore')
@FAMILIES
def test_dynamic_quantisation(name):
    for keep, tol in ((1.0, 0.1), (0.5, 0.3)):
        # Ranks of tokens may change with precision; those of a fixed order do not.
        model = build(name, keep, policy=dict(scorer='uniform_grid'))
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        layers = [m for m in small.modules() if 'quantized' in type(m).__module__]
        assert bool(layers) == any(type(m) is nn.Linear for m in model.modules())
        outs, wants = infer(small), infer(model)
        assert_all_close(outs, wants, tol)
        assert not layers or not any(map(torch.equal, outs, wants))


# What takes the place of fused attention


@each(case for case in CASES if case.variant.name in ('swin', 'vit'))
def test_an_attention_that_is_called_serves_every_policy(case):
    model = case.build()
    want, masks, calls = infer(model), sum(model.keep_masks, []), []
    for name, module in model.named_modules():
        called = ('w_msa.qkv', 'w_msa.attn_drop') if case.variant.is_swin else ('attn.attn',)
        if name.endswith(called):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert not differs(infer(model), want)
    number = sum(case.variant.depths)
    assert len(calls) >= 2 * number if case.variant.is_swin else len(calls) == number
    assert all_equal(sum(model.keep_masks, []), masks)


def test_scores_by_queries_refuse_an_attention_without_their_weights():
    for scorer in ('class_query', 'mean_query'):
        model = build('vit', 0.5, policy=dict(scorer=scorer))
        attention = model.layers[0].attn
        attention.attn = Wrapper(attention.attn)
        with pytest.raises(ValueError, match=r'attn\.attn is a Wrapper without in_proj_weight'):
            infer(model)


def test_dropout_of_one_s_own_acts_on_the_attention_weights():
    """Not fused: the weights it sees are those of all windows, and sum to one."""
    model, seen = build('swin', 0.5), []
    for block in model.idle_blocks[0]:
        block.attn.w_msa.attn_drop.register_forward_hook(lambda m, a, out: seen.append(out))
    infer(model)
    assert seen
    for weights in seen:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.shape[-1] == weights.shape[-2] == 16

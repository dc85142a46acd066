"""The learned scorer: a gate without value, whose gradient is what the block has added."""

import itertools

import pytest
import torch
from backbone_zoo import FAMILIES, all_equal, assert_close, image, stage_blocks, variant_scopes
from policy_cases import Case
from torch import nn

from idlevit_mm.ops import row_mask
from idlevit_mm.policies import Scorer, Seen
from idlevit_mm.registry import SCORERS

SCOPES = variant_scopes(FAMILIES)


class Given(Scorer):
    """Scores that are a parameter, so that their gradient can be read."""

    learns = True

    def __init__(self, scores):
        super().__init__(1)
        self.values = nn.Parameter(scores)

    def forward(self, seen):
        return self.values


def build(variant, scope, keep=0.5, **kwargs):
    case = Case('learned', variant, dict(type='IdleViT', scorer='learned', scope=scope))
    return case.build(keep, drop_path_rate=0.0, **kwargs)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_gradient_of_a_score_is_what_the_block_adds(variant, scope):
    """<gradient of the output at the token, output - input>; of idle tokens none."""
    for with_cp, keep in itertools.product((False, True), (1.0, 0.5)):
        model = build(variant, scope, with_cp=with_cp).double().train()
        block = stage_blocks(model)[0][-1]
        hw = (5, 7)
        generator = torch.Generator().manual_seed(3)
        shape = 2, 2, 35 + block.num_class, block.policy.scorer.embed_dims
        x, weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        block.policy.scorer = Given(torch.randn(2, 35, generator=generator, dtype=torch.float64))
        out, (pack, plan, *_) = block(x.requires_grad_(), hw, keep)
        assert pack is None
        (out * weight).sum().backward()
        added = ((out - x).detach() * weight).sum(-1)[:, :35]
        active = torch.ones(2, 35, dtype=torch.bool)
        if plan.rows is not None:
            active = row_mask(plan.rows, 35)
            assert not active.all()
        else:
            assert keep == 1.0
        grad = block.policy.scorer.values.grad
        assert_close(grad, torch.where(active, added, 0.0), 1e-12)
        assert torch.equal(grad != 0, active)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES)
def test_gate_changes_neither_outputs_nor_other_gradients(variant, scope):
    """Features and block weights are trained as with the same tokens of a scorer that is fixed."""
    x = image((3, 3, 45, 58), dtype=torch.float64)
    for keep in (1.0, 0.5):
        results = []
        for learns in (True, False):
            model = build(variant, scope, keep).double()
            model.train(learns)  # nothing is dropped
            outs = model(x)
            sum(out.square().sum() for out in outs).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if '.scorer.' not in n}
            heads = [p.grad for n, p in model.named_parameters() if '.scorer.' in n]
            assert all((grad is not None) == learns for grad in heads)
            results.append((outs, sum(model.keep_masks, []), grads))
        (outs, masks, grads), (wants, want_masks, want_grads) = results
        assert all_equal(outs, wants)
        assert all_equal(masks, want_masks)
        for name, grad in want_grads.items():
            assert_close(grads[name], grad, 1e-10, name)


@pytest.mark.parametrize(('variant', 'scope'), SCOPES[::2])
def test_importance_is_the_size_of_the_gain(variant, scope):
    """Scores rise where the gate's gradient is larger than the mean of the active tokens."""
    x = image((2, 3, 45, 58), dtype=torch.float64)
    given, seen = {}, {}
    for lesson in ('gain', 'importance'):
        model = build(variant, scope, policy=dict(scorer=dict(type='learned', learns_from=lesson)))
        model.double().train()
        scorer = stage_blocks(model)[0][0].policy.scorer
        scorer.out.register_forward_hook(
            lambda _m, _a, out, to=seen, key=lesson: to.update({key: (out.retain_grad(), out)[1]})
        )
        sum(out.square().sum() for out in model(x)).backward()
        score = seen[lesson].detach().squeeze(-1).sigmoid()
        given[lesson] = seen[lesson].grad.squeeze(-1) / (score * (1 - score))
    for gain, lesson in zip(given['gain'], given['importance'], strict=True):
        active = [t for t, g in enumerate(gain.tolist()) if g != 0]
        mean = sum(abs(float(gain[t])) for t in active) / len(active)
        want = [mean - abs(g) if g != 0 else 0.0 for g in gain.tolist()]
        assert 0 < len(active) < len(want)
        assert_close(lesson, torch.tensor(want, dtype=torch.float64), 1e-10)


def test_hidden_channels():
    variant = FAMILIES[0]
    policy = dict(scorer=dict(type='learned', hidden_dims=5))
    assert stage_blocks(variant.build(policy=policy))[0][0].policy.scorer.hidden.out_features == 5
    with pytest.raises(ValueError, match=r'hidden_dims=0'):
        variant.build(policy=dict(scorer=dict(type='learned', hidden_dims=0)))
    with pytest.raises(
        ValueError, match=r"learns_from='all' is unknown; allowed: gain, importance"
    ):
        variant.build(policy=dict(scorer=dict(type='learned', learns_from='all')))
    with pytest.raises(ValueError, match=r"begins_as='learned' is unknown; allowed: None, mean_d"):
        variant.build(policy=dict(scorer=dict(type='learned', begins_as='learned')))


@pytest.mark.parametrize('name', ['mean_distance', 'activation_norm', 'local_contrast'])
def test_it_begins_as_another_scorer(name):
    """A head that says nothing leaves odds that are the other's scores relative to their mean."""
    seen = Seen(image((2, 35, 8), dtype=torch.float64), (5, 7))
    build = SCORERS.build
    scorer = build(dict(type='learned', embed_dims=8, begins_as=name)).double()
    nn.init.zeros_(scorer.out.weight)
    nn.init.zeros_(scorer.out.bias)
    scores, first = scorer(seen), build(dict(type=name, embed_dims=8))(seen)
    assert_close(scores / (1 - scores) * first.mean(1, keepdim=True), first, 1e-9)
    scores.square().sum().backward()
    assert scorer.out.weight.grad.abs().sum() > 0
    # Tokens that are all the same stand out nowhere.
    assert scorer(seen._replace(tokens=torch.ones_like(seen.tokens))).isfinite().all()


def test_it_learns_which_tokens_matter():
    """A loss of a few tokens alone raises their scores."""
    model = build(FAMILIES[0], 'map', 0.999).train()
    block = stage_blocks(model)[0][0]
    scorer = block.policy.scorer
    optimizer = torch.optim.Adam(scorer.parameters(), lr=0.05)
    x = torch.randn(2, 35, scorer.embed_dims)
    matters = torch.arange(35) % 5 == 0
    x[:, matters] += 2.0 * torch.tensor([1.0, -1.0] * (x.shape[-1] // 2))
    for _ in range(25):
        added = block(x, (5, 7), 0.999)[0] - x
        # What the block adds to these tokens is good, to the others bad.
        loss = (added * torch.where(matters, -1.0, 1.0)[None, :, None] * added.detach()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = scorer(Seen(x, (5, 7)))
    assert scores[:, matters].mean() > scores[:, ~matters].mean() + 0.3

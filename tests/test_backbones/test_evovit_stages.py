"""Evo-ViT as it is deployed: ranked once per stage, packed, across the stages of a pyramid."""

import math

import pytest
import seeds_reference as seeds
import torch
from backbone_zoo import (
    BY_NAME,
    assert_all_close,
    assert_close,
    gradients,
    image,
    randomize,
    stage_blocks,
)
from mmengine.registry import MODELS
from policy_cases import Case

from idlevit_mm.ops import map_units
from idlevit_mm.policies import EVERYTHING, Plan, build_policy

C, HEADS, LAYERS, GRID = 48, 3, 12, (5, 7)
DEIT = [1.0] * 4 + [0.5] * 8
PYRAMIDS = ('swin', 'pvt', 'pvtv2', 'mit', 'pcpvt', 'svt', 'vit-no-cls')


def deployed(tokens, weights, starts, ratio, alphas, representative):
    """The release's stage-wise mode, one image at a time; class attention summed over heads.

    Only ``starts`` rank. The rows of a stage are computed alone until it ends; then placeholders
    get all that was added to their representative.
    """
    patches = tokens.shape[1] - 1
    images = []
    for tensor in tokens:
        x, running, kept = seeds.split(tensor, weights), {}, []
        sequence, placeholders, merged = dict(x), [], None
        for layer in range(LAYERS):
            if layer in starts:
                x = ended(x, sequence, placeholders, merged)
                informative = seeds.best(running, int(patches * ratio))
                placeholders = [i for i in range(patches) if i not in informative]
                sequence, merged = {name: x[name] for name in [seeds.CLS, *informative]}, None
                if representative:
                    total = sum(running[i] for i in placeholders)
                    merged = sum(running[i] / total * x[i] for i in placeholders)
                    sequence[seeds.REPRESENTATIVE] = merged
            update, attention = seeds.attention_update(sequence, weights, layer, HEADS)
            sequence = seeds.added(sequence, update)
            sequence = seeds.added(sequence, seeds.mlp_update(sequence, weights, layer))
            for i in attention.keys() - {seeds.REPRESENTATIVE}:
                paid = HEADS * attention[i]
                old = running.get(i)
                running[i] = paid if old is None else old + alphas[layer] * (paid - old)
            kept.append([i for i in range(patches) if i in sequence])
        images.append((ended(x, sequence, placeholders, merged), kept))
    return seeds.collect(images, patches, weights)


def ended(x, sequence, placeholders, merged):
    """All tokens at the end of a stage."""
    x = {**x, **sequence}
    after = x.pop(seeds.REPRESENTATIVE, None)
    return x | {i: x[i] + after - merged for i in placeholders if after is not None}


@torch.no_grad()
@pytest.mark.parametrize('representative', [False, True])
@pytest.mark.parametrize('starts', [[4, 8], [5], 'stage'])
def test_deployed_form_token_for_token(representative, starts):
    first = 4 if starts == 'stage' else starts[0]
    alphas = [1.0] * 4 + [0.5] * 4 + [0.2] * 4
    settings = dict(embed_dims=C, num_layers=LAYERS, num_heads=HEADS, output_cls_token=True)
    policy = dict(
        type='EvoViT', rounding='floor', rank_at=starts, alpha=alphas, representative=representative
    )
    model = MODELS.build(
        dict(
            type='IdleVisionTransformer',
            img_size=(16 * GRID[0], 16 * GRID[1]),
            norm_cfg=dict(type='LN', eps=1e-6),
            policy=policy,
            keep_ratios=[1.0] * first + [0.5] * (LAYERS - first),
            **settings,
        )
    )
    model = randomize(model.double(), 1).eval()
    x = image((3, 3, 75, 106), seed=3, dtype=torch.float64)
    weights = model.state_dict()
    want = deployed(
        seeds.embed(x, weights),
        weights,
        [first] if starts == 'stage' else starts,
        0.5,
        alphas,
        representative,
    )
    feature_map, cls = model(x)[-1]
    for layer, mask in enumerate(model.keep_masks[0]):
        got = [one.flatten().nonzero().flatten().tolist() for one in mask]
        assert got == [kept[layer] for kept in want.kept], f'layer {layer}'
    assert_close(cls, want.cls, 1e-10)
    assert_close(feature_map.flatten(2).transpose(1, 2), want.map, 1e-10)


class Fixed(torch.nn.Module):
    """What a block of a stage does where each block gathers and spreads anew."""

    def __init__(self, policy, plans):
        super().__init__()
        self.scorer, self.scope, self.plans = policy.scorer, policy.scope, plans

    def entering(self, state, before, hw_shape):
        return None

    def wants_scores(self, keep_ratio, state):
        return False

    def attending(self, keep_ratio):
        return keep_ratio

    def plan(self, scores, units, keep_ratio, last, state):
        return self.plans.pop(0), None


def stage_case(name, **policy):
    return Case(name, BY_NAME[name], dict(type='EvoViT', rank_at='stage', **policy))


@torch.no_grad()
@pytest.mark.parametrize('name', PYRAMIDS)
def test_rows_that_stay_packed_are_those_gathered_anew(name):
    """Placeholders share what is added, so that their mean moves with them: nothing is lost."""
    model = stage_case(name).build([[0.6] * depth for depth in BY_NAME[name].depths]).double()
    x = image((2, 3, 45, 58), dtype=torch.float64)
    plans, calls = [], []
    for stage in stage_blocks(model):
        for block in stage:
            planned, look = block.planned, block.policy.scorer.forward
            block.planned = lambda *a, f=planned: (plans.append(f(*a)), plans[-1])[1]
            block.policy.scorer.forward = lambda s, f=look: (calls.append(1), f(s))[1]
    outs = model(x)
    assert len(calls) == len(stage_blocks(model)), 'ranked once per stage'
    plans = [plan.but(hold=False) for plan, _ in plans]
    for stage in stage_blocks(model):
        for block in stage:
            del block.planned
            block.policy = Fixed(block.policy, plans)
    assert_all_close(outs, model(x), 1e-10)


@pytest.mark.parametrize(
    ('hw', 'alpha', 'up'),
    [
        *(((5, 7), 0.5, True), ((6, 4), [0.3, 0.9, 0.2], True), ((11, 3), 0.5, False)),
        *(((1, 2), [0.3, 0.9, 0.2], False), ((5, 7), [0.3, 0.9, 0.2], False), ((1, 2), 0.5, True)),
    ],
)
def test_running_attention_across_stages(hw, alpha, up):
    """Against a loop over cells: subsampled, mixed with the next attention, scaled back."""
    new = tuple(math.ceil(side / 2) if up else max(side // 2, 1) for side in hw)
    policy = build_policy(
        dict(type='EvoViT', across_stages=True, rank_at='stage', alpha=alpha), 4, ('map',)
    )
    policy.put(1, [1, 2])
    mix = alpha if isinstance(alpha, float) else 0.9
    generator = torch.Generator().manual_seed(hw[0])
    state = torch.rand(2, hw[0] * hw[1], generator=generator, dtype=torch.float64)
    scores = torch.rand(2, new[0] * new[1], generator=generator, dtype=torch.float64)
    entered = policy.entering(state, hw, new)
    # A stage without idle blocks hands on what it was given.
    dense, kept = policy.plan(None, map_units(*new, scores.device), 1.0, EVERYTHING, entered)
    assert dense == EVERYTHING
    assert kept is entered
    assert policy.wants_scores(0.5, entered)
    plan, running = policy.plan(scores, map_units(*new, scores.device), 0.5, dense, entered)
    for i in range(2):
        old = [float(state[i, 2 * r * hw[1] + 2 * c]) for r in range(new[0]) for c in range(new[1])]
        total = float(scores[i].sum())
        mixed = [
            (1 - mix) * g + mix * float(a) / total for g, a in zip(old, scores[i], strict=True)
        ]
        factor = float(state[i].sum()) / sum(mixed)
        want = [factor * g for g in mixed]
        assert_close(running[i], torch.tensor(want, dtype=torch.float64), 1e-12)
        best = sorted(range(len(want)), key=lambda t: -want[t])[: max(1, round(len(want) / 2))]
        assert plan.rows.ids[i].tolist() == sorted(best)
    assert not policy.wants_scores(0.5, running)
    follow, after = policy.plan(None, map_units(*new, scores.device), 0.5, plan, running)
    assert follow.rows.ids is plan.rows.ids
    assert after is running


@torch.no_grad()
@pytest.mark.parametrize('name', ['swin', 'pvt', 'pvtv2'])
def test_a_pyramid_ranks_by_what_its_stages_hand_on(name):
    """Masks of all blocks, against a loop over images and tokens fed with the blocks' scores."""
    case = Case(name, BY_NAME[name], dict(type='EvoViT', across_stages=True, alpha=0.3))
    model = case.build(0.6).double()
    scores = []
    for block in sum(stage_blocks(model), []):
        block.policy.scorer.register_forward_hook(lambda _m, _a, out: scores.append(out))
    model(image((2, 3, 45, 58), dtype=torch.float64))
    for i in range(2):
        handed, given = None, [[float(a) for a in one[i]] for one in scores]
        for masks in model.keep_masks:
            height, width = masks[0].shape[1:]
            for block, mask in enumerate(masks):
                raw = given.pop(0)
                paid = [a / sum(raw) for a in raw]
                if block == 0 and handed is None:
                    running = paid
                elif block == 0:
                    g, old = handed
                    cells = [g[2 * r][2 * c] for r in range(height) for c in range(width)]
                    running = [0.7 * a + 0.3 * b for a, b in zip(cells, paid, strict=True)]
                    running = [old / sum(running) * a for a in running]
                order = sorted(range(len(running)), key=lambda t: -running[t])
                kept = sorted(order[: max(1, round(0.6 * len(order)))])
                assert mask[i].flatten().nonzero().flatten().tolist() == kept
                if block:
                    for t in kept:
                        running[t] = 0.7 * running[t] + 0.3 * paid[t]
            handed = [running[r * width : (r + 1) * width] for r in range(height)], sum(running)


@pytest.mark.parametrize('name', ['swin', 'pvtv2', 'vit'])
def test_learned_alphas_train(name):
    """Every weight has a gradient, those that decide one above 0; the value is that of 1/2."""
    variant = BY_NAME[name]
    case = Case(name, variant, dict(type='EvoViT', across_stages=True, alpha='learned'))
    x = image((2, 3, 45, 58), dtype=torch.float64)
    keep = [1.0, 1.0, 0.6] if variant.is_vit else 0.6
    model = case.build(keep, drop_path_rate=0.0).double()
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if 'mixing' in n):
            parameter.zero_()
    fixed = case.build(keep, drop_path_rate=0.0, policy=dict(alpha=0.5)).double()
    fixed.load_state_dict(model.state_dict(), strict=False)
    outs, grads = gradients(model.train(), x)
    assert_all_close(outs, fixed(x), 1e-12)
    mixing = [grad for key, grad in grads.items() if 'mixing' in key]
    assert len(mixing) == sum(variant.depths)
    assert all(grad is not None for grad in grads.values())
    assert any(grad.abs() > 0 for grad in mixing)


WRONG = {
    'rank_at=[4, 12]': (dict(rank_at=[4, 12]), DEIT, r'rank_at=\[4, 12\] must lie in 0 to 11'),
    "rank_at='block'": (dict(rank_at='block'), DEIT, r"rank_at='block' is unknown; allowed"),
    'alpha=[0.5]': (dict(alpha=[0.5]), DEIT, r'alpha=\[0.5\] must have one value for 12 blocks'),
    'alpha="free"': (dict(alpha='free'), DEIT, r"alpha='free' must lie in .*'learned'"),
    'alpha alone': (dict(alpha='learned', representative=False), DEIT, 'representative=True'),
    'ratios': (dict(rank_at=[4, 8]), [*DEIT[:6], *[0.4] * 6], 'stage 0 change at block 6'),
    'assist': (dict(assist=0), DEIT, 'policy.assist=0 must be'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_settings(name):
    policy, ratios, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        MODELS.build(
            dict(
                type='IdleVisionTransformer',
                arch='deit-tiny',
                policy=dict(type='EvoViT', **policy),
                keep_ratios=ratios,
            )
        )


def test_plans_of_a_stage_are_held():
    """In windows, whose summaries are of other tokens in the next block, they are not."""
    for name, holds in (('pvt', True), ('swin', False), ('vit-no-cls', True)):
        model = stage_case(name).build([[0.6] * depth for depth in BY_NAME[name].depths])
        model(image((1, 3, 45, 58)))
        plans = [plan for record in model.records for plan in record.plans]
        assert all(isinstance(plan, Plan) and plan.hold == holds for plan in plans), name

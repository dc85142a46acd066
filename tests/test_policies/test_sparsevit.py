"""SparseViT: whole windows, ranked once per stage by the L2 norm of the mean activation."""

import pytest
import torch
from backbone_zoo import BY_NAME, BlockTrace, assert_close, image, stage_blocks
from policy_cases import Case
from test_summaries import softmax_attention, windows_of
from torch.nn import functional as F

from idlevit_mm.kernels import use_backend
from idlevit_mm.policies import ActivationNorm, MeanDistance

SWIN = BY_NAME['swin']
CASE = Case('sparsevit', SWIN, dict(type='SparseViT'))
DEEP = dict(depths=(4, 2), drop_path_rate=0.0)
RATIOS = [[1.0, 0.7, 0.4, 0.4], [0.5, 0.3]]
SIZES = [(2, 3, 64, 80), (2, 3, 45, 58), (1, 3, 4, 40)]


class Counting(ActivationNorm):
    calls = 0

    def forward(self, *args):
        Counting.calls += 1
        return super().forward(*args)


def counting(model):
    Counting.calls = 0
    for stage in stage_blocks(model):
        for block in stage:
            block.policy.scorer = Counting(block.policy.scorer.embed_dims)
    return model


def test_scores_once_per_stage():
    model = counting(CASE.build(RATIOS, **DEEP))
    model(image(SIZES[1]))
    assert Counting.calls == 2
    model.set_keep_ratios([[1.0] * 4, [1.0, 0.5]])
    model(image(SIZES[1]))
    assert Counting.calls == 3
    model.set_keep_ratios(1.0)
    model(image(SIZES[1]))
    assert Counting.calls == 3


def test_rising_ratios_are_refused():
    model = CASE.build(RATIOS, **DEEP)
    for rising in ([[0.5, 0.5, 0.6, 0.5], [0.5, 0.5]], [[1.0] * 4, [0.5, 1.0]]):
        with pytest.raises(ValueError, match=r'keep_ratios=.*stage \d rise.*SparseViT'):
            model.set_keep_ratios(rising)
        with pytest.raises(ValueError, match='keep_ratios'):
            CASE.build(rising, **DEEP)
    assert model.keep_ratios == RATIOS
    model.set_keep_ratios([0.3, 0.9])  # from stage to stage they may


def test_default_scorer_is_that_of_the_policy_also_where_none_is_written():
    for policy in ({}, dict(scorer=None), dict(scorer='activation_norm')):
        model = CASE.build(policy=policy)
        assert isinstance(stage_blocks(model)[0][0].policy.scorer, ActivationNorm)
    other = CASE.build(policy=dict(scorer='mean_distance'))
    assert isinstance(stage_blocks(other)[0][0].policy.scorer, MeanDistance)


def release(block, x, hw, shares, known, pads_first):
    """One image (N, C) through a block: windows ranked once for each kind, the chosen computed.

    The map is padded before the norm, so that padding is the norm's bias, or after it.
    """
    msa, shift = block.attn.w_msa, block.attn.shift_size
    slots = list(windows_of(hw, 4, shift))
    if shares and 'magnitude' not in known:
        known['magnitude'] = x.abs().mean(-1)
    chosen = range(len(slots))
    if 'magnitude' in known:
        norms = [
            sum(float(known['magnitude'][t]) ** 2 for t in tokens if t >= 0) for tokens, _ in slots
        ]
        order = known.setdefault(shift, sorted(chosen, key=lambda w: -norms[w]))
        chosen = order[: max(1, int(len(slots) * (1 - shares)))]  # ours is the one at least
    table = msa.relative_position_bias_table[msa.relative_position_index.flatten()]
    bias = table.view(16, 16, -1).permute(2, 0, 1)
    out = x.clone()
    for window in chosen:
        tokens, region = slots[window]
        blank = torch.zeros_like(x[0])
        if pads_first:
            rows = block.norm1(torch.stack([x[t] if t >= 0 else blank for t in tokens]))
        else:
            rows = torch.stack([block.norm1(x[t]) if t >= 0 else blank for t in tokens])
        visible = region[:, None] == region[None]
        attended = softmax_attention(msa.qkv(rows), msa.num_heads, msa.scale, bias, visible)
        for t, row in zip(tokens, attended, strict=True):
            if t >= 0:
                y = x[t] + F.linear(row, msa.proj.weight, msa.proj.bias)
                out[t] = block.ffn(block.norm2(y), identity=y)
    return out


@torch.no_grad()
@pytest.mark.parametrize('backend', ['cpu', 'reference'])
@pytest.mark.parametrize('padding', ['after_norm', 'before_norm'])
@pytest.mark.parametrize('size', [(2, 3, 45, 58), (1, 3, 4, 40)])
def test_equals_the_release_token_for_token(size, padding, backend):
    shares = [0.0, 0.0, 0.4, 0.7]
    ratios = [[1 - share for share in shares], 1.0]
    policy = dict(rounding='floor', padding=padding)
    model = CASE.build(ratios, policy=policy, **DEEP).double()
    with BlockTrace(model) as trace, use_backend(backend):
        model(image(size, dtype=torch.float64))
    blocks, calls = stage_blocks(model)[0], trace.calls[0]
    hw = tuple(model.keep_masks[0][0].shape[1:])
    for i in range(size[0]):
        x, known = calls[0][0][i], {}
        for block, share, (_, after, _) in zip(blocks, shares, calls, strict=True):
            x = release(block, x, hw, share, known, padding == 'before_norm')
            assert_close(after[i], x, 1e-10)


def test_wrong_padding():
    with pytest.raises(ValueError, match=r"policy.padding='zero' is unknown; allowed: after_norm"):
        CASE.build(policy=dict(padding='zero'))

"""Policies on small models of every family: what the tests of policies are parametrised over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from backbone_zoo import BY_NAME, FAMILIES, Variant, randomize
from torch import nn

FAMILY_NAMES = ('swin', 'pvt', 'pvtv2', 'mit', 'svt', 'vit', 'vit-no-cls', 'vitdet')
# MiT is PVTv2 with other numbers.
CASE_FAMILIES = tuple(name for name in FAMILY_NAMES if name != 'mit')


@dataclass(frozen=True)
class Case:
    """A policy on a small backbone.

    Args:
        name: Test id.
        variant: The backbone.
        policy: Config of the policy.
    """

    name: str
    variant: Variant
    policy: dict[str, Any] = field(hash=False)

    @property
    def by_class_attention(self) -> bool:
        return (
            self.variant.has_class_token
            and self.policy['type'] in ('EViT', 'EvoViT')
            and self.policy.get('scorer', 'class_attention') == 'class_attention'
        )

    def ratios(self, keep: float = 0.6) -> list[list[float]]:
        """A ratio per block that the policy can follow; idle blocks follow one another."""
        first = 1.0 if self.variant.is_plain else keep
        return [[first] + [keep] * (depth - 1) for depth in self.variant.depths]

    def build(self, keep: Any = None, seed: int = 0, **kwargs: Any) -> nn.Module:
        ratios = self.ratios() if keep is None else keep
        policy = {**self.policy, **kwargs.pop('policy', {})}
        model = self.variant.build(keep_ratios=ratios, policy=policy, **kwargs)
        return randomize(model, seed).eval()


def _cases() -> list[Case]:
    cases = []
    for name in CASE_FAMILIES:
        variant = BY_NAME[name]
        policies: dict[str, dict[str, Any]] = {}
        for scope in variant.scopes:
            policies[f'idlevit-{scope}'] = dict(type='IdleViT', scope=scope)
            if scope != 'window_tokens':
                policies[f'idlevit-{scope}-learned'] = dict(
                    type='IdleViT', scope=scope, scorer='learned'
                )
        policies['idlevit-context'] = dict(type='IdleViT', context='all')
        policies['idlevit-summary'] = dict(type='IdleViT', context='summary')
        if name in ('swin', 'pvtv2', 'vit'):
            own = dict(type='IdleViT') if name == 'vit' else dict(type='EvoViT')
            policies[f'{own["type"].lower()}-attention'] = dict(own, attention_ratios=0.3)
        policies['evit'] = dict(type='EViT', fuse=True)
        policies['evovit'] = dict(type='EvoViT', representative=True)
        if name in ('pvtv2', 'svt', 'vit'):
            policies['evovit-stages'] = dict(type='EvoViT', rank_at='stage')
        if name in ('swin', 'vit'):
            policies['evit-dropping'] = dict(type='EViT', fuse=False)
            policies['evovit-passing'] = dict(type='EvoViT', representative=False)
        if 'windows' in variant.scopes:
            policies['sparsevit'] = dict(type='SparseViT')
        if variant.has_class_token:
            for policy in ('EViT', 'EvoViT'):
                policies[f'{policy.lower()}-norm'] = dict(type=policy, scorer='activation_norm')
        cases += [Case(f'{name}-{key}', variant, policy) for key, policy in policies.items()]
    return cases


CASES = _cases()
BY_CASE = {case.name: case for case in CASES}
# What each policy and scope does in windows, in reduced maps with a convolution, and with a class
# token; the others are the same code with less.
CORE = [
    case
    for case in CASES
    if case.variant.name in ('swin', 'pvtv2', 'vit')
    and case.name.split('-')[-1] not in ('learned', 'dropping', 'passing')
]


# The same without IdleViT's plain choice of tokens, which tests/test_backbones/test_idling.py is
# about, but for that by the class token's query.
OWN = [
    case
    for case in CORE
    if case.policy['type'] != 'IdleViT' or 'context' in case.policy or case.variant.is_vit
]

# IdleViT in every family and scope, by a scorer that has weights to train.
SCOPES = [
    Case(f'{v.name}-{scope}', v, dict(type='IdleViT', scorer='mean_query', scope=scope))
    for v in FAMILIES
    for scope in v.scopes
]


def each(cases: Iterable[Case | str]) -> pytest.MarkDecorator:
    """``parametrize`` over cases, or their names."""
    chosen = [case if isinstance(case, Case) else BY_CASE[case] for case in cases]
    return pytest.mark.parametrize('case', chosen, ids=[case.name for case in chosen])

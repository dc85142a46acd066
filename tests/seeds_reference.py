"""IdleViT, EViT and Evo-ViT as published, written naively and apart from the package.

One image at a time, tokens in a dict by patch number, nothing shared with ``idlevit_mm``: what the
fast code has to reproduce. Papers: IdleViT arXiv 2310.05654, EViT arXiv 2202.07800, Evo-ViT arXiv
2108.01390. ``weights`` are the parameters of a vision transformer by mmseg's names; registers
(arXiv 2309.16588) and layer scale (arXiv 2103.17239), which the papers have not, may be among them.

Shape letters: B images, N patches, P class token and registers, C channels, T tokens of a sequence,
D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CLS = -1
REPRESENTATIVE = -2
REGISTER = -3  # and below
EPS = 1e-6

Weights = Mapping[str, Tensor]
# A sequence of tokens: each (C,), by patch number; others than patches have negative ones, and
# EViT's fused ones made-up numbers.
Tokens = dict[int, Tensor]


class Result(NamedTuple):
    """What an algorithm made of a batch.

    Attributes:
        cls: (B, C), class tokens after the final norm.
        map: (B, N, C), all patches after the final norm; those that left keep their last features.
        kept: ``kept[image][layer]``: sorted numbers of the patches a layer kept. EViT's fused
            tokens have the numbers N + layer.
    """

    cls: Tensor
    map: Tensor
    kept: list[list[list[int]]]


# --- pieces of a vision transformer -----------------------------------------------------------


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm of the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / deviation * weights[f'{name}.weight'] + weights[f'{name}.bias']


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def project(x: Tensor, weights: Weights, layer: int, part: str) -> Tensor:
    """Query, key or value (part 'q', 'k' or 'v') of normed tokens x (T, C)."""
    c = x.shape[-1]
    rows = slice('qkv'.index(part) * c, ('qkv'.index(part) + 1) * c)
    name = f'layers.{layer}.attn.attn.in_proj_'
    return linear(x, weights[f'{name}weight'][rows], weights[f'{name}bias'][rows])


def head(x: Tensor, number: int, num_heads: int) -> Tensor:
    """The channels of one head: (T, C) to (T, D)."""
    d = x.shape[-1] // num_heads
    return x[:, number * d : (number + 1) * d]


def attend(
    q: Tensor, k: Tensor, v: Tensor, weights: Weights, layer: int, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Attention with its output projection.

    Returns:
        Outputs (T, C), and the first token's attention to all (T,), averaged over heads.
    """
    outputs, first_rows = [], []
    for number in range(num_heads):
        qh, kh, vh = (head(x, number, num_heads) for x in (q, k, v))
        logits = qh @ kh.T / math.sqrt(kh.shape[-1])
        exponentials = (logits - logits.max(-1, keepdim=True).values).exp()
        attention = exponentials / exponentials.sum(-1, keepdim=True)
        outputs.append(attention @ vh)
        first_rows.append(attention[0])
    name = f'layers.{layer}.attn.attn.out_proj'
    output = linear(torch.cat(outputs, -1), weights[f'{name}.weight'], weights[f'{name}.bias'])
    output = output * weights.get(f'layers.{layer}.attn.gamma1.weight', 1)
    return output, sum(first_rows) / num_heads


def attention_update(
    tokens: Tokens, weights: Weights, layer: int, num_heads: int
) -> tuple[Tokens, dict[int, Tensor]]:
    """What attention adds to each token, and the class token's attention to patches and fused."""
    names = [CLS] + [name for name in tokens if name != CLS]
    y = norm(torch.stack([tokens[name] for name in names]), weights, f'layers.{layer}.ln1')
    q, k, v = (project(y, weights, layer, part) for part in 'qkv')
    output, row = attend(q, k, v, weights, layer, num_heads)
    update = dict(zip(names, output, strict=True))
    return update, {name: a for name, a in zip(names, row, strict=True) if name >= 0}


def mlp_update(tokens: Tokens, weights: Weights, layer: int) -> Tokens:
    """What the MLP adds to each token."""
    names = list(tokens)
    y = norm(torch.stack([tokens[name] for name in names]), weights, f'layers.{layer}.ln2')
    first, second = (f'layers.{layer}.ffn.layers.{i}' for i in ('0.0', '1'))
    hidden = linear(y, weights[f'{first}.weight'], weights[f'{first}.bias'])
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    output = linear(hidden, weights[f'{second}.weight'], weights[f'{second}.bias'])
    output = output * weights.get(f'layers.{layer}.ffn.gamma2.weight', 1)
    return dict(zip(names, output, strict=True))


def added(tokens: Tokens, update: Tokens) -> Tokens:
    """The tokens of an update, with it."""
    return {name: tokens[name] + update[name] for name in update}


def best(scores: Mapping[int, Tensor], count: int) -> list[int]:
    """Names of the highest scores, in ascending order."""
    ranked = sorted(scores, key=lambda name: float(scores[name]), reverse=True)
    return sorted(ranked[:count])


def depth(weights: Weights) -> int:
    return 1 + max(int(key.split('.')[1]) for key in weights if key.startswith('layers.'))


def embed(images: Tensor, weights: Weights) -> Tensor:
    """Tokens (B, P + N, C) of images (B, 3, H, W), class token first, position added.

    Images are padded at the right and at the bottom; the position table has to fit.
    """
    kernel = weights['patch_embed.projection.weight']
    size = kernel.shape[-1]
    batch, _, height, width = images.shape
    canvas = images.new_zeros(batch, 3, -(-height // size) * size, -(-width // size) * size)
    canvas[:, :, :height, :width] = images
    tokens = [weights['cls_token'][0].expand(batch, -1)]
    for top in range(0, height, size):
        for left in range(0, width, size):
            patch = canvas[:, :, top : top + size, left : left + size].flatten(1)
            tokens.append(linear(patch, kernel.flatten(1), weights['patch_embed.projection.bias']))
    if 'register_tokens' not in weights:
        return torch.stack(tokens, dim=1) + weights['pos_embed']
    before = torch.cat([weights['cls_token'], weights['register_tokens']], dim=1)
    patches = torch.stack(tokens[1:], dim=1) + weights['pos_embed']
    return torch.cat([before.expand(batch, -1, -1), patches], dim=1)


def before_map(weights: Weights) -> list[int]:
    """Names of the class token and the registers."""
    registers = weights['register_tokens'].shape[1] if 'register_tokens' in weights else 0
    return [CLS, *(REGISTER - number for number in range(registers))]


def split(image: Tensor, weights: Weights) -> Tokens:
    """Embedded tokens of an image (P + N, C), class token first, by patch number."""
    first = before_map(weights)
    names = [*first, *range(len(image) - len(first))]
    return dict(zip(names, image, strict=True))


def collect(
    images: Sequence[tuple[Tokens, list[list[int]]]], patches: int, weights: Weights
) -> Result:
    cls, maps, kept = [], [], []
    for tokens, layers in images:
        cls.append(norm(tokens[CLS], weights, 'ln1'))
        maps.append(norm(torch.stack([tokens[i] for i in range(patches)]), weights, 'ln1'))
        kept.append(layers)
    return Result(torch.stack(cls), torch.stack(maps), kept)


# --- IdleViT ----------------------------------------------------------------------------------


def idlevit_counts(patches: int, keep_ratio: float) -> list[int]:
    """Patches each layer computes: int(N r), int(N r^2), int(N r^3) in 3 + 3 + 2 of 12 layers."""
    return [
        patches if layer < 4 else int(patches * keep_ratio ** (1 + (layer - 4) // 3))
        for layer in range(12)
    ]


def idlevit(
    tokens: Tensor,
    weights: Weights,
    num_heads: int,
    keep_counts: Sequence[int],
    most_attending: int | None = None,
) -> Result:
    """IdleViT: layer l computes keep_counts[l] patches and the class token, the rest idles.

    Args:
        tokens: (B, P + N, C), embedded tokens, class token first.
        weights: Parameters by mmseg's names.
        num_heads: Heads of every attention.
        keep_counts: Number of active patches of each layer.
        most_attending: Of how many of them, the best, an idle layer computes the attention; of all
            by default. The paper has no such thing.
    """
    patches = tokens.shape[1] - len(before_map(weights))
    images = []
    for image in tokens:
        x, kept = split(image, weights), []
        for layer, count in enumerate(keep_counts):
            x, chosen = _idle_layer(x, weights, layer, num_heads, count, most_attending or count)
            kept.append(chosen)
        images.append((x, kept))
    return collect(images, patches, weights)


def _idle_layer(
    x: Tokens, weights: Weights, layer: int, num_heads: int, count: int, most_attending: int
) -> tuple[Tokens, list[int]]:
    first = before_map(weights)
    patches = len(x) - len(first)
    places = [*first, *range(patches)]
    y = norm(torch.stack([x[place] for place in places]), weights, f'layers.{layer}.ln1')
    # Keys of all tokens serve the choice, those of the chosen ones the attention as well.
    keys = project(y, weights, layer, 'k')
    cls_query = project(y[:1], weights, layer, 'q')
    chosen = attending = list(range(patches))
    if count < len(chosen):
        scores: Tokens = dict.fromkeys(chosen, torch.zeros(()))
        for number in range(num_heads):
            products = head(cls_query, number, num_heads) @ head(keys, number, num_heads).T
            for patch in scores:
                scores[patch] = scores[patch] + products[0, len(first) + patch] / num_heads
        chosen, attending = (best(scores, number) for number in (count, min(count, most_attending)))
    rows = [*range(len(first)), *(len(first) + patch for patch in attending)]
    q = torch.cat([cls_query, project(y[rows[1:]], weights, layer, 'q')])
    v = project(y[rows], weights, layer, 'v')
    output, _ = attend(q, keys[rows], v, weights, layer, num_heads)
    x = {**x, **added(x, dict(zip([*first, *attending], output, strict=True)))}
    active = {name: x[name] for name in [*first, *chosen]}
    return {**x, **added(active, mlp_update(active, weights, layer))}, chosen


# --- EViT -------------------------------------------------------------------------------------


def evit(
    tokens: Tensor,
    weights: Weights,
    num_heads: int,
    keep_ratio: float,
    layers: Sequence[int] = (3, 6, 9),
    fuse: bool = True,
) -> Result:
    """EViT: some layers drop the tokens the class token attends to least, or fuse them into one.

    Args:
        tokens: (B, P + N, C), embedded tokens, class token first.
        weights: Parameters by mmseg's names.
        num_heads: Heads of every attention.
        keep_ratio: Share of the sequence, without the class token, that stays.
        layers: Where tokens are dropped, between attention and MLP.
        fuse: Whether the dropped tokens, weighted by their attention, become one new token.
    """
    patches = tokens.shape[1] - len(before_map(weights))
    images = []
    for image in tokens:
        x, left, kept = split(image, weights), {}, []
        for layer in range(depth(weights)):
            update, attention = attention_update(x, weights, layer, num_heads)
            x = added(x, update)
            if layer in layers:
                x, dropped = _reorganise(x, attention, keep_ratio, patches + layer, fuse)
                left.update(dropped)
            x = added(x, mlp_update(x, weights, layer))
            kept.append(sorted(name for name in x if name >= 0))
        images.append(({**left, **x}, kept))
    return collect(images, patches, weights)


def _reorganise(
    x: Tokens, attention: Mapping[int, Tensor], keep_ratio: float, fused: int, fuse: bool
) -> tuple[Tokens, Tokens]:
    """Split tokens into those that go on and those that leave; ``fused`` names the new token."""
    kept = best(attention, math.ceil(keep_ratio * len(attention)))
    dropped = {name: x[name] for name in attention if name not in kept}
    stays = {name: x[name] for name in x if name < 0 or name in kept}
    if fuse and dropped:
        stays[fused] = sum(attention[name] * token for name, token in dropped.items())
    return stays, dropped


# --- Evo-ViT ----------------------------------------------------------------------------------


def evovit(
    tokens: Tensor,
    weights: Weights,
    num_heads: int,
    first_layer: int = 4,
    keep_ratio: float = 0.5,
    alpha: float = 0.5,
    representative: bool = True,
) -> Result:
    """Evo-ViT: informative tokens are computed, the others follow their representative.

    Args:
        tokens: (B, P + N, C), embedded tokens, class token first.
        weights: Parameters by mmseg's names.
        num_heads: Heads of every attention.
        first_layer: The first layer with placeholder tokens.
        keep_ratio: Share of informative patches.
        alpha: Weight of a layer's class attention in the running one.
        representative: Whether placeholders have a representative; unchanged without.
    """
    patches = tokens.shape[1] - len(before_map(weights))
    images = []
    for image in tokens:
        x, running, kept = split(image, weights), {}, []
        for layer in range(depth(weights)):
            count = patches if layer < first_layer else int(patches * keep_ratio)
            informative = list(range(patches)) if count == patches else best(running, count)
            placeholders = [i for i in range(patches) if i not in informative]
            sequence = {name: x[name] for name in [*before_map(weights), *informative]}
            if representative and placeholders:
                total = sum(running[i] for i in placeholders)
                sequence[REPRESENTATIVE] = sum(running[i] / total * x[i] for i in placeholders)
            from_attention, attention = attention_update(sequence, weights, layer, num_heads)
            sequence = added(sequence, from_attention)
            from_mlp = mlp_update(sequence, weights, layer)
            sequence = added(sequence, from_mlp)
            if sequence.pop(REPRESENTATIVE, None) is not None:
                for i in placeholders:
                    x[i] = x[i] + from_attention[REPRESENTATIVE] + from_mlp[REPRESENTATIVE]
            x.update(sequence)
            for i in informative:
                old = running.get(i, attention[i])
                running[i] = (1 - alpha) * old + alpha * attention[i]
            kept.append(informative)
        images.append((x, kept))
    return collect(images, patches, weights)


# --- multiply-adds ----------------------------------------------------------------------------


def multiply_adds(
    patches: int,
    embed_dims: int,
    keep_counts: Sequence[int],
) -> int:
    """Multiply-adds of IdleViT's matrix products for one image, without classifier.

    Args:
        patches: Patches of 16 x 16 pixels of the image.
        embed_dims: Channels of a token.
        keep_counts: Active patches of each layer; all of them make a layer dense.
    """
    c = embed_dims
    total = patches * 3 * 16 * 16 * c
    for count in keep_counts:
        active = count + 1
        keyed = patches + 1
        total += keyed * c * c + 2 * active * c * c  # keys of all tokens, queries, values
        total += 2 * active * active * c + active * c * c  # attention, output projection
        total += 2 * active * c * 4 * c
        if count < patches:
            total += keyed * c  # the class token's query with every key
    return total

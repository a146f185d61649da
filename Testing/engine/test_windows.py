"""NICE-Trans's attention within windows against what it is defined as, token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from MorphSeekLib.backbones.windows import SwinAttention, SwinStage


def side(position: int, length: int, window: int, shift: int) -> int:
    """Return on which side of an axis's seam a position of the padded grid lies, once that is rolled back."""
    return int(shift > 0 and (position - shift) % length >= length - shift)


def reference_attention(layer: SwinAttention, x: torch.Tensor) -> torch.Tensor:
    """Attend window by window, as the official code does: pad first, one logit for each pair of tokens."""
    size, window = x.shape[:3], [min(n, w) for n, w in zip(x.shape, layer.window, strict=False)]
    shift = [w // 2 if layer.shifted and n > w else 0 for n, w in zip(size, layer.window, strict=True)]
    padded = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
    full = x.new_zeros(*padded, x.shape[-1])
    full[: size[0], : size[1], : size[2]] = x
    queries, keys, values = layer.qkv(full).unflatten(-1, (3, layer.heads, -1)).unbind(3)
    out = torch.zeros_like(queries)
    whole = list(itertools.product(*(range(w) for w in layer.window)))
    for corner in itertools.product(*(range(0, n, w) for n, w in zip(padded, window, strict=True))):
        inside = itertools.product(*(range(w) for w in window))
        places = [
            tuple((c + d + s) % n for c, d, s, n in zip(corner, offset, shift, padded, strict=True))
            for offset in inside
        ]
        index = tuple(torch.tensor(axis) for axis in zip(*places, strict=True))
        logits = torch.einsum("qhc,khc->hqk", queries[index], keys[index]) / queries.shape[-1] ** 0.5
        sides = [[side(*at) for at in zip(place, padded, window, shift, strict=True)] for place in places]
        for q, k in itertools.product(range(len(places)), repeat=2):
            steps = [a - b + w - 1 for a, b, w in zip(whole[q], whole[k], layer.window, strict=True)]
            number = (steps[0] * (2 * layer.window[1] - 1) + steps[1]) * (2 * layer.window[2] - 1) + steps[2]
            logits[:, q, k] += layer.relative_position_bias_table[number] - 100.0 * (sides[q] != sides[k])
        out[index] = torch.einsum("hqk,khc->qhc", logits.softmax(dim=-1), values[index])
    return layer.proj(out.flatten(-2))[: size[0], : size[1], : size[2]]


@pytest.mark.parametrize("size", [(4, 6, 6), (5, 7, 4), (1, 2, 2), (2, 3, 9)])
@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_attention_of_any_grid_is_that_of_every_pair_of_tokens(size, shifted):
    """Whole windows, padded ones, a grid smaller than a window; and images of a batch do not see each other."""
    torch.manual_seed(0)
    layer = SwinAttention(6, 2, (2, 3, 3), shifted).double()
    layer.relative_position_bias_table.normal_()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([reference_attention(layer, image) for image in x]))


def test_every_second_layer_is_shifted():
    stage = SwinStage(4, 2, (3, 3, 3), 4, recompute=False)
    assert [layer.attn.shifted for layer in stage.blocks] == [False, True, False, True]


def test_tables_that_follow_from_the_window_are_not_weights():
    names = list(SwinAttention(4, 2, (2, 2, 2), shifted=True).state_dict())
    assert names == ["relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert math.prod(SwinAttention(4, 2, (2, 3, 4), False).relative_position_bias_table.shape) == 3 * 5 * 7 * 2

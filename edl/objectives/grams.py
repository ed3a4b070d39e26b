"""What objectives read of the experts' answers: the inner products of each token's rows."""

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Sums
from edl.objectives.tokens import are_ignored, mean_over_tokens, stacked


def counted_grams(op: str, name: str, layers: Layers, segments: Segments) -> Tensor:
    """The Gram matrices [L, T, K, K] in float32 or float64; zeros of tokens that do not count, which may hold NaN.

    Args:
        op (str): in whose name it refuses.
        name (str): of the field that holds them.
        layers (Layers): L of one size.
        segments (Segments): that say which tokens count.

    Raises:
        ValueError: no square matrices of floating type, one for each token.
    """
    num_tokens, grams = segments.segment_ids.shape[0], stacked(layers, name)
    if grams.shape[1] != num_tokens or grams.shape[2] != grams.shape[3] or not grams.is_floating_point():
        raise ValueError(
            f"edl::{op}: {name} must be floating and have the shape [T, K, K] of the {num_tokens} tokens (got "
            f"{list(grams.shape[1:])} {grams.dtype})"
        )
    wide = grams if grams.dtype == torch.float64 else grams.float()
    return wide.masked_fill(are_ignored(layers, segments).view(-1, 1, 1), 0.0)


def mean_of_pairs(name: str, values: Tensor, has_pairs: bool, layers: Layers, segments: Segments) -> Sums:
    """The two sums of a mean over the tokens that count; where no token can have a pair of experts, none does.

    Args:
        name (str): of what is averaged.
        values (Tensor[L, T]): of each token.
        has_pairs (bool): whether tokens choose two experts or more.
        layers (Layers): L of one size.
        segments (Segments): that say which tokens count.
    """
    sums = mean_over_tokens(name, values, layers, segments)
    return sums if has_pairs else {name: sums[name], "tokens": torch.zeros_like(sums["tokens"])}

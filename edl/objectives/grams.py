"""What objectives read of the experts' answers: the inner products of each token's rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Sums
from edl.objectives.tokens import mean_over_tokens


def counted_grams(op: str, name: str, grams: Sequence[Tensor], segments: Segments) -> Tensor:
    """The Gram matrices [L, T, K, K] in float32 or float64; zeros of tokens that do not count, which may hold NaN.

    Args:
        op (str): in whose name it refuses.
        name (str): of the field that holds them.
        grams (sequence of Tensor[T, K, K]): of L layers.
        segments (Segments): of which a token of id 0 counts.

    Raises:
        ValueError: no square matrices of floating type, one for each token.
    """
    num_tokens = segments.segment_ids.shape[0]
    for gram in grams:
        if gram.shape[0] != num_tokens or gram.shape[1] != gram.shape[2] or not gram.is_floating_point():
            raise ValueError(
                f"edl::{op}: {name} must be floating and have the shape [T, K, K] of the {num_tokens} tokens (got "
                f"{list(gram.shape)} {gram.dtype})"
            )
    stacked = torch.stack(list(grams))
    wide = stacked if stacked.dtype == torch.float64 else stacked.float()
    return wide.where((segments.segment_ids == 0).view(-1, 1, 1), 0.0)


def mean_of_pairs(name: str, values: Tensor, has_pairs: bool, segments: Segments) -> Sums:
    """The two sums of a mean over the tokens that count; where no token can have a pair of experts, none does.

    Args:
        name (str): of what is averaged.
        values (Tensor[L, T]): 0 of tokens that do not count.
        has_pairs (bool): whether tokens choose two experts or more.
        segments (Segments): of the tokens.
    """
    sums = mean_over_tokens(name, values.sum(1).unbind(), segments.segment_ids)
    return sums if has_pairs else {name: sums[name], "tokens": torch.zeros_like(sums["tokens"])}

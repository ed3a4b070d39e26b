"""Samples of sort_by_expert(experts, num_experts)."""

import torch

from samples.tables import Inputs, Refusal, Sample


def choices_of(inputs: Inputs, num_tokens, num_experts, top_k, sentinels=0.0, empty=0, ids=torch.int64):
    """Different experts per token, none of the first `empty`; each choice a sentinel with the probability
    `sentinels`."""
    order = inputs.normal(num_tokens, num_experts - empty).argsort(dim=-1)[:, :top_k] + empty
    absent = inputs.normal(num_tokens, top_k).sigmoid() < sentinels
    return order.masked_fill(absent, num_experts).to(ids)


def _sort_by_expert(case, num_tokens, num_experts, top_k, layout="dense", **options):
    def make(inputs: Inputs) -> tuple:
        experts = choices_of(inputs, num_tokens, num_experts, top_k, **options)
        return experts.t().contiguous().t() if layout == "transposed" else experts, num_experts

    return Sample("sort_by_expert", case, make)


SAMPLES = [
    _sort_by_expert("small", 7, 5, 2),
    _sort_by_expert("sentinels", 11, 5, 3, sentinels=0.3),
    _sort_by_expert("int32", 50, 8, 4, ids=torch.int32),
    _sort_by_expert("no-token", 0, 6, 2),
    _sort_by_expert("no-token-int32", 0, 6, 2, ids=torch.int32),
    _sort_by_expert("one-expert", 9, 1, 1),
    _sort_by_expert("only-sentinels", 9, 4, 2, sentinels=1.0),
    _sort_by_expert("empty-experts", 40, 9, 2, empty=6),
    _sort_by_expert("many-experts", 33, 2048, 8),
    _sort_by_expert("several-chunks", 9000, 16, 4, sentinels=0.1),
    _sort_by_expert("transposed", 30, 6, 3, layout="transposed"),
]

REFUSALS = [
    Refusal(
        *("sort_by_expert", "rank", lambda inputs: (inputs.ids(8, low=0, high=4), 4)),
        "edl::sort_by_expert: experts must have the shape [T, K] (got 1 dimensions)",
    ),
    Refusal(
        *("sort_by_expert", "dtype", lambda inputs: (inputs.normal(8, 2), 4)),
        "edl::sort_by_expert: experts must be int32 or int64 (got Double)",
    ),
    Refusal(
        *("sort_by_expert", "no-expert", lambda inputs: (inputs.ids(8, 2, low=0, high=4), 0)),
        "edl::sort_by_expert: num_experts must be at least 1 and below 2^31 - 1 (got 0)",
    ),
    Refusal(
        *("sort_by_expert", "slots", lambda inputs: (inputs.ids(1, 1, low=0, high=4).expand(2**30, 2), 4)),
        "edl::sort_by_expert: experts must have fewer than 2^31 entries (got 2147483648)",
    ),
    Refusal(
        *("sort_by_expert", "high", lambda inputs: (inputs.ids(8, 2, low=5, high=6), 4)),
        "edl::sort_by_expert: experts must be at least 0 and at most 4, the number of experts, which means no expert "
        "(got 5 at slot 0)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("sort_by_expert", "negative", lambda inputs: (inputs.ids(8, 2, low=-1, high=0), 4)),
        "edl::sort_by_expert: experts must be at least 0 and at most 4, the number of experts, which means no expert "
        "(got -1 at slot 0)",
        error=IndexError,
        by_value=True,
    ),
]

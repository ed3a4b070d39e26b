"""Samples of domain_moments(segment_sums, segment_counts, labels, num_domains, squares)."""

import torch

from samples.tables import Inputs, Refusal, Sample, turn


def _segments_of(
    num_segments,
    num_experts,
    num_domains,
    layers=(),
    counts="shared",
    labels=torch.int64,
    squares=True,
    dtype=torch.float64,
    turned=False,
):
    def make(inputs: Inputs) -> tuple:
        shape = (num_segments,) if counts == "shared" else (*layers, num_segments)
        tokens = inputs.ids(*shape, low=0, high=6).to(dtype)  # some segments have none
        sums = inputs.distributions(*layers, num_segments, num_experts) * tokens.unsqueeze(-1)
        if labels.is_floating_point:
            weights = inputs.distributions(num_segments, num_domains, dtype=labels)
        else:
            weights = inputs.ids(num_segments, low=-1, high=num_domains, dtype=labels)
        sums = sums.to(dtype)
        return turn(sums) if turned else sums, tokens, weights, num_domains, squares

    return make


def _domain_moments(case, *shape, **options):
    return Sample("domain_moments", case, _segments_of(*shape, **options), differentiable=(0,), length=shape[0] + 1)


SAMPLES = [
    _domain_moments("ids", 9, 5, 3),
    _domain_moments("without-squares", 9, 5, 3, squares=False),
    _domain_moments("soft", 9, 5, 3, labels=torch.float64),
    _domain_moments("soft-fp32", 9, 5, 3, labels=torch.float32, dtype=torch.float32),
    _domain_moments("layers", 6, 8, 3, layers=(4,)),
    _domain_moments("layers-own-counts", 6, 8, 3, layers=(2, 2), counts="own"),
    _domain_moments("fp32-int32", 70, 33, 5, labels=torch.int32, dtype=torch.float32),
    _domain_moments("no-segment", 0, 4, 2),
    _domain_moments("many-domains", 120, 16, 1000, dtype=torch.float32),
    _domain_moments("one-segment", 1, 5, 2),
    _domain_moments("one-domain", 9, 5, 1),
    _domain_moments("no-segment-int32", 0, 4, 2, labels=torch.int32),
    _domain_moments("soft-bf16", 12, 7, 3, labels=torch.bfloat16, dtype=torch.float32),
    _domain_moments("turned", 9, 5, 3, layers=(2,), turned=True),
    _domain_moments("large", 300, 130, 49, layers=(3,), counts="own", dtype=torch.float32),
]

REFUSALS = [
    Refusal(
        *(
            "domain_moments",
            "labels-length",
            lambda inputs: (*_segments_of(9, 5, 3)(inputs)[:2], inputs.ids(8, low=0, high=3), 3, True),
        ),
        "edl::domain_moments: labels must have one row per segment (got 8 for 9 segments)",
    ),
    Refusal(
        *("domain_moments", "no-domain", lambda inputs: (*_segments_of(9, 5, 3)(inputs)[:3], 0, True)),
        "edl::domain_moments: num_domains must be at least 1 (got 0)",
    ),
    Refusal(
        *(
            "domain_moments",
            "label",
            lambda inputs: (*_segments_of(9, 5, 3)(inputs)[:2], inputs.ids(9, low=3, high=4), 3, True),
        ),
        "edl::domain_moments: labels must be at least -1 and below num_domains = 3 (got 3 for segment 0)",
        error=IndexError,
        by_value=True,
    ),
]

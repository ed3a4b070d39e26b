"""Samples of pairwise_divergence(sums, squares, counts, bias_correction)."""

from samples.expert_divergence import moments_of
from samples.tables import Refusal, Sample


def _pairwise_divergence(case, *shape, bias_correction=False, **options):
    return Sample(
        "pairwise_divergence",
        case,
        lambda inputs: (*moments_of(inputs, *shape, **options), bias_correction),
        length=shape[1],
    )


SAMPLES = [
    _pairwise_divergence("plain", 3, 5),
    _pairwise_divergence("corrected", 5, 8, layers=(2,), bias_correction=True),
    _pairwise_divergence("absent", 4, 33, absent=2),
    _pairwise_divergence("one-domain", 1, 5),
    _pairwise_divergence("turned", 4, 8, layers=(2,), turned=True, bias_correction=True),
]

REFUSALS = [
    Refusal(
        *(
            "pairwise_divergence",
            "rank",
            lambda inputs: (inputs.distributions(5), inputs.normal(0), inputs.normal(5), False),
        ),
        "edl::pairwise_divergence: sums must have the shape [..., D, E] (got 1 dimensions)",
    ),
]

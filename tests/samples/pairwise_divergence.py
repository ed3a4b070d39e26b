"""Samples of pairwise_divergence(sums, counts, squares)."""

from samples.expert_divergence import moments_of
from samples.tables import Inputs, Refusal, Sample


def _pairwise_divergence(case, *shape, with_squares=False, **options):
    def make(inputs: Inputs) -> tuple:
        sums, counts, squares = moments_of(inputs, *shape, **options)
        return sums, counts, squares if with_squares else None

    return Sample("pairwise_divergence", case, make, length=shape[1])


SAMPLES = [
    _pairwise_divergence("plain", 3, 5),
    _pairwise_divergence("corrected", 5, 8, layers=(2,), with_squares=True),
    _pairwise_divergence("absent", 4, 33, absent=2),
    _pairwise_divergence("one-domain", 1, 5),
    _pairwise_divergence("turned", 4, 8, layers=(2,), turned=True, with_squares=True),
]

REFUSALS = [
    Refusal(
        *(
            "pairwise_divergence",
            "rank",
            lambda inputs: (inputs.distributions(5), inputs.normal(5), None),
        ),
        "edl::pairwise_divergence: sums must have the shape [..., D, E] (got 1 dimensions)",
    ),
]

"""Samples of expert_divergence(sums, counts, eps, reduction, squares)."""

import torch

from samples.tables import Inputs, Refusal, Sample, turn


def moments_of(inputs: Inputs, num_domains, num_experts, layers=(), absent=0, turned=False):
    """Sums, counts and squares of domains of 1 to 4 segments each, the first `absent` without any."""
    segments = inputs.distributions(*layers, num_domains, 4, num_experts)
    counts = inputs.ids(*layers, num_domains, low=1, high=5).double()
    counts[..., :absent] = 0
    used = (torch.arange(4, device=inputs.device) < counts.unsqueeze(-1)).unsqueeze(-1)
    sums, squares = (segments * used).sum(-2), (segments.square() * used).sum(-2)
    return (turn(sums), counts, turn(squares)) if turned else (sums, counts, squares)


def _expert_divergence(case, *shape, reduction="mean_of_logs", with_squares=False, eps=1e-6, **options):
    def make(inputs: Inputs) -> tuple:
        sums, counts, squares = moments_of(inputs, *shape, **options)
        return sums, counts, eps, reduction, squares if with_squares else None

    return Sample(
        "expert_divergence",
        case,
        make,
        differentiable=(0, 4) if with_squares else (0,),
        length=shape[0] ** 2 * shape[1],
        gradient_is_derivative=not with_squares,
    )


SAMPLES = [
    _expert_divergence("mean-of-logs", 3, 5),
    _expert_divergence("log-of-mean", 3, 5, reduction="log_of_mean"),
    _expert_divergence("corrected", 4, 7, with_squares=True),
    _expert_divergence("layers", 5, 16, layers=(3,)),
    _expert_divergence("layers-corrected", 5, 16, layers=(2, 2), with_squares=True),
    _expert_divergence("absent", 6, 9, absent=3),
    _expert_divergence("one-left", 4, 9, absent=3),
    _expert_divergence("one-domain", 1, 9),
    _expert_divergence("one-expert", 3, 1),
    _expert_divergence("large", 49, 128),
    _expert_divergence("many-experts", 3, 2048),
    _expert_divergence("eps-zero", 3, 5, eps=0.0),
    _expert_divergence("layers-log-of-mean", 4, 8, layers=(2,), reduction="log_of_mean"),
    _expert_divergence("turned", 4, 8, layers=(2,), turned=True),
    _expert_divergence("turned-corrected", 4, 8, layers=(2,), turned=True, with_squares=True),
    _expert_divergence("corrected-absent", 6, 9, absent=3, with_squares=True),
]

REFUSALS = [
    Refusal(
        *("expert_divergence", "eps", lambda inputs: (*moments_of(inputs, 3, 5)[:2], -1.0, "mean_of_logs", None)),
        "edl::expert_divergence: eps must be finite and not negative (got -1)",
    ),
    Refusal(
        *("expert_divergence", "reduction", lambda inputs: (*moments_of(inputs, 3, 5)[:2], 1e-6, "sum", None)),
        "edl::expert_divergence: reduction must be 'mean_of_logs' or 'log_of_mean' (got 'sum')",
    ),
    Refusal(
        *(
            "expert_divergence",
            "corrected-log-of-mean",
            lambda inputs: (*(moments := moments_of(inputs, 3, 5))[:2], 1e-6, "log_of_mean", moments[2]),
        ),
        "edl::expert_divergence: squares correct the bias of reduction = 'mean_of_logs' only (got 'log_of_mean')",
    ),
    Refusal(
        *(
            "expert_divergence",
            "dtype",
            lambda inputs: (*(x.float() for x in moments_of(inputs, 3, 5)[:2]), 1e-6, "mean_of_logs", None),
        ),
        "edl::expert_divergence: sums and counts must be float64 (got Float and Float)",
    ),
]

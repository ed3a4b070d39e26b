"""Samples of expert_mlp_with_gram(tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram,
recompute_activations)."""

import torch

from samples.expert_mlp import experts_at_work
from samples.tables import DTYPES, Inputs, Refusal, Sample


def _expert_mlp_with_gram(
    case,
    *shape,
    output_gram=True,
    activation_gram=True,
    recompute_activations=False,
    unweighted=False,
    **options,
):
    make_experts = experts_at_work(*shape, **options)

    def make(inputs: Inputs) -> tuple:
        arguments = make_experts(inputs)
        if unweighted:
            arguments[1].view(-1)[::4] = 0
        return *arguments, output_gram, activation_gram, recompute_activations

    return Sample(
        "expert_mlp_with_gram",
        case,
        make,
        differentiable=(0, 1, 4, 5),
        length=shape[0] + shape[1] + shape[2],
        roundings=5,  # pre-activation, activation, the expert's output, its gradient, the sum
    )


SAMPLES = [
    _expert_mlp_with_gram("small", 6, 3, 4, 5, 2),
    _expert_mlp_with_gram("recomputed", 6, 4, 3, 5, 3, sentinels=0.4, recompute_activations=True),
    _expert_mlp_with_gram("outputs", 6, 3, 4, 5, 3, activation_gram=False),
    _expert_mlp_with_gram("activations", 6, 3, 4, 5, 3, output_gram=False),
    _expert_mlp_with_gram("sentinels", 6, 4, 3, 5, 3, sentinels=0.4),
    _expert_mlp_with_gram("empty-experts", 5, 4, 3, 6, 2, empty=3),
    *(_expert_mlp_with_gram(name, 40, 33, 17, 6, 3, dtype=dtype, sentinels=0.1) for name, dtype in DTYPES.items()),
    _expert_mlp_with_gram("float32-weights-bf16", 40, 32, 24, 6, 3, dtype=torch.bfloat16, weights="float32"),
    _expert_mlp_with_gram("weights-of-0", 9, 5, 4, 4, 3, unweighted=True, dtype=torch.float32),
    _expert_mlp_with_gram("no-token", 0, 4, 3, 5, 2),
    _expert_mlp_with_gram("one-token", 1, 1, 1, 1, 1),
    _expert_mlp_with_gram("one-choice", 8, 5, 4, 3, 1),
    _expert_mlp_with_gram("only-sentinels", 5, 4, 3, 4, 2, sentinels=1.0),
    _expert_mlp_with_gram("no-intermediate", 5, 4, 0, 4, 2),
    _expert_mlp_with_gram("large", 200, 96, 560, 8, 6, dtype=torch.float32),
    _expert_mlp_with_gram("sliced", 20, 9, 7, 5, 2, layout="sliced", dtype=torch.float32),
]

REFUSALS = [
    Refusal(
        *("expert_mlp_with_gram", "neither", lambda inputs: (*experts_at_work(6, 3, 4, 5, 2)(inputs), False, False)),
        "edl::expert_mlp_with_gram: output_gram or activation_gram must be asked for, or expert_mlp is the operator "
        "(got neither)",
    ),
]

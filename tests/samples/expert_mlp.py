"""Samples of expert_mlp(tokens, weights, row_order, offsets, gate_up, down, recompute_activations)."""

from collections.abc import Callable

import torch
from torch import Tensor

from samples.dispatch_tokens import matrix_of, order_of, sorted_order
from samples.tables import DTYPES, Inputs, Refusal, Sample


def experts_at_work(
    num_tokens,
    hidden_size,
    intermediate_size,
    num_experts,
    top_k,
    dtype=torch.float64,
    weights="same",
    layout="dense",
    **options,
):
    def make(inputs: Inputs) -> tuple:
        row_order, offsets = sorted_order(inputs, num_tokens, num_experts, top_k, **options)
        tokens = matrix_of(inputs, num_tokens, hidden_size, dtype, layout)
        factors = inputs.normal(num_tokens, top_k, dtype=torch.float32 if weights == "float32" else dtype)
        # Of the size that initialised and trained layers have.
        gate_up = inputs.normal(
            num_experts, 2 * intermediate_size, hidden_size, dtype=dtype, scale=max(1, hidden_size) ** -0.5
        )
        down = inputs.normal(
            num_experts, hidden_size, intermediate_size, dtype=dtype, scale=max(1, intermediate_size) ** -0.5
        )
        if layout == "transposed":
            gate_up, down = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (gate_up, down))
        return tokens, factors, row_order, offsets, gate_up, down

    return make


def _expert_mlp(case, *shape, recompute_activations=False, **options):
    make = experts_at_work(*shape, **options)
    return Sample(
        "expert_mlp",
        case,
        lambda inputs: (*make(inputs), recompute_activations),
        differentiable=(0, 1, 4, 5),
        length=shape[0] + shape[1] + shape[2],
        roundings=4,  # pre-activation, activation, the expert's output, the sum
    )


SAMPLES = [
    _expert_mlp("small", 6, 3, 4, 5, 2),
    _expert_mlp("recomputed", 6, 4, 3, 5, 2, sentinels=0.4, recompute_activations=True),
    _expert_mlp("sentinels", 6, 4, 3, 5, 2, sentinels=0.4),
    _expert_mlp("empty-experts", 5, 4, 3, 6, 2, empty=3),
    *(_expert_mlp(name, 40, 33, 17, 6, 3, dtype=dtype, sentinels=0.1) for name, dtype in DTYPES.items()),
    _expert_mlp("float32-weights-bf16", 40, 32, 24, 6, 3, dtype=torch.bfloat16, weights="float32"),
    _expert_mlp("float32-weights-fp16", 40, 32, 24, 6, 3, dtype=torch.float16, weights="float32"),
    _expert_mlp("no-token", 0, 4, 3, 5, 2),
    _expert_mlp("one-token", 1, 1, 1, 1, 1),
    _expert_mlp("only-sentinels", 5, 4, 3, 4, 2, sentinels=1.0),
    _expert_mlp("no-intermediate", 5, 4, 0, 4, 2),
    _expert_mlp("all-experts", 9, 8, 8, 3, 3, dtype=torch.float32),
    _expert_mlp("large", 200, 96, 160, 8, 2, dtype=torch.float32),
    _expert_mlp("many-experts", 40, 16, 8, 300, 4, dtype=torch.float32),
    _expert_mlp("sliced", 20, 9, 7, 5, 2, layout="sliced", dtype=torch.float32),
    _expert_mlp("transposed", 20, 9, 7, 5, 2, layout="transposed", dtype=torch.float32),
]


def _replaced(position: int, replace: Callable[[Inputs, Tensor], Tensor]) -> Callable[[Inputs], tuple]:
    """Good arguments of expert_mlp, T = 6, H = 3, I = 4, E = 5, K = 2, with one of them replaced."""

    def make(inputs: Inputs) -> tuple:
        arguments = list(experts_at_work(6, 3, 4, 5, 2)(inputs))
        arguments[position] = replace(inputs, arguments[position])
        return tuple(arguments)

    return make


def _expert_mlp_refusal(case, position, replace, sentence, **more):
    return Refusal("expert_mlp", case, _replaced(position, replace), f"edl::expert_mlp: {sentence}", **more)


def _changed(index: int, value: int) -> Callable[[Inputs, Tensor], Tensor]:
    def change(inputs: Inputs, x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


REFUSALS = [
    _expert_mlp_refusal("rank", 0, lambda _, x: x[0], "tokens must have the shape [T, H] (got 1 dimensions)"),
    _expert_mlp_refusal(
        "dtype", 0, lambda _, x: x.long(), "tokens must be float32, float64, bfloat16 or float16 (got Long)"
    ),
    _expert_mlp_refusal(
        *("weights-dtype", 1, lambda _, x: x.bfloat16()),
        "weights must have the type of tokens, or be float32 beside 16-bit tokens (got BFloat16 beside Double)",
    ),
    Refusal(
        *("expert_mlp", "slots"),
        lambda inputs: (
            *(inputs.normal(1, 3).expand(2**30, 3), inputs.normal(1, 2).expand(2**30, 2)),
            *(
                order_of(inputs, 0).expand(2**31),
                order_of(inputs, 0, 0),
                inputs.normal(1, 8, 3),
                inputs.normal(1, 3, 4),
            ),
        ),
        "edl::expert_mlp: weights must have fewer than 2^31 entries (got 2147483648)",
    ),
    _expert_mlp_refusal("weights-rank", 1, lambda _, x: x[0], "weights must have the shape [T, K] (got 1 dimensions)"),
    _expert_mlp_refusal(
        "weights-rows", 1, lambda _, x: x[1:], "weights must have one row per token (got 5 for 6 tokens)"
    ),
    _expert_mlp_refusal("no-choice", 1, lambda _, x: x[:, :0], "weights must have at least one column (got 0)"),
    _expert_mlp_refusal(
        "order-length", 2, lambda _, x: x[1:], "row_order must have one entry per weight (got 11 for 12 weights)"
    ),
    _expert_mlp_refusal(
        *("order-dtype", 2, lambda _, x: x.long()),
        "row_order must be an int32 vector, as sort_by_expert gives it (got 1 dimensions of Long)",
    ),
    _expert_mlp_refusal(
        *("offsets-dtype", 3, lambda _, x: x.long()),
        "offsets must be an int32 vector, as sort_by_expert gives it (got 1 dimensions of Long)",
    ),
    _expert_mlp_refusal(
        *("offsets-length", 3, lambda _, x: x[1:]),
        "offsets must have one entry more than there are experts (got 5 for 5 experts)",
    ),
    _expert_mlp_refusal(
        "gate_up-rank", 4, lambda _, x: x[0], "gate_up must have the shape [E, 2I, H] (got 2 dimensions)"
    ),
    _expert_mlp_refusal(
        *("gate_up-dtype", 4, lambda _, x: x.float()), "gate_up must have the type of tokens (got Float beside Double)"
    ),
    _expert_mlp_refusal(
        *("gate_up-columns", 4, lambda _, x: x[:, :, 1:]),
        "gate_up must have one column per entry of a token (got 2 for tokens of 3)",
    ),
    _expert_mlp_refusal(
        *("gate_up-rows", 4, lambda _, x: x[:, 1:]),
        "gate_up must have twice as many rows as down has columns (got 7 and 4)",
    ),
    _expert_mlp_refusal("down-rank", 5, lambda _, x: x[0], "down must have the shape [E, H, I] (got 2 dimensions)"),
    _expert_mlp_refusal(
        "down-dtype", 5, lambda _, x: x.half(), "down must have the type of tokens (got Half beside Double)"
    ),
    _expert_mlp_refusal(
        "down-experts", 5, lambda _, x: x[1:], "down must have as many experts as gate_up (got 4 and 5)"
    ),
    _expert_mlp_refusal(
        *("down-rows", 5, lambda _, x: x[:, 1:]), "down must have one row per entry of a token (got 2 for tokens of 3)"
    ),
    _expert_mlp_refusal(
        *("offsets-start", 3, _changed(0, 1)),
        "offsets must rise from 0 to at most 12, the number of rows (got 1 at position 0)",
        error=IndexError,
        by_value=True,
    ),
    _expert_mlp_refusal(
        *("offsets-fall", 3, _changed(2, -1)),
        "offsets must rise from 0 to at most 12, the number of rows (got -1 at position 2)",
        error=IndexError,
        by_value=True,
    ),
    _expert_mlp_refusal(
        *("offsets-end", 3, _changed(5, 13)),
        "offsets must rise from 0 to at most 12, the number of rows (got 13 at position 5)",
        error=IndexError,
        by_value=True,
    ),
    _expert_mlp_refusal(
        *("order", 2, _changed(3, 12)),
        "row_order must name each of the 12 slots once (got 12 at row 3)",
        error=IndexError,
        by_value=True,
    ),
]

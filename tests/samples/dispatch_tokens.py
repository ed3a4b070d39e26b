"""Samples of dispatch_tokens(tokens, row_order, top_k)."""

import torch
from torch import Tensor

from edl import reference
from samples.sort_by_expert import choices_of
from samples.tables import DTYPES, Inputs, Refusal, Sample


def sorted_order(inputs: Inputs, num_tokens, num_experts, top_k, **options) -> tuple[Tensor, Tensor]:
    experts = choices_of(inputs, num_tokens, num_experts, top_k, **options)
    row_order, offsets = reference.sort_by_expert(experts.cpu(), num_experts)
    return inputs.on_device(row_order), inputs.on_device(offsets)


def matrix_of(inputs: Inputs, num_rows, width, dtype, layout) -> Tensor:
    if layout == "transposed":
        return inputs.normal(width, num_rows, dtype=dtype).t()
    if layout == "sliced":
        return inputs.normal(num_rows, 3 * width, dtype=dtype)[:, width : 2 * width]
    return inputs.normal(num_rows, width, dtype=dtype)


def _dispatch_tokens(case, num_tokens, width, top_k, dtype=torch.float64, layout="dense"):
    def make(inputs: Inputs) -> tuple:
        row_order, _ = sorted_order(inputs, num_tokens, 6, top_k)
        return matrix_of(inputs, num_tokens, width, dtype, layout), row_order, top_k

    return Sample("dispatch_tokens", case, make, differentiable=(0,), length=top_k)


SAMPLES = [
    _dispatch_tokens("small", 7, 5, 2),
    *(_dispatch_tokens(name, 40, 37, 3, dtype=dtype) for name, dtype in DTYPES.items()),
    _dispatch_tokens("no-token", 0, 5, 2),
    _dispatch_tokens("one-token", 1, 1, 1),
    _dispatch_tokens("no-width", 3, 0, 2),
    _dispatch_tokens("large", 300, 400, 4, dtype=torch.float32),
    _dispatch_tokens("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _dispatch_tokens("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
]


def order_of(inputs: Inputs, *slots: int) -> Tensor:
    return inputs.on_device(torch.tensor(slots, dtype=torch.int32))


REFUSALS = [
    Refusal(
        *("dispatch_tokens", "rank", lambda inputs: (inputs.normal(4), order_of(inputs, 0, 1, 2, 3), 1)),
        "edl::dispatch_tokens: tokens must have the shape [T, H] (got 1 dimensions)",
    ),
    Refusal(
        *(
            "dispatch_tokens",
            "dtype",
            lambda inputs: (inputs.ids(2, 3, low=0, high=2), order_of(inputs, 0, 1, 2, 3), 2),
        ),
        "edl::dispatch_tokens: tokens must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("dispatch_tokens", "order-dtype", lambda inputs: (inputs.normal(2, 3), inputs.ids(4, low=0, high=4), 2)),
        "edl::dispatch_tokens: row_order must be an int32 vector, as sort_by_expert gives it (got 1 dimensions of "
        "Long)",
    ),
    Refusal(
        *("dispatch_tokens", "top_k", lambda inputs: (inputs.normal(2, 3), order_of(inputs), 0)),
        "edl::dispatch_tokens: top_k must be at least 1 (got 0)",
    ),
    Refusal(
        *("dispatch_tokens", "length", lambda inputs: (inputs.normal(2, 3), order_of(inputs, 0, 1, 2), 2)),
        "edl::dispatch_tokens: row_order must have top_k entries per token (got 3 for 2 tokens and top_k 2)",
    ),
    Refusal(
        *("dispatch_tokens", "slot", lambda inputs: (inputs.normal(2, 3), order_of(inputs, 0, 4, 2, 3), 2)),
        "edl::dispatch_tokens: row_order must name each of the 4 slots once (got 4 at row 1)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("dispatch_tokens", "negative", lambda inputs: (inputs.normal(2, 3), order_of(inputs, -1, 1, 2, 3), 2)),
        "edl::dispatch_tokens: row_order must name each of the 4 slots once (got -1 at row 0)",
        error=IndexError,
        by_value=True,
    ),
]

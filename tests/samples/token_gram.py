"""Samples of token_gram(rows, weights, row_order, top_k)."""

import torch

from samples.dispatch_tokens import matrix_of, order_of, sorted_order
from samples.tables import DTYPES, Inputs, Refusal, Sample


def _token_gram(case, num_tokens, width, top_k, weights="same", dtype=torch.float64, layout="dense"):
    def make(inputs: Inputs) -> tuple:
        row_order, _ = sorted_order(inputs, num_tokens, 6, top_k)
        rows = matrix_of(inputs, num_tokens * top_k, width, dtype, layout)
        if weights == "none":
            return rows, None, row_order, top_k
        factors = inputs.normal(num_tokens, top_k, dtype=dtype if weights == "same" else torch.float32)
        factors.view(-1)[::4] = 0
        return rows, factors, row_order, top_k

    return Sample("token_gram", case, make, differentiable=(0,), length=max(top_k, width))


SAMPLES = [
    _token_gram("small", 7, 5, 3),
    _token_gram("without-weights", 7, 5, 2, weights="none"),
    *(_token_gram(name, 40, 37, 3, dtype=dtype) for name, dtype in DTYPES.items()),
    _token_gram("float32-weights-bf16", 40, 70, 3, weights="float32", dtype=torch.bfloat16),
    _token_gram("float32-weights-fp16", 40, 70, 3, weights="float32", dtype=torch.float16),
    _token_gram("no-token", 0, 5, 2),
    _token_gram("one-token", 1, 1, 1),
    _token_gram("one-choice", 9, 20, 1, weights="none"),
    _token_gram("no-width", 3, 0, 2),
    _token_gram("large", 300, 1100, 6, dtype=torch.float32, weights="none"),
    _token_gram("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _token_gram("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
]

REFUSALS = [
    Refusal(
        *("token_gram", "rank", lambda inputs: (inputs.normal(4), None, order_of(inputs, 0, 1, 2, 3), 1)),
        "edl::token_gram: rows must have the shape [N, H] (got 1 dimensions)",
    ),
    Refusal(
        *("token_gram", "order-dtype", lambda inputs: (inputs.normal(2, 3), None, inputs.ids(2, low=0, high=1), 1)),
        "edl::token_gram: row_order must be an int32 vector, as sort_by_expert gives it (got 1 dimensions of Long)",
    ),
    Refusal(
        *("token_gram", "top_k", lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 2, 3), 3)),
        "edl::token_gram: rows must be top_k per token (got 4 rows and top_k 3)",
    ),
    Refusal(
        *(
            "token_gram",
            "weights",
            lambda inputs: (inputs.normal(2, 3), inputs.normal(2, 2), order_of(inputs, 0, 1), 1),
        ),
        "edl::token_gram: weights must have top_k columns (got 2 and top_k 1)",
    ),
    Refusal(
        *("token_gram", "order", lambda inputs: (inputs.normal(2, 3), None, order_of(inputs, 0, 0), 1)),
        "edl::token_gram: row_order must name each of the 2 slots once (got 0 at row 1)",
        error=IndexError,
        by_value=True,
    ),
]

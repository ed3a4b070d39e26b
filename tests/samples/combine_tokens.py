"""Samples of combine_tokens(rows, weights, row_order, top_k)."""

import torch

from samples.dispatch_tokens import matrix_of, order_of, sorted_order
from samples.tables import DTYPES, Inputs, Refusal, Sample


def _combine_tokens(case, num_tokens, width, top_k, weights="same", dtype=torch.float64, layout="dense", sentinels=0.0):
    def make(inputs: Inputs) -> tuple:
        row_order, offsets = sorted_order(inputs, num_tokens, 6, top_k, sentinels=sentinels)
        rows = matrix_of(inputs, num_tokens * top_k, width, dtype, layout)
        if weights == "none":
            return rows, None, row_order, top_k
        factors = inputs.normal(num_tokens, top_k, dtype=dtype if weights == "same" else torch.float32)
        if sentinels:
            factors.view(-1)[row_order[offsets[-1] :].long()] = 0
        return rows, factors, row_order, top_k

    return Sample(
        "combine_tokens", case, make, differentiable=(0,) if weights == "none" else (0, 1), length=max(top_k, width)
    )


SAMPLES = [
    _combine_tokens("weighted", 7, 5, 2),
    _combine_tokens("plain", 7, 5, 2, weights="none"),
    _combine_tokens("sentinels", 7, 5, 3, sentinels=0.4),
    *(_combine_tokens(name, 40, 37, 3, dtype=dtype) for name, dtype in DTYPES.items()),
    *(_combine_tokens(f"plain-{name}", 40, 37, 3, weights="none", dtype=dtype) for name, dtype in DTYPES.items()),
    _combine_tokens("float32-weights-bf16", 40, 70, 3, weights="float32", dtype=torch.bfloat16),
    _combine_tokens("float32-weights-fp16", 40, 70, 3, weights="float32", dtype=torch.float16),
    _combine_tokens("no-token", 0, 5, 2),
    _combine_tokens("one-token", 1, 1, 1),
    _combine_tokens("no-width", 3, 0, 2),
    _combine_tokens("large", 300, 400, 4, dtype=torch.float32),
    _combine_tokens("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _combine_tokens("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
]

REFUSALS = [
    Refusal(
        *("combine_tokens", "rank", lambda inputs: (inputs.normal(4), None, order_of(inputs, 0, 1, 2, 3), 1)),
        "edl::combine_tokens: rows must have the shape [N, H] (got 1 dimensions)",
    ),
    Refusal(
        *(
            "combine_tokens",
            "dtype",
            lambda inputs: (inputs.ids(4, 3, low=0, high=2), None, order_of(inputs, 0, 1, 2, 3), 2),
        ),
        "edl::combine_tokens: rows must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *(
            "combine_tokens",
            "order-rank",
            lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 2, 3).view(2, 2), 2),
        ),
        "edl::combine_tokens: row_order must be an int32 vector, as sort_by_expert gives it (got 2 dimensions of Int)",
    ),
    Refusal(
        *("combine_tokens", "order-length", lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 2), 2)),
        "edl::combine_tokens: row_order must have one entry per row (got 3 for 4 rows)",
    ),
    Refusal(
        *("combine_tokens", "top_k", lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 2, 3), 0)),
        "edl::combine_tokens: top_k must be at least 1 (got 0)",
    ),
    Refusal(
        *("combine_tokens", "remainder", lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 2, 3), 3)),
        "edl::combine_tokens: rows must be top_k per token (got 4 rows and top_k 3)",
    ),
    Refusal(
        *("combine_tokens", "weights-dtype"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(2, 2, dtype=torch.float32), order_of(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have the type of rows, or be float32 beside 16-bit rows (got Float beside "
        "Double)",
    ),
    Refusal(
        *("combine_tokens", "weights-columns"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(4, 1), order_of(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have top_k columns (got 1 and top_k 2)",
    ),
    Refusal(
        *("combine_tokens", "weights-rows"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(3, 2), order_of(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have one entry per row (got 3 by 2 for 4 rows)",
    ),
    Refusal(
        *("combine_tokens", "twice", lambda inputs: (inputs.normal(4, 3), None, order_of(inputs, 0, 1, 1, 3), 2)),
        "edl::combine_tokens: row_order must name each of the 4 slots once (got 1 at row 2)",
        error=IndexError,
        by_value=True,
    ),
]

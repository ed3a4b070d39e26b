"""Samples of aggregate_routing(routing, segment_ids, num_segments, scores)."""

import torch

from edl.ops import checks
from samples.tables import DTYPES, Inputs, Refusal, Sample


def _routing_of(
    num_tokens, num_experts, num_segments, scores="softmax", dtype=torch.float64, layout="dense", ids=torch.int64
):
    def make(inputs: Inputs) -> tuple:
        wide = 3 * num_experts if layout == "sliced" else num_experts
        shape = (wide, num_tokens) if layout == "transposed" else (num_tokens, wide)
        routing = inputs.logits(*shape, dtype=dtype)
        routing = routing.t() if layout == "transposed" else routing[:, :num_experts]
        if scores == "none":
            routing = routing.double().softmax(dim=-1).to(dtype)
        segment_ids = inputs.ids(num_tokens, low=-1, high=num_segments, dtype=ids)
        if layout == "runs":
            segment_ids = segment_ids.sort().values
        return routing, segment_ids, num_segments, scores

    return make


def _aggregate_routing(case, *shape, **options):
    return Sample(
        "aggregate_routing", case, _routing_of(*shape, **options), differentiable=(0,), length=shape[0] + shape[1]
    )


SAMPLES = [
    _aggregate_routing("softmax", 7, 5, 3),
    _aggregate_routing("sigmoid", 7, 5, 3, scores="sigmoid"),
    _aggregate_routing("none", 7, 5, 3, scores="none"),
    *(
        _aggregate_routing(f"{scores}-{name}", 300, 24, 11, scores=scores, dtype=dtype)
        for scores in [*checks.router_scores(), "none"]
        for name, dtype in DTYPES.items()
    ),
    _aggregate_routing("no-token", 0, 6, 3),
    _aggregate_routing("no-token-int32", 0, 6, 3, ids=torch.int32),
    _aggregate_routing("no-segment", 4, 6, 0),
    _aggregate_routing("one-expert", 9, 1, 2),
    _aggregate_routing("many-experts", 33, 2048, 4, dtype=torch.float32),
    _aggregate_routing("runs", 2100, 64, 5, dtype=torch.float32, layout="runs"),
    _aggregate_routing("int32-ids", 50, 8, 4, ids=torch.int32),
    _aggregate_routing("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _aggregate_routing("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
    _aggregate_routing("one-token", 1, 6, 3),
    _aggregate_routing("no-token-int32", 0, 6, 3, ids=torch.int32),
    _aggregate_routing("many-segments", 40, 6, 500, dtype=torch.float32),
    _aggregate_routing("large-runs", 20000, 48, 9, dtype=torch.float32, layout="runs"),
    _aggregate_routing("large-shuffled", 9001, 65, 9, scores="sigmoid", dtype=torch.bfloat16),
]

REFUSALS = [
    Refusal(
        *(
            "aggregate_routing",
            "length",
            lambda inputs: (inputs.logits(8, 4), inputs.ids(7, low=0, high=2), 2, "softmax"),
        ),
        "edl::aggregate_routing: segment_ids must have one entry per row of routing (got 7 ids for 8 rows)",
    ),
    Refusal(
        *("aggregate_routing", "rank", lambda inputs: (inputs.logits(8), inputs.ids(8, low=0, high=2), 2, "softmax")),
        "edl::aggregate_routing: routing must have the shape [T, E] (got 1 dimensions)",
    ),
    Refusal(
        *("aggregate_routing", "scores", lambda inputs: (inputs.logits(8, 4), inputs.ids(8, low=0, high=2), 2, "tanh")),
        "edl::aggregate_routing: scores must be 'softmax', 'sigmoid' or 'none' (got 'tanh')",
    ),
    Refusal(
        *(
            "aggregate_routing",
            "dtype",
            lambda inputs: (inputs.ids(8, 4, low=0, high=2), inputs.ids(8, low=0, high=2), 2, "none"),
        ),
        "edl::aggregate_routing: routing must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("aggregate_routing", "id", lambda inputs: (inputs.logits(8, 4), inputs.ids(8, low=2, high=3), 2, "softmax")),
        "edl::aggregate_routing: segment_ids must be at least -1 and below 2, the number of segments (got 2 at row 0",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *(
            "aggregate_routing",
            "probabilities",
            lambda inputs: (inputs.distributions(8, 4), inputs.ids(8, low=0, high=2), 2, "softmax"),
        ),
        "edl::aggregate_routing: with scores = 'softmax' or 'sigmoid' routing must be logits",
        by_value=True,
    ),
]

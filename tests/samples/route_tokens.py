"""Samples of route_tokens(logits, top_k, scores, bias, normalize, scale)."""

import torch

from samples.tables import DTYPES, Inputs, Refusal, Sample


def _logits_of(
    num_tokens,
    num_experts,
    top_k,
    scores="softmax",
    bias=False,
    normalize=True,
    scale=1.0,
    dtype=torch.float64,
    layout="dense",
):
    def make(inputs: Inputs) -> tuple:
        if layout == "transposed":
            logits = inputs.logits(num_experts, num_tokens, dtype=dtype).t()
        elif layout == "sliced":
            logits = inputs.logits(num_tokens, 2 * num_experts, dtype=dtype)[:, num_experts:]
        else:
            logits = inputs.logits(num_tokens, num_experts, dtype=dtype)
        if layout == "ties":
            logits = logits.round()
        wide = dtype if dtype == torch.float64 else torch.float32
        shift = inputs.normal(num_experts, dtype=wide, scale=0.1) if bias else None
        return logits, top_k, scores, shift, normalize, scale

    return make


def _route_tokens(case, *shape, **options):
    return Sample("route_tokens", case, _logits_of(*shape, **options), differentiable=(0,), length=shape[1])


SAMPLES = [
    _route_tokens("softmax", 7, 5, 2),
    _route_tokens("sigmoid", 7, 5, 2, scores="sigmoid", bias=True, scale=2.5),
    _route_tokens("softmax-plain", 7, 5, 3, normalize=False),
    _route_tokens("softmax-bias", 7, 5, 3, bias=True),
    _route_tokens("softmax-plain-bias", 7, 5, 3, bias=True, normalize=False, scale=0.5),
    _route_tokens("sigmoid-plain", 7, 5, 3, scores="sigmoid", normalize=False),
    *(
        _route_tokens(f"{scores}-{form}-{name}", 90, 24, 4, scores=scores, bias=bias, normalize=normalize, dtype=dtype)
        for scores in ("softmax", "sigmoid")
        for form, bias, normalize in (("normal", False, True), ("plain", False, False), ("bias", True, True))
        for name, dtype in DTYPES.items()
    ),
    _route_tokens("no-token", 0, 6, 2),
    _route_tokens("one-token", 1, 3, 1),
    _route_tokens("one-expert", 9, 1, 1),
    _route_tokens("all-experts", 9, 6, 6),
    _route_tokens("many-experts", 33, 2048, 8, dtype=torch.float32),
    _route_tokens("many-of-many", 5, 1100, 150, dtype=torch.float32, normalize=False),
    _route_tokens("large", 700, 128, 8, dtype=torch.float32),
    _route_tokens("ties", 200, 16, 4, dtype=torch.float32, layout="ties"),
    _route_tokens("ties-bf16", 200, 40, 6, dtype=torch.bfloat16, layout="ties", normalize=False),
    _route_tokens("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _route_tokens("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
]

REFUSALS = [
    Refusal(
        *("route_tokens", "rank", lambda inputs: (inputs.logits(8), 2, "softmax")),
        "edl::route_tokens: logits must have the shape [T, E] (got 1 dimensions)",
    ),
    Refusal(
        *("route_tokens", "dtype", lambda inputs: (inputs.ids(8, 4, low=0, high=2), 2, "softmax")),
        "edl::route_tokens: logits must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("route_tokens", "scores", lambda inputs: (inputs.logits(8, 4), 2, "none")),
        "edl::route_tokens: scores must be 'softmax' or 'sigmoid' (got 'none')",
    ),
    Refusal(
        *("route_tokens", "no-choice", lambda inputs: (inputs.logits(8, 4), 0, "softmax")),
        "edl::route_tokens: top_k must be at least 1 (got 0)",
    ),
    Refusal(
        *("route_tokens", "too-many", lambda inputs: (inputs.logits(8, 4), 5, "softmax")),
        "edl::route_tokens: top_k must not exceed the number of experts (got 5 of 4)",
    ),
    Refusal(
        *("route_tokens", "bias-rank", lambda inputs: (inputs.logits(8, 4), 2, "softmax", inputs.normal(4, 1))),
        "edl::route_tokens: bias must have the shape [E] (got 2 dimensions)",
    ),
    Refusal(
        *(
            "route_tokens",
            "bias-dtype",
            lambda inputs: (inputs.logits(8, 4), 2, "softmax", inputs.ids(4, low=0, high=2)),
        ),
        "edl::route_tokens: bias must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("route_tokens", "bias-length", lambda inputs: (inputs.logits(8, 4), 2, "softmax", inputs.normal(5))),
        "edl::route_tokens: bias must have one entry per expert (got 5 for 4 experts)",
    ),
]

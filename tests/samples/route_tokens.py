"""Samples of route_tokens(logits, top_k, scores, bias, normalize, scale, allowed, experts)."""

import torch

from samples.tables import DTYPES, Inputs, Refusal, Sample


def allowed_of(inputs: Inputs, num_tokens, num_experts, top_k, layout="dense"):
    """About half of the experts for each token, `top_k` at least."""
    wanted = inputs.normal(1 if layout == "expanded" else num_tokens, num_experts)
    allowed = (wanted > 0) | (wanted >= wanted.topk(top_k).values[:, -1:])
    if layout == "transposed":
        return allowed.t().contiguous().t()
    return allowed.expand(num_tokens, num_experts)


def given_of(inputs: Inputs, num_tokens, num_experts, top_k, allowed=None, ids=torch.int64, none=0.2):
    """Different experts for each token, allowed ones where that is a rule; each is -1 with the probability `none`."""
    wanted = inputs.normal(num_tokens, num_experts)
    order = (wanted if allowed is None else wanted.masked_fill(~allowed, -torch.inf)).topk(top_k).indices
    return order.masked_fill(inputs.normal(num_tokens, top_k).sigmoid() < none, -1).to(ids)


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
    allowed=None,
    given=None,
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
        size = num_tokens, num_experts, top_k
        mask = None if allowed is None else allowed_of(inputs, *size, layout=allowed)
        experts = None if given is None else given_of(inputs, *size, allowed=mask, **given)
        return logits, top_k, scores, shift, normalize, scale, mask, experts

    return make


def _route_tokens(case, *shape, **options):
    return Sample("route_tokens", case, _logits_of(*shape, **options), differentiable=(0,), length=shape[1])


SAMPLES = [
    _route_tokens("softmax", 7, 5, 2),
    _route_tokens("sigmoid-allowed", 7, 5, 2, scores="sigmoid", bias=True, scale=2.5, allowed="dense"),
    _route_tokens("softmax-allowed-given", 7, 6, 2, normalize=False, allowed="dense", given={}),
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
    *(
        _route_tokens(f"{scores}-{form}-{limit}", 7, 6, 3, scores=scores, bias=bias, normalize=normalize, **options)
        for scores in ("softmax", "sigmoid")
        for form, bias, normalize in (("normal", False, True), ("plain", True, False))
        for limit, options in (
            ("allowed", {"allowed": "dense"}),
            ("given", {"given": {"ids": torch.int32}}),
            ("both", {"allowed": "expanded", "given": {}}),
        )
    ),
    *(
        _route_tokens(f"{scores}-both-{name}", 90, 24, 4, scores=scores, normalize=False, dtype=dtype, **options)
        for scores in ("softmax", "sigmoid")
        for name, dtype in DTYPES.items()
        for options in ({"allowed": "transposed", "given": {}},)
    ),
    *(
        _route_tokens(f"softmax-allowed-{name}", 90, 24, 4, normalize=False, dtype=dtype, allowed="expanded")
        for name, dtype in DTYPES.items()
    ),
    _route_tokens("only-none", 9, 6, 2, given={"none": 1.0}),
    _route_tokens("only-none-plain", 9, 6, 2, scores="sigmoid", normalize=False, given={"none": 1.0}),
    _route_tokens("no-token-allowed", 0, 6, 2, allowed="dense"),
    _route_tokens("no-token-given", 0, 6, 2, given={}),
    _route_tokens("large-allowed", 700, 128, 8, dtype=torch.float32, allowed="dense"),
    _route_tokens("large-given", 700, 128, 8, dtype=torch.float32, given={}),
    _route_tokens("many-of-many-both", 5, 1100, 150, dtype=torch.float32, normalize=False, allowed="dense", given={}),
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


def _with(inputs: Inputs, allowed=None, experts=None):
    """Eight tokens and four experts, of which each token takes two."""
    limits = [None if limit is None else inputs.on_device(limit) for limit in (allowed, experts)]
    return inputs.logits(8, 4), 2, "softmax", None, True, 1.0, *limits


def _but(token, *experts):
    """All experts but these for one token."""
    allowed = torch.ones(8, 4, dtype=torch.bool)
    allowed[token, list(experts)] = False
    return allowed


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
    Refusal(
        *("route_tokens", "allowed-rank", lambda inputs: _with(inputs, allowed=torch.ones(4, dtype=torch.bool))),
        "edl::route_tokens: allowed must have the shape [T, E] (got 1 dimensions)",
    ),
    Refusal(
        *("route_tokens", "allowed-dtype", lambda inputs: _with(inputs, allowed=torch.ones(8, 4))),
        "edl::route_tokens: allowed must be bool (got Float)",
    ),
    Refusal(
        *("route_tokens", "allowed-shape", lambda inputs: _with(inputs, allowed=torch.ones(1, 4, dtype=torch.bool))),
        "edl::route_tokens: allowed must have the shape of logits (got 1 by 4 for 8 by 4)",
    ),
    Refusal(
        *("route_tokens", "given-rank", lambda inputs: _with(inputs, experts=torch.zeros(8, dtype=torch.int64))),
        "edl::route_tokens: experts must have the shape [T, K] (got 1 dimensions)",
    ),
    Refusal(
        *("route_tokens", "given-dtype", lambda inputs: _with(inputs, experts=torch.zeros(8, 2))),
        "edl::route_tokens: experts must be int32 or int64 (got Float)",
    ),
    Refusal(
        *("route_tokens", "given-rows", lambda inputs: _with(inputs, experts=torch.zeros(7, 2, dtype=torch.int64))),
        "edl::route_tokens: experts must have one row per token (got 7 for 8 tokens)",
    ),
    Refusal(
        *("route_tokens", "given-columns", lambda inputs: _with(inputs, experts=torch.zeros(8, 3, dtype=torch.int64))),
        "edl::route_tokens: experts must have top_k columns (got 3 and top_k 2)",
    ),
    Refusal(
        *("route_tokens", "too-few", lambda inputs: _with(inputs, allowed=_but(1, 1, 2, 3))),
        "edl::route_tokens: allowed must leave each token at least top_k experts (got 1 for token 1 and top_k 2)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("route_tokens", "given-high", lambda inputs: _with(inputs, experts=torch.tensor([[0, 4]] * 8))),
        "edl::route_tokens: experts must be at least -1, which means none, and below 4, the number of experts (got 4 "
        "for token 0)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("route_tokens", "given-low", lambda inputs: _with(inputs, experts=torch.tensor([[-2, 0]] * 8))),
        "edl::route_tokens: experts must be at least -1, which means none, and below 4, the number of experts (got -2 "
        "for token 0)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("route_tokens", "given-twice", lambda inputs: _with(inputs, experts=torch.tensor([[0, 1]] * 7 + [[3, 3]]))),
        "edl::route_tokens: experts of a token must differ (got 3 twice for token 7)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *(
            "route_tokens",
            "given-forbidden",
            lambda inputs: _with(inputs, allowed=_but(5, 1), experts=torch.tensor([[0, 1]] * 8)),
        ),
        "edl::route_tokens: experts must be allowed (got 1, which is not, for token 5)",
        error=IndexError,
        by_value=True,
    ),
]

"""One table of inputs for every operator; the tests of all claims that hold for every operator read it.

Adding an operator: append its samples to SAMPLES and its refusals to REFUSALS.
"""

import dataclasses
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from edl import reference

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs:
    """Makes the random tensors of one sample: the same numbers on every device and in every process."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return self.on_device((torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype))

    def logits(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of the size that trained routers have."""
        return self.normal(*shape, dtype=dtype, scale=2.5)

    def distributions(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.logits(*shape).softmax(dim=-1).to(dtype)

    def ids(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.on_device(torch.randint(low, high, shape, generator=self.generator).to(dtype))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments that an operator accepts."""

    op: str  # name in torch.ops.edl, and in edl.reference
    case: str
    make: Callable[[Inputs], tuple]  # arguments in the order of the schema
    differentiable: tuple[int, ...] = ()  # positions of the arguments with a gradient
    length: int = 1  # terms in the longest sum, for tolerances
    roundings: int = 1  # to the storage type on the way to a result, for tolerances
    gradient_is_derivative: bool = True  # False: tested against the definition, not with differences

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"

    def arguments(self, device: torch.device | str = "cpu") -> tuple:
        return self.make(Inputs(str(self), torch.device(device)))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Arguments that an operator refuses, and its sentence."""

    op: str
    case: str
    make: Callable[[Inputs], tuple]
    sentence: str
    error: type[Exception] = ValueError
    by_value: bool = False  # only a kernel that sees the values can tell

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"

    def arguments(self, device: torch.device | str = "cpu") -> tuple:
        return self.make(Inputs(str(self), torch.device(device)))


def operator(name: str):
    return getattr(torch.ops.edl, name).default


# ---- sequence_segment_ids(labels, num_tokens) ----


def _sequence_segment_ids(case, batch, length, dtype=torch.int64, layout="dense"):
    def make(inputs: Inputs) -> tuple:
        labels = inputs.ids(batch, 2, low=-1, high=3, dtype=dtype)
        return labels[:, 0] if layout == "strided" else labels[:, 0].contiguous(), batch * length

    return Sample("sequence_segment_ids", case, make)


SEQUENCE_SEGMENT_IDS = [
    _sequence_segment_ids("small", 5, 3),
    _sequence_segment_ids("int32", 40, 17, dtype=torch.int32),
    _sequence_segment_ids("no-sequence", 0, 3),
    _sequence_segment_ids("no-token", 4, 0),
    _sequence_segment_ids("one-token-each", 9, 1),
    _sequence_segment_ids("strided", 30, 7, layout="strided"),
]

SEQUENCE_SEGMENT_IDS_REFUSALS = [
    Refusal(
        *("sequence_segment_ids", "rank", lambda inputs: (inputs.ids(4, 2, low=0, high=2), 8)),
        "edl::sequence_segment_ids: labels must be int32 or int64 of the shape [B] (got 2 dimensions of Long)",
    ),
    Refusal(
        *("sequence_segment_ids", "dtype", lambda inputs: (inputs.normal(4), 8)),
        "edl::sequence_segment_ids: labels must be int32 or int64 of the shape [B] (got 1 dimensions of Double)",
    ),
    Refusal(
        *("sequence_segment_ids", "length", lambda inputs: (inputs.ids(4, low=0, high=2), 10)),
        "edl::sequence_segment_ids: the tokens must be a whole number of sequences of one length (got 10 tokens for 4 "
        "sequences)",
    ),
    Refusal(
        *("sequence_segment_ids", "no-sequence", lambda inputs: (inputs.ids(0, low=0, high=2), 10)),
        "edl::sequence_segment_ids: the tokens must be a whole number of sequences of one length (got 10 tokens for 0 "
        "sequences)",
    ),
    Refusal(
        *("sequence_segment_ids", "negative", lambda inputs: (inputs.ids(4, low=0, high=2), -4)),
        "edl::sequence_segment_ids: num_tokens must not be negative (got -4)",
    ),
]


# ---- aggregate_routing(routing, segment_ids, num_segments, scores) ----


def _routing(
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
        "aggregate_routing", case, _routing(*shape, **options), differentiable=(0,), length=shape[0] + shape[1]
    )


AGGREGATE_ROUTING = [
    _aggregate_routing("softmax", 7, 5, 3),
    _aggregate_routing("sigmoid", 7, 5, 3, scores="sigmoid"),
    _aggregate_routing("none", 7, 5, 3, scores="none"),
    *(
        _aggregate_routing(f"{scores}-{name}", 300, 24, 11, scores=scores, dtype=dtype)
        for scores in ("softmax", "sigmoid", "none")
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

AGGREGATE_ROUTING_REFUSALS = [
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


def _turned(matrices: Tensor) -> Tensor:
    """The same numbers with columns that lie side by side."""
    return matrices.mT.contiguous().mT


# ---- domain_moments(segment_sums, segment_counts, labels, num_domains, squares) ----


def _segments(
    num_segments,
    num_experts,
    num_domains,
    layers=(),
    counts="shared",
    labels=torch.int64,
    squares=True,
    dtype=torch.float64,
    turned=False,
):
    def make(inputs: Inputs) -> tuple:
        shape = (num_segments,) if counts == "shared" else (*layers, num_segments)
        tokens = inputs.ids(*shape, low=0, high=6).to(dtype)  # some segments have none
        sums = inputs.distributions(*layers, num_segments, num_experts) * tokens.unsqueeze(-1)
        if labels.is_floating_point:
            weights = inputs.distributions(num_segments, num_domains, dtype=labels)
        else:
            weights = inputs.ids(num_segments, low=-1, high=num_domains, dtype=labels)
        sums = sums.to(dtype)
        return _turned(sums) if turned else sums, tokens, weights, num_domains, squares

    return make


def _domain_moments(case, *shape, **options):
    return Sample("domain_moments", case, _segments(*shape, **options), differentiable=(0,), length=shape[0] + 1)


DOMAIN_MOMENTS = [
    _domain_moments("ids", 9, 5, 3),
    _domain_moments("without-squares", 9, 5, 3, squares=False),
    _domain_moments("soft", 9, 5, 3, labels=torch.float64),
    _domain_moments("soft-fp32", 9, 5, 3, labels=torch.float32, dtype=torch.float32),
    _domain_moments("layers", 6, 8, 3, layers=(4,)),
    _domain_moments("layers-own-counts", 6, 8, 3, layers=(2, 2), counts="own"),
    _domain_moments("fp32-int32", 70, 33, 5, labels=torch.int32, dtype=torch.float32),
    _domain_moments("no-segment", 0, 4, 2),
    _domain_moments("many-domains", 120, 16, 1000, dtype=torch.float32),
    _domain_moments("one-segment", 1, 5, 2),
    _domain_moments("one-domain", 9, 5, 1),
    _domain_moments("no-segment-int32", 0, 4, 2, labels=torch.int32),
    _domain_moments("soft-bf16", 12, 7, 3, labels=torch.bfloat16, dtype=torch.float32),
    _domain_moments("turned", 9, 5, 3, layers=(2,), turned=True),
    _domain_moments("large", 300, 130, 49, layers=(3,), counts="own", dtype=torch.float32),
]

DOMAIN_MOMENTS_REFUSALS = [
    Refusal(
        *(
            "domain_moments",
            "labels-length",
            lambda inputs: (*_segments(9, 5, 3)(inputs)[:2], inputs.ids(8, low=0, high=3), 3, True),
        ),
        "edl::domain_moments: labels must have one row per segment (got 8 for 9 segments)",
    ),
    Refusal(
        *("domain_moments", "no-domain", lambda inputs: (*_segments(9, 5, 3)(inputs)[:3], 0, True)),
        "edl::domain_moments: num_domains must be at least 1 (got 0)",
    ),
    Refusal(
        *(
            "domain_moments",
            "label",
            lambda inputs: (*_segments(9, 5, 3)(inputs)[:2], inputs.ids(9, low=3, high=4), 3, True),
        ),
        "edl::domain_moments: labels must be at least -1 and below num_domains = 3 (got 3 for segment 0)",
        error=IndexError,
        by_value=True,
    ),
]

# ---- expert_divergence(sums, squares, counts, eps, reduction, bias_correction), pairwise_divergence ----


def _moments(inputs: Inputs, num_domains, num_experts, layers=(), absent=0, turned=False):
    """Sums, squares and counts of domains of 1 to 4 segments each, the first `absent` without any."""
    segments = inputs.distributions(*layers, num_domains, 4, num_experts)
    counts = inputs.ids(*layers, num_domains, low=1, high=5).double()
    counts[..., :absent] = 0
    used = (torch.arange(4, device=inputs.device) < counts.unsqueeze(-1)).unsqueeze(-1)
    sums, squares = (segments * used).sum(-2), (segments.square() * used).sum(-2)
    return (_turned(sums), _turned(squares), counts) if turned else (sums, squares, counts)


def _expert_divergence(case, *shape, reduction="mean_of_logs", bias_correction=False, eps=1e-6, **options):
    return Sample(
        "expert_divergence",
        case,
        lambda inputs: (*_moments(inputs, *shape, **options), eps, reduction, bias_correction),
        differentiable=(0, 1) if bias_correction else (0,),
        length=shape[0] ** 2 * shape[1],
        gradient_is_derivative=not bias_correction,
    )


EXPERT_DIVERGENCE = [
    _expert_divergence("mean-of-logs", 3, 5),
    _expert_divergence("log-of-mean", 3, 5, reduction="log_of_mean"),
    _expert_divergence("corrected", 4, 7, bias_correction=True),
    _expert_divergence("layers", 5, 16, layers=(3,)),
    _expert_divergence("layers-corrected", 5, 16, layers=(2, 2), bias_correction=True),
    _expert_divergence("absent", 6, 9, absent=3),
    _expert_divergence("one-left", 4, 9, absent=3),
    _expert_divergence("one-domain", 1, 9),
    _expert_divergence("one-expert", 3, 1),
    _expert_divergence("large", 49, 128),
    _expert_divergence("many-experts", 3, 2048),
    _expert_divergence("eps-zero", 3, 5, eps=0.0),
    _expert_divergence("layers-log-of-mean", 4, 8, layers=(2,), reduction="log_of_mean"),
    _expert_divergence("turned", 4, 8, layers=(2,), turned=True),
    _expert_divergence("turned-corrected", 4, 8, layers=(2,), turned=True, bias_correction=True),
    _expert_divergence("corrected-absent", 6, 9, absent=3, bias_correction=True),
]

EXPERT_DIVERGENCE_REFUSALS = [
    Refusal(
        *("expert_divergence", "eps", lambda inputs: (*_moments(inputs, 3, 5), -1.0, "mean_of_logs", False)),
        "edl::expert_divergence: eps must be finite and not negative (got -1)",
    ),
    Refusal(
        *("expert_divergence", "reduction", lambda inputs: (*_moments(inputs, 3, 5), 1e-6, "sum", False)),
        "edl::expert_divergence: reduction must be 'mean_of_logs' or 'log_of_mean' (got 'sum')",
    ),
    Refusal(
        *(
            "expert_divergence",
            "corrected-log-of-mean",
            lambda inputs: (*_moments(inputs, 3, 5), 1e-6, "log_of_mean", True),
        ),
        "edl::expert_divergence: bias_correction is defined for reduction = 'mean_of_logs' only (got 'log_of_mean')",
    ),
    Refusal(
        *(
            "expert_divergence",
            "dtype",
            lambda inputs: (*(x.float() for x in _moments(inputs, 3, 5)), 1e-6, "mean_of_logs", False),
        ),
        "edl::expert_divergence: sums and counts must be float64 (got Float and Float)",
    ),
]


def _pairwise_divergence(case, *shape, bias_correction=False, **options):
    return Sample(
        "pairwise_divergence",
        case,
        lambda inputs: (*_moments(inputs, *shape, **options), bias_correction),
        length=shape[1],
    )


PAIRWISE_DIVERGENCE = [
    _pairwise_divergence("plain", 3, 5),
    _pairwise_divergence("corrected", 5, 8, layers=(2,), bias_correction=True),
    _pairwise_divergence("absent", 4, 33, absent=2),
    _pairwise_divergence("one-domain", 1, 5),
    _pairwise_divergence("turned", 4, 8, layers=(2,), turned=True, bias_correction=True),
]

PAIRWISE_DIVERGENCE_REFUSALS = [
    Refusal(
        *(
            "pairwise_divergence",
            "rank",
            lambda inputs: (inputs.distributions(5), inputs.normal(0), inputs.normal(5), False),
        ),
        "edl::pairwise_divergence: sums must have the shape [..., D, E] (got 1 dimensions)",
    ),
]

# ---- route_tokens(logits, top_k, scores, bias, normalize, scale) ----


def _logits(
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
    return Sample("route_tokens", case, _logits(*shape, **options), differentiable=(0,), length=shape[1])


ROUTE_TOKENS = [
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

ROUTE_TOKENS_REFUSALS = [
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

# ---- sort_by_expert(experts, num_experts) ----


def _experts(inputs: Inputs, num_tokens, num_experts, top_k, sentinels=0.0, empty=0, ids=torch.int64):
    """Different experts per token, none of the first `empty`; each choice a sentinel with the probability
    `sentinels`."""
    order = inputs.normal(num_tokens, num_experts - empty).argsort(dim=-1)[:, :top_k] + empty
    absent = inputs.normal(num_tokens, top_k).sigmoid() < sentinels
    return order.masked_fill(absent, num_experts).to(ids)


def _sort_by_expert(case, num_tokens, num_experts, top_k, layout="dense", **options):
    def make(inputs: Inputs) -> tuple:
        experts = _experts(inputs, num_tokens, num_experts, top_k, **options)
        return experts.t().contiguous().t() if layout == "transposed" else experts, num_experts

    return Sample("sort_by_expert", case, make)


SORT_BY_EXPERT = [
    _sort_by_expert("small", 7, 5, 2),
    _sort_by_expert("sentinels", 11, 5, 3, sentinels=0.3),
    _sort_by_expert("int32", 50, 8, 4, ids=torch.int32),
    _sort_by_expert("no-token", 0, 6, 2),
    _sort_by_expert("no-token-int32", 0, 6, 2, ids=torch.int32),
    _sort_by_expert("one-expert", 9, 1, 1),
    _sort_by_expert("only-sentinels", 9, 4, 2, sentinels=1.0),
    _sort_by_expert("empty-experts", 40, 9, 2, empty=6),
    _sort_by_expert("many-experts", 33, 2048, 8),
    _sort_by_expert("several-chunks", 9000, 16, 4, sentinels=0.1),
    _sort_by_expert("transposed", 30, 6, 3, layout="transposed"),
]

SORT_BY_EXPERT_REFUSALS = [
    Refusal(
        *("sort_by_expert", "rank", lambda inputs: (inputs.ids(8, low=0, high=4), 4)),
        "edl::sort_by_expert: experts must have the shape [T, K] (got 1 dimensions)",
    ),
    Refusal(
        *("sort_by_expert", "dtype", lambda inputs: (inputs.normal(8, 2), 4)),
        "edl::sort_by_expert: experts must be int32 or int64 (got Double)",
    ),
    Refusal(
        *("sort_by_expert", "no-expert", lambda inputs: (inputs.ids(8, 2, low=0, high=4), 0)),
        "edl::sort_by_expert: num_experts must be at least 1 and below 2^31 - 1 (got 0)",
    ),
    Refusal(
        *("sort_by_expert", "slots", lambda inputs: (inputs.ids(1, 1, low=0, high=4).expand(2**30, 2), 4)),
        "edl::sort_by_expert: experts must have fewer than 2^31 entries (got 2147483648)",
    ),
    Refusal(
        *("sort_by_expert", "high", lambda inputs: (inputs.ids(8, 2, low=5, high=6), 4)),
        "edl::sort_by_expert: experts must be at least 0 and at most 4, the number of experts, which means no expert "
        "(got 5 at slot 0)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("sort_by_expert", "negative", lambda inputs: (inputs.ids(8, 2, low=-1, high=0), 4)),
        "edl::sort_by_expert: experts must be at least 0 and at most 4, the number of experts, which means no expert "
        "(got -1 at slot 0)",
        error=IndexError,
        by_value=True,
    ),
]

# ---- dispatch_tokens(tokens, row_order, top_k), combine_tokens(rows, weights, row_order, top_k) ----


def _row_order(inputs: Inputs, num_tokens, num_experts, top_k, **options) -> tuple[Tensor, Tensor]:
    experts = _experts(inputs, num_tokens, num_experts, top_k, **options)
    row_order, offsets = reference.sort_by_expert(experts.cpu(), num_experts)
    return inputs.on_device(row_order), inputs.on_device(offsets)


def _matrix(inputs: Inputs, num_rows, width, dtype, layout) -> Tensor:
    if layout == "transposed":
        return inputs.normal(width, num_rows, dtype=dtype).t()
    if layout == "sliced":
        return inputs.normal(num_rows, 3 * width, dtype=dtype)[:, width : 2 * width]
    return inputs.normal(num_rows, width, dtype=dtype)


def _dispatch_tokens(case, num_tokens, width, top_k, dtype=torch.float64, layout="dense"):
    def make(inputs: Inputs) -> tuple:
        row_order, _ = _row_order(inputs, num_tokens, 6, top_k)
        return _matrix(inputs, num_tokens, width, dtype, layout), row_order, top_k

    return Sample("dispatch_tokens", case, make, differentiable=(0,), length=top_k)


DISPATCH_TOKENS = [
    _dispatch_tokens("small", 7, 5, 2),
    *(_dispatch_tokens(name, 40, 37, 3, dtype=dtype) for name, dtype in DTYPES.items()),
    _dispatch_tokens("no-token", 0, 5, 2),
    _dispatch_tokens("one-token", 1, 1, 1),
    _dispatch_tokens("no-width", 3, 0, 2),
    _dispatch_tokens("large", 300, 400, 4, dtype=torch.float32),
    _dispatch_tokens("sliced", 20, 9, 4, layout="sliced", dtype=torch.float32),
    _dispatch_tokens("transposed", 20, 9, 4, layout="transposed", dtype=torch.bfloat16),
]


def _order(inputs: Inputs, *slots: int) -> Tensor:
    return inputs.on_device(torch.tensor(slots, dtype=torch.int32))


DISPATCH_TOKENS_REFUSALS = [
    Refusal(
        *("dispatch_tokens", "rank", lambda inputs: (inputs.normal(4), _order(inputs, 0, 1, 2, 3), 1)),
        "edl::dispatch_tokens: tokens must have the shape [T, H] (got 1 dimensions)",
    ),
    Refusal(
        *("dispatch_tokens", "dtype", lambda inputs: (inputs.ids(2, 3, low=0, high=2), _order(inputs, 0, 1, 2, 3), 2)),
        "edl::dispatch_tokens: tokens must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("dispatch_tokens", "order-dtype", lambda inputs: (inputs.normal(2, 3), inputs.ids(4, low=0, high=4), 2)),
        "edl::dispatch_tokens: row_order must be an int32 vector, as sort_by_expert gives it (got 1 dimensions of "
        "Long)",
    ),
    Refusal(
        *("dispatch_tokens", "top_k", lambda inputs: (inputs.normal(2, 3), _order(inputs), 0)),
        "edl::dispatch_tokens: top_k must be at least 1 (got 0)",
    ),
    Refusal(
        *("dispatch_tokens", "length", lambda inputs: (inputs.normal(2, 3), _order(inputs, 0, 1, 2), 2)),
        "edl::dispatch_tokens: row_order must have top_k entries per token (got 3 for 2 tokens and top_k 2)",
    ),
    Refusal(
        *("dispatch_tokens", "slot", lambda inputs: (inputs.normal(2, 3), _order(inputs, 0, 4, 2, 3), 2)),
        "edl::dispatch_tokens: row_order must name each of the 4 slots once (got 4 at row 1)",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("dispatch_tokens", "negative", lambda inputs: (inputs.normal(2, 3), _order(inputs, -1, 1, 2, 3), 2)),
        "edl::dispatch_tokens: row_order must name each of the 4 slots once (got -1 at row 0)",
        error=IndexError,
        by_value=True,
    ),
]


def _combine_tokens(case, num_tokens, width, top_k, weights="same", dtype=torch.float64, layout="dense", sentinels=0.0):
    def make(inputs: Inputs) -> tuple:
        row_order, offsets = _row_order(inputs, num_tokens, 6, top_k, sentinels=sentinels)
        rows = _matrix(inputs, num_tokens * top_k, width, dtype, layout)
        if weights == "none":
            return rows, None, row_order, top_k
        factors = inputs.normal(num_tokens, top_k, dtype=dtype if weights == "same" else torch.float32)
        if sentinels:
            factors.view(-1)[row_order[offsets[-1] :].long()] = 0
        return rows, factors, row_order, top_k

    return Sample(
        "combine_tokens", case, make, differentiable=(0,) if weights == "none" else (0, 1), length=max(top_k, width)
    )


COMBINE_TOKENS = [
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

COMBINE_TOKENS_REFUSALS = [
    Refusal(
        *("combine_tokens", "rank", lambda inputs: (inputs.normal(4), None, _order(inputs, 0, 1, 2, 3), 1)),
        "edl::combine_tokens: rows must have the shape [N, H] (got 1 dimensions)",
    ),
    Refusal(
        *(
            "combine_tokens",
            "dtype",
            lambda inputs: (inputs.ids(4, 3, low=0, high=2), None, _order(inputs, 0, 1, 2, 3), 2),
        ),
        "edl::combine_tokens: rows must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *(
            "combine_tokens",
            "order-rank",
            lambda inputs: (inputs.normal(4, 3), None, _order(inputs, 0, 1, 2, 3).view(2, 2), 2),
        ),
        "edl::combine_tokens: row_order must be an int32 vector, as sort_by_expert gives it (got 2 dimensions of Int)",
    ),
    Refusal(
        *("combine_tokens", "order-length", lambda inputs: (inputs.normal(4, 3), None, _order(inputs, 0, 1, 2), 2)),
        "edl::combine_tokens: row_order must have one entry per row (got 3 for 4 rows)",
    ),
    Refusal(
        *("combine_tokens", "top_k", lambda inputs: (inputs.normal(4, 3), None, _order(inputs, 0, 1, 2, 3), 0)),
        "edl::combine_tokens: top_k must be at least 1 (got 0)",
    ),
    Refusal(
        *("combine_tokens", "remainder", lambda inputs: (inputs.normal(4, 3), None, _order(inputs, 0, 1, 2, 3), 3)),
        "edl::combine_tokens: rows must be top_k per token (got 4 rows and top_k 3)",
    ),
    Refusal(
        *("combine_tokens", "weights-dtype"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(2, 2, dtype=torch.float32), _order(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have the type of rows, or be float32 beside 16-bit rows (got Float beside "
        "Double)",
    ),
    Refusal(
        *("combine_tokens", "weights-columns"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(4, 1), _order(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have top_k columns (got 1 and top_k 2)",
    ),
    Refusal(
        *("combine_tokens", "weights-rows"),
        lambda inputs: (inputs.normal(4, 3), inputs.normal(3, 2), _order(inputs, 0, 1, 2, 3), 2),
        "edl::combine_tokens: weights must have one entry per row (got 3 by 2 for 4 rows)",
    ),
    Refusal(
        *("combine_tokens", "twice", lambda inputs: (inputs.normal(4, 3), None, _order(inputs, 0, 1, 1, 3), 2)),
        "edl::combine_tokens: row_order must name each of the 4 slots once (got 1 at row 2)",
        error=IndexError,
        by_value=True,
    ),
]

# ---- expert_mlp(tokens, weights, row_order, offsets, gate_up, down) ----


def _experts_at_work(
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
        row_order, offsets = _row_order(inputs, num_tokens, num_experts, top_k, **options)
        tokens = _matrix(inputs, num_tokens, hidden_size, dtype, layout)
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


def _expert_mlp(case, *shape, **options):
    return Sample(
        "expert_mlp",
        case,
        _experts_at_work(*shape, **options),
        differentiable=(0, 1, 4, 5),
        length=shape[0] + shape[1] + shape[2],
        roundings=4,  # pre-activation, activation, the expert's output, the sum
    )


EXPERT_MLP = [
    _expert_mlp("small", 6, 3, 4, 5, 2),
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
        arguments = list(_experts_at_work(6, 3, 4, 5, 2)(inputs))
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


EXPERT_MLP_REFUSALS = [
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
            *(_order(inputs, 0).expand(2**31), _order(inputs, 0, 0), inputs.normal(1, 8, 3), inputs.normal(1, 3, 4)),
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

# ---- inject(carrier, loss, scale) ----


def _inject(case, *shape, dtype=torch.float64, loss=False, scale_dtype=torch.float64):
    return Sample(
        "inject",
        case,
        lambda inputs: (
            inputs.normal(*shape, dtype=dtype),
            inputs.normal(dtype=dtype),
            inputs.normal(dtype=scale_dtype),
        ),
        differentiable=(0, 1) if loss else (0,),
        gradient_is_derivative=not loss,
    )


INJECT = [
    _inject("carrier", 4, 2),
    *(_inject(f"loss-{name}", 4, 2, dtype=dtype, loss=True, scale_dtype=dtype) for name, dtype in DTYPES.items()),
    _inject("loss-scale-fp32", 4, 2, dtype=torch.bfloat16, loss=True, scale_dtype=torch.float32),
    _inject("empty", 0, 2, loss=True),
    _inject("scalar", loss=True),
]

INJECT_REFUSALS = [
    Refusal(
        *("inject", "carrier", lambda inputs: (inputs.ids(4, low=0, high=2), inputs.normal(), inputs.normal())),
        "edl::inject: carrier must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("inject", "loss", lambda inputs: (inputs.normal(4), inputs.normal(1), inputs.normal())),
        "edl::inject: loss must be a scalar tensor (got 1 dimensions)",
    ),
    Refusal(
        *("inject", "loss-dtype", lambda inputs: (inputs.normal(4), inputs.ids(low=0, high=2), inputs.normal())),
        "edl::inject: loss must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("inject", "scale", lambda inputs: (inputs.normal(4), inputs.normal(), inputs.normal(2, 2))),
        "edl::inject: scale must be a scalar tensor (got 2 dimensions)",
    ),
]

SAMPLES = [
    *SEQUENCE_SEGMENT_IDS,
    *AGGREGATE_ROUTING,
    *DOMAIN_MOMENTS,
    *EXPERT_DIVERGENCE,
    *PAIRWISE_DIVERGENCE,
    *ROUTE_TOKENS,
    *SORT_BY_EXPERT,
    *DISPATCH_TOKENS,
    *COMBINE_TOKENS,
    *EXPERT_MLP,
    *INJECT,
]
REFUSALS = [
    *SEQUENCE_SEGMENT_IDS_REFUSALS,
    *AGGREGATE_ROUTING_REFUSALS,
    *DOMAIN_MOMENTS_REFUSALS,
    *EXPERT_DIVERGENCE_REFUSALS,
    *PAIRWISE_DIVERGENCE_REFUSALS,
    *ROUTE_TOKENS_REFUSALS,
    *SORT_BY_EXPERT_REFUSALS,
    *DISPATCH_TOKENS_REFUSALS,
    *COMBINE_TOKENS_REFUSALS,
    *EXPERT_MLP_REFUSALS,
    *INJECT_REFUSALS,
]

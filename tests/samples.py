"""One table of inputs for every operator; the tests of all claims that hold for every operator read it.

Adding an operator: append its samples to SAMPLES and its refusals to REFUSALS.
"""

import dataclasses
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

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


# ---- aggregate_routing(routing, segment_ids, num_segments, scores) ----


def _routing(num_tokens, num_experts, num_segments, scores="softmax", dtype=torch.float64, layout="dense", ids=torch.int64):
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
    return Sample("aggregate_routing", case, _routing(*shape, **options), differentiable=(0,), length=shape[0] + shape[1])


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
        *("aggregate_routing", "length", lambda inputs: (inputs.logits(8, 4), inputs.ids(7, low=0, high=2), 2, "softmax")),
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
        *("aggregate_routing", "dtype", lambda inputs: (inputs.ids(8, 4, low=0, high=2), inputs.ids(8, low=0, high=2), 2, "none")),
        "edl::aggregate_routing: routing must be float32, float64, bfloat16 or float16 (got Long)",
    ),
    Refusal(
        *("aggregate_routing", "id", lambda inputs: (inputs.logits(8, 4), inputs.ids(8, low=2, high=3), 2, "softmax")),
        "edl::aggregate_routing: segment_ids must be at least -1 and below 2, the number of segments (got 2 at row 0",
        error=IndexError,
        by_value=True,
    ),
    Refusal(
        *("aggregate_routing", "probabilities", lambda inputs: (inputs.distributions(8, 4), inputs.ids(8, low=0, high=2), 2, "softmax")),
        "edl::aggregate_routing: with scores = 'softmax' or 'sigmoid' routing must be logits",
        by_value=True,
    ),
]

def _turned(matrices: Tensor) -> Tensor:
    """The same numbers with columns that lie side by side."""
    return matrices.mT.contiguous().mT


# ---- domain_moments(segment_sums, segment_counts, labels, num_domains, squares) ----


def _segments(
    num_segments, num_experts, num_domains, layers=(), counts="shared", labels=torch.int64, squares=True, dtype=torch.float64, turned=False
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
        *("domain_moments", "labels-length", lambda inputs: (*_segments(9, 5, 3)(inputs)[:2], inputs.ids(8, low=0, high=3), 3, True)),
        "edl::domain_moments: labels must have one row per segment (got 8 for 9 segments)",
    ),
    Refusal(
        *("domain_moments", "no-domain", lambda inputs: (*_segments(9, 5, 3)(inputs)[:3], 0, True)),
        "edl::domain_moments: num_domains must be at least 1 (got 0)",
    ),
    Refusal(
        *("domain_moments", "label", lambda inputs: (*_segments(9, 5, 3)(inputs)[:2], inputs.ids(9, low=3, high=4), 3, True)),
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
        *("expert_divergence", "corrected-log-of-mean", lambda inputs: (*_moments(inputs, 3, 5), 1e-6, "log_of_mean", True)),
        "edl::expert_divergence: bias_correction is defined for reduction = 'mean_of_logs' only (got 'log_of_mean')",
    ),
    Refusal(
        *("expert_divergence", "dtype", lambda inputs: (*(x.float() for x in _moments(inputs, 3, 5)), 1e-6, "mean_of_logs", False)),
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
        *("pairwise_divergence", "rank", lambda inputs: (inputs.distributions(5), inputs.normal(0), inputs.normal(5), False)),
        "edl::pairwise_divergence: sums must have the shape [..., D, E] (got 1 dimensions)",
    ),
]

SAMPLES = [*AGGREGATE_ROUTING, *DOMAIN_MOMENTS, *EXPERT_DIVERGENCE, *PAIRWISE_DIVERGENCE]
REFUSALS = [
    *AGGREGATE_ROUTING_REFUSALS,
    *DOMAIN_MOMENTS_REFUSALS,
    *EXPERT_DIVERGENCE_REFUSALS,
    *PAIRWISE_DIVERGENCE_REFUSALS,
]

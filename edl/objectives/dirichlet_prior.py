"""The Dirichlet prior of routing: how sharp a token's choice is follows a given distribution."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import are_ignored, check_input, log_scores, needs_of, number_of_tokens
from edl.ops import checks

# Scores that are nearer to 0 or 1 are read as these: the density of alpha < 1 has no bound there.
_LOWEST, _HIGHEST = math.log(1e-6), math.log1p(-1e-6)
_KNOTS = 2048
_LIMIT = _HIGHEST - _LOWEST  # of log(x / (1 - x)), between minus which and which the knots lie
_WIDTH = 2 * _LIMIT / (_KNOTS - 1)
_TIE = 1e-14  # a variance of values of F below it is rounding


@dataclasses.dataclass(frozen=True)
class DirichletPrior(Objective):
    """(1/E) Σ_e (1/T) Σ_t (F(p_te) - r_te)²: F the distribution function of Beta(alpha, alpha (E - 1)), r_te the rank
    of p_te among the scores of expert e over all tokens, divided by T + 1.

    Reconstructed: arXiv 2510.01185 (DPSL), from reviews, which call it the distance of the scores' empirical
    distribution from the marginals of a symmetric Dirichlet prior; the square is that of batch shaping. The mean over
    experts, tokens and layers is our choice. An asymmetric prior is left out.

    Sorted scores do not add up over ranks and micro-batches, histograms do. F is cut into bins of one width, and in
    each the mean and the deviation of F(p) are compared with those of the ranks that it takes, in place of one by one.
    So the loss is that of the batch's histogram, exact under any split. With 64 bins it is within 1 % of the sorted
    one, and its gradient too, but where all scores of an expert lie in one bin, as in a router that does not choose yet
    (20 %), and where they are as the prior says (10 %, of next to nothing). Ranks are constants of the gradient, as
    they are between swaps. F is that of SciPy (`pip install 'expert-divergence[dirichlet]'`), read from a table: within
    1e-8 for alpha up to 8, and 1e-4 up to 1000. Scores are read as between 1e-6 and 1 - 1e-6,
    and have no gradient beyond.

    Between 0, for scores distributed as the prior says, and 1/3; 0 without a token that counts. On CUDA the histogram
    adds in no fixed order, but with torch.use_deterministic_algorithms.

    Args:
        alpha (float): of each expert, above 0: below 1 for sharp routers, 1 for evenly distributed ones. Default: 1.
        bins (int): at least 1. 3 E bins numbers travel a layer. Default: 64.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid".

    Raises:
        ValueError: an option outside its range.
        ImportError: no SciPy.

    Source: arXiv 2510.01185, reconstructed; its alpha is 0.75 or 1.
    """

    alpha: float = 1.0
    bins: int = 64
    input: str = "logits"
    scores: str = "softmax"

    def __post_init__(self) -> None:
        checks.check_numbers("DirichletPrior", alpha=self.alpha)
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"edl::DirichletPrior: alpha must be finite and above 0 (got {self.alpha})")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "bins", checks.as_integer("DirichletPrior", "bins", self.bins, lowest=1))
        check_input("DirichletPrior", self.input, self.scores)
        _scipy_special()  # and not in the middle of training

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        logs = log_scores(layers, segments, self.input, self.scores)
        if logs.shape[2] < 2:
            raise ValueError(
                "edl::DirichletPrior: needs at least two experts, whose scores have a distribution (got 1)"
            )
        table = _distribution_function(self.alpha, logs.shape[2], str(logs.device), logs.dtype)
        ignored = are_ignored(layers, segments)
        counts, sums, squares = _Histogram.apply(logs, ignored, table, self.bins)  # type: ignore[no-untyped-call]
        return {"counts": counts, "sums": sums, "squares": squares, "tokens": number_of_tokens(layers, segments)}

    def formula(self, sums: Sums) -> Tensor:
        tokens, counts = sums["tokens"].detach()[:, None, None], sums["counts"].detach()
        means = sums["sums"] / counts.clamp(min=1)
        variances = sums["squares"] / counts.clamp(min=1) - means.square()
        # Of the ranks that a bin takes, all of them.
        ranks = (counts.cumsum(2) - (counts - 1) / 2) / (tokens + 1)
        deviations = ((counts.square() - 1).clamp(min=0) / 12).sqrt() / (tokens + 1)
        spread = (variances.clamp(min=_TIE).sqrt() - deviations).square()
        of_bins = counts * ((means - ranks).square() + spread.where(counts > 1, 0.0))
        return (of_bins / tokens.clamp(min=1)).sum(2).mean(1)


class _Histogram(torch.autograd.Function):
    """Of each expert and bin [L, E, bins], float64: how many values of F, their sum and that of their squares."""

    @staticmethod
    def forward(
        ctx: Any, log_scores: Tensor, is_ignored: Tensor, table: Tensor, bins: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_layers, _, num_experts = log_scores.shape
        values, slopes = _interpolated(table, log_scores)
        none = num_layers * num_experts * bins
        of_expert = torch.arange(0, none, bins, device=log_scores.device)
        keys = (values * bins).long().clamp_(0, bins - 1).add_(of_expert.view(num_layers, 1, num_experts))
        keys = keys.masked_fill_(is_ignored.unsqueeze(1), none).flatten()
        wide = values.flatten().double()  # a bin may hold more values than float32 adds well
        empty = wide.new_zeros(none + 1)
        counts, sums, squares = (
            empty.scatter_add(0, keys, x)[:-1].view(num_layers, num_experts, bins)
            for x in (torch.ones_like(wide), wide, wide.square())
        )
        ctx.save_for_backward(keys, values, slopes)
        ctx.mark_non_differentiable(counts)
        return counts, sums, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, slopes = ctx.saved_tensors
        of_sums, of_squares = (
            torch.nn.functional.pad(grad.flatten(), (0, 1)).to(values.dtype).index_select(0, keys).view(values.shape)
            for grad in grads[1:]
        )
        return of_sums.add_(of_squares.mul_(values), alpha=2).mul_(slopes), None, None, None


def _interpolated(table: Tensor, log_scores: Tensor) -> tuple[Tensor, Tensor]:
    """F and its slope over log x, which is 0 where x is read as another, of the cubics of a table [4, N - 1]."""
    logs = log_scores.clamp(_LOWEST, _HIGHEST)
    rest = torch.expm1(logs).neg_()  # 1 - x
    part = rest.log().neg_().add_(logs).add_(_LIMIT).div_(_WIDTH)
    below = part.int().clamp_(0, _KNOTS - 2)  # of NaN any: its part is NaN
    part -= below
    value, slope, square, cubic = (
        column.index_select(0, below.flatten()).view(logs.shape) for column in table.unbind()
    )
    slopes = torch.addcmul(square, cubic, part, value=1.5).mul_(part).mul_(2).add_(slope).div_(rest.mul_(_WIDTH))
    values = value.addcmul_(slope.addcmul_(square.addcmul_(cubic, part), part), part).clamp_(0.0, 1.0)
    return values, slopes.masked_fill_(logs != log_scores, 0.0)


_tables: dict[tuple[float, int, str, torch.dtype], Tensor] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _distribution_function(alpha: float, num_experts: int, device: str, dtype: torch.dtype) -> Tensor:
    """F between knots that lie evenly in log(x / (1 - x)): cubics [4, N - 1], made once for each device and type."""
    key = alpha, num_experts, device, dtype
    table = _tables.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = torch.tensor(_cubics(alpha, alpha * (num_experts - 1)), dtype=dtype, device=device)
        if type(table) is Tensor:  # torch.export gives one without values
            _tables[key] = table
    return table


def _cubics(a: float, b: float) -> Any:
    """The distribution function of Beta(a, b), as cubics through its values and slopes at knots, an array
    [4, N - 1]."""
    import numpy as np

    special = _scipy_special()
    knots = np.linspace(-_LIMIT, _LIMIT, _KNOTS)
    values = special.betainc(a, b, special.expit(knots))
    slopes = _WIDTH * np.exp(a * special.log_expit(knots) + b * special.log_expit(-knots) - special.betaln(a, b))
    rise, slope, next_slope = values[1:] - values[:-1], slopes[:-1], slopes[1:]
    return np.stack([values[:-1], slope, 3 * rise - 2 * slope - next_slope, slope + next_slope - 2 * rise])


def _scipy_special() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(
            f"edl::DirichletPrior: SciPy must be installed, pip install 'expert-divergence[dirichlet]' (got {error})"
        ) from error
    return special

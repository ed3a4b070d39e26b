"""The Dirichlet prior of routing: how sharp a token's choice is follows a given distribution."""

import dataclasses
import math

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import are_counted, check_input, log_scores, needs_of, number_of_tokens
from edl.ops import checks

# Scores that are nearer to 0 or 1 are read as these: the density of alpha < 1 has no bound there.
_LOWEST, _HIGHEST = math.log(1e-6), math.log1p(-1e-6)
_KNOTS = 2048
_WIDTH = (_HIGHEST - _LOWEST) / (_KNOTS - 1)
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
    they are between swaps. F is read from a table, within 1e-8, or 1e-5 where alpha (E - 1) is below 1.

    Between 0, for scores distributed as the prior says, and 1/3; 0 without a token that counts. On CUDA the histogram
    adds in no fixed order, but with torch.use_deterministic_algorithms.

    Args:
        alpha (float): of each expert, above 0: below 1 for sharp routers, 1 for evenly distributed ones. Default: 1.
        bins (int): at least 1. 3 E bins numbers travel a layer. Default: 64.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid".

    Raises:
        ValueError: an option outside its range.

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

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        logs = log_scores(layers, segments, self.input, self.scores)
        if logs.shape[2] < 2:
            raise ValueError(
                "edl::DirichletPrior: needs at least two experts, whose scores have a distribution (got 1)"
            )
        table = _distribution_function(self.alpha, logs.shape[2]).to(logs.device)
        counts, sums, squares = self._histogram(logs, are_counted(layers, segments), table)
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

    def has_effect(self, sums: Sums) -> Tensor:
        return sums["tokens"].sum() > 0

    def _histogram(self, log_scores: Tensor, is_counted: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each expert and bin [L, E, bins]: how many values of F, their sum and that of their squares."""
        num_layers, _, num_experts = log_scores.shape
        log_scores = log_scores.masked_fill(torch.isneginf(log_scores), _LOWEST)  # of which there is no gradient
        with torch.no_grad():
            logs = log_scores.double().clamp(_LOWEST, _HIGHEST)
            values, slopes = _interpolated(table, logs)
            bins = (values.nan_to_num() * self.bins).long().clamp(0, self.bins - 1)
        values = values + slopes * (log_scores - log_scores.detach())
        none = num_layers * num_experts * self.bins
        experts = torch.arange(num_layers * num_experts, device=bins.device).view(num_layers, 1, num_experts)
        keys = experts * self.bins + bins
        keys = keys.where(is_counted.unsqueeze(1), none).flatten()
        values = values.where(is_counted.unsqueeze(1), 0.0).flatten()
        empty = values.new_zeros(none + 1)
        counts, sums, squares = (
            empty.scatter_add(0, keys, x)[:-1].view(num_layers, num_experts, self.bins)
            for x in (torch.ones_like(values), values, values.square())
        )
        return counts, sums, squares


def _interpolated(table: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """F and its slope over log x, of the cubics of a table [N - 1, 4]."""
    places = (logs - _LOWEST) / _WIDTH
    below = places.nan_to_num().long().clamp(max=_KNOTS - 2)
    part = places - below
    value, slope, square, cubic = table.index_select(0, below.flatten()).view(*logs.shape, 4).unbind(-1)
    values = value + part * (slope + part * (square + part * cubic))
    return values.clamp(0.0, 1.0), (slope + part * (2 * square + part * (3 * cubic))) / _WIDTH


def _density_over_logs(logs: Tensor, a: float, b: float) -> Tensor:
    """The density of log x where x is distributed as Beta(a, b)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return torch.exp(a * logs + (b - 1) * torch.log1p(-logs.exp()) - log_beta)


_tables: dict[tuple[float, int], Tensor] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _distribution_function(alpha: float, num_experts: int) -> Tensor:
    """F between knots that lie evenly in log x: cubics [N - 1, 4], float64 on the CPU."""
    table = _tables.get((alpha, num_experts))
    if table is None:
        table = _integrated(alpha, alpha * (num_experts - 1))
        if type(table) is Tensor:  # torch.export gives one without values
            _tables[alpha, num_experts] = table
    return table


@torch.no_grad()
def _integrated(a: float, b: float) -> Tensor:
    """The distribution function of Beta(a, b), as cubics through its values and slopes at knots: the density of log x,
    added up from the smallest x by four points of Gauss and Legendre between them."""
    with torch.device("cpu"):
        knots = torch.linspace(_LOWEST, _HIGHEST, _KNOTS, dtype=torch.float64)
        points = torch.tensor([-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526])
        weights = torch.tensor([0.3478548451374538, 0.6521451548625461, 0.6521451548625461, 0.3478548451374538])
        logs = (knots[:-1] + knots[1:]).unsqueeze(1) / 2 + points.double() * _WIDTH / 2
        steps = (_density_over_logs(logs, a, b) * weights.double()).sum(1) * _WIDTH / 2
        slopes = _density_over_logs(knots, a, b)
        # Below the first knot the density over log x is a power of x, as good as.
        values = (slopes[0] / a + torch.cat([steps.new_zeros(1), steps.cumsum(0)])).clamp(max=1.0)
        rise, slope, next_slope = values.diff(), slopes[:-1] * _WIDTH, slopes[1:] * _WIDTH
        return torch.stack([values[:-1], slope, 3 * rise - 2 * slope - next_slope, slope + next_slope - 2 * rise], 1)

"""Expert Divergence Learning (arXiv 2603.00054): the routing of different domains is pushed apart."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from edl import ops
from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.ops import checks
from edl.reduction.micro_batches import Carried, former_states


@torch.jit.unused
def check_types(
    op: str,
    eps: Any,
    input: Any,
    scores: Any,
    sequence_reduction: Any,
    pair_reduction: Any,
    bias_correction: Any,
) -> None:
    checks.check_numbers(op, eps=eps)
    checks.check_texts(op, input=input, scores=scores, sequence_reduction=sequence_reduction)
    checks.check_texts(op, pair_reduction=pair_reduction)
    checks.check_flags(op, bias_correction=bias_correction)


def check_options(
    op: str,
    num_domains: int,
    eps: float,
    input: str,
    scores: str,
    sequence_reduction: str,
    pair_reduction: str,
    bias_correction: bool,
) -> None:
    if num_domains < 2:
        raise ValueError(
            f"edl::{op}: num_domains must be at least 2, or there is no pair to push apart (got {num_domains})"
        )
    if not (eps >= 0.0 and eps < float("inf")):
        raise ValueError(f"edl::{op}: eps must be finite and not negative (got {eps})")
    checks.check_choice(op, "input", input, ["logits", "probs"])
    checks.check_choice(op, "scores", scores, checks.router_scores())
    checks.check_choice(op, "sequence_reduction", sequence_reduction, ["sequence", "token"])
    checks.check_choice(op, "pair_reduction", pair_reduction, ["mean_of_logs", "log_of_mean"])
    if bias_correction and (sequence_reduction != "sequence" or pair_reduction != "mean_of_logs"):
        raise ValueError(
            f"edl::{op}: bias_correction needs sequence_reduction='sequence' and "
            f"pair_reduction='mean_of_logs' (got '{sequence_reduction}' and '{pair_reduction}')"
        )


@dataclasses.dataclass(frozen=True)
class ExpertDivergence(Objective):
    """The mean over pairs of domains of -log(JSD + eps) between their average router distributions.

    `edl.ExpertDivergenceLoss` says what the options mean.

    Args:
        num_domains (int): D, at least 2.
        eps (float): at least 0. Default: 1e-6.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid" (normalised over experts, as in DeepSeek-V3).
        sequence_reduction (str): "sequence" (default) or "token".
        pair_reduction (str): "mean_of_logs" (default) or "log_of_mean".
        bias_correction (bool): default False.
        labels (str): the name of its set of labels. Default: "domain_ids".

    Raises:
        ValueError: an option outside its range, or options that exclude each other.

    Source: arXiv 2603.00054; eps, the natural logarithm and the mean over layers are our choice, the bias correction is
        ours.
    """

    num_domains: int
    eps: float = 1e-6
    input: str = "logits"
    scores: str = "softmax"
    sequence_reduction: str = "sequence"
    pair_reduction: str = "mean_of_logs"
    bias_correction: bool = False
    labels: str = "domain_ids"
    # Who refuses: the loss that it is the formula of.
    _op: str = dataclasses.field(default="ExpertDivergence", repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        op = type(self).__name__
        object.__setattr__(self, "num_domains", checks.as_integer(op, "num_domains", self.num_domains))
        options = self.scores, self.sequence_reduction, self.pair_reduction, self.bias_correction
        check_types(op, self.eps, self.input, *options)
        checks.check_texts(op, labels=self.labels)
        object.__setattr__(self, "eps", float(self.eps))
        check_options(op, self.num_domains, self.eps, self.input, *options)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits" if self.input == "logits" else "scores"})

    @property
    def by_unit(self) -> bool:
        return self.sequence_reduction == "sequence"

    def segments(self, batch: Batch) -> Segments:
        segments = batch.segments(self.labels, self.num_domains, self.sequence_reduction)
        if self.bias_correction and segments.labels.is_floating_point():
            raise ValueError(f"edl::{self._op}: bias_correction needs one label per segment (got soft labels)")
        return segments

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        if not self.by_unit and segments.num_segments != self.num_domains:
            raise ValueError(
                f"edl::{self._op}: with sequence_reduction='token' the segments are the domains, "
                f"{self.num_domains} (got {segments.num_segments} segments)"
            )
        routing = [layer.logits if self.input == "logits" else layer.scores for layer in layers]
        scores = self.scores if self.input == "logits" else "none"
        sums, counts = torch.ops.edl._segment_sums(
            routing, segments.segment_ids, segments.num_segments, scores, f"edl::{self._op}"
        )
        counts = counts.unsqueeze(0)
        return {"sums": sums, "counts": counts if self.by_unit else counts.expand(len(layers), -1)}

    def of_units(self, sums: Sums, labels: Tensor) -> Sums:
        moments, squares, counts = torch.ops.edl.domain_moments(
            sums["sums"],
            sums["counts"].squeeze(0).detach(),
            labels,
            self.num_domains,
            self.bias_correction,
            caller=f"edl::{self._op}",
        )
        return {"sums": moments, **({"squares": squares} if self.bias_correction else {}), "counts": counts}

    def formula(self, sums: Sums) -> Tensor:
        moments, counts = sums["sums"].double(), sums["counts"].detach().double()
        squares = sums["squares"] if self.bias_correction else None
        loss: Tensor = torch.ops.edl.expert_divergence(
            moments, counts, self.eps, self.pair_reduction, squares, caller=f"edl::{self._op}"
        )
        return loss

    def has_effect(self, sums: Sums) -> Tensor:
        return self._is_present(sums).select(0, -1).sum() > 1  # as in all layers

    def measures(self, sums: Sums) -> dict[str, Tensor]:
        """The pairs of domains that were compared, and their Jensen-Shannon divergence: the mean over pairs and layers,
        NaN without a pair."""
        with torch.no_grad():
            is_present = self._is_present(sums)
            moments, counts = sums["sums"].double(), sums["counts"].double()
            divergences = ops.pairwise_divergence(moments, counts)
            is_pair = (is_present.unsqueeze(-1) & is_present.unsqueeze(-2)).triu(diagonal=1)
            nats = divergences.where(is_pair, 0.0).sum() / is_pair.sum()
            return {"nats": nats, "pairs": is_pair[-1].sum()}

    def _is_present(self, sums: Sums) -> Tensor:
        """Which domains the loss compares, [L, D]."""
        return sums["counts"] >= 2 if self.bias_correction else sums["counts"] > 0


def _read_former_state(state: Any) -> Carried | None:
    """What memories saved when domain moments were all that they carried: a row of sizes [L, D, E], bias_correction and
    moments, or a tuple of moments and these.

    Raises:
        ValueError: sums or counts that are negative or not finite.
    """
    try:
        if isinstance(state, Tensor):
            sizes, packed = state[:4].tolist(), state[4:]
            is_state = all(size.is_integer() for size in sizes) and sizes[3] in (0, 1)
        else:
            packed, sizes = state[0], [*state[1], state[2]]
            is_state = len(state) == 3
        num_layers, num_domains, num_experts = map(int, sizes[:3])
        shapes = {"sums": [num_layers, num_domains, num_experts], "counts": [num_layers, num_domains]}
        if sizes[3]:
            shapes = {"sums": shapes["sums"], "squares": shapes["sums"], "counts": shapes["counts"]}
        size = sum(map(math.prod, shapes.values())) + 1
        is_state = is_state and min(num_layers, num_domains, num_experts) >= 1
        is_state = is_state and packed.dtype == torch.float64 and packed.shape == (size,)
        numbers = packed.detach().clone()
        wrong = (~(packed.isfinite() & (packed >= 0))).nonzero().flatten().tolist()
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError):
        return None
    if not is_state:
        return None
    if wrong:
        raise ValueError(
            "edl::DomainMemory: the moments in a state, sums and counts, must be finite and not negative (got "
            f"{packed[wrong[0]].item()})"
        )
    meaning = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return Carried(numbers[:-1], f"{ExpertDivergence.__name__}: {meaning}", numbers[-1])


former_states.append(_read_former_state)

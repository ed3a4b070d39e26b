"""The divergence of modalities: text and images apart in their routing."""

import dataclasses
import math

import torch
from torch import Tensor

from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.domain_sums import domain_sums
from edl.objectives.tokens import check_input, needs_of
from edl.ops import checks

_DIRECTIONS = ["symmetric", "forward", "backward"]


@dataclasses.dataclass(frozen=True)
class ModalityDivergence(Objective):
    """Minus the mean over pairs of modalities m < n of KL(p_m ‖ p_n), p_m the mean of the router's scores over the
    tokens of modality m, in nats.

    Reconstructed: arXiv 2506.06406 (SMAR), whose abstract names the Kullback-Leibler divergence between the routing of
    modalities; its equation was not seen. The direction, `limit`, `eps`, the mean over pairs and layers and that every
    token weighs the same are our choice. KL(p ‖ q) = Σ_e p_e log((p_e + eps) / (q_e + eps)).

    0 where fewer than two modalities occur, pairs of those that do not are left out. Without a limit it rewards ever
    larger divergence, until an expert sees one modality alone.

    Args:
        num_modalities (int): M, at least 2.
        direction (str): "forward": KL(p_m ‖ p_n), large where an expert of the lower label m is not one of n.
            "backward": KL(p_n ‖ p_m). "symmetric" (default): the mean of both.
        limit (float, optional): a pair whose divergence has reached so many nats is pushed no further. Default: none.
        eps (float): above 0: bounds the divergence by -log(eps). Default: 1e-6.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid".
        labels (str): the name of its set of labels, in the forms that `MutualInformation` takes. Default:
            "modality_ids".

    Raises:
        ValueError: an option outside its range.

    Source: arXiv 2506.06406, reconstructed.
    """

    num_modalities: int = 2
    direction: str = "symmetric"
    limit: float | None = None
    eps: float = 1e-6
    input: str = "logits"
    scores: str = "softmax"
    labels: str = "modality_ids"

    def __post_init__(self) -> None:
        op = "ModalityDivergence"
        object.__setattr__(self, "num_modalities", checks.as_integer(op, "num_modalities", self.num_modalities))
        if self.num_modalities < 2:
            raise ValueError(
                f"edl::{op}: num_modalities must be at least 2, or there is no pair (got {self.num_modalities})"
            )
        checks.check_choice(op, "direction", self.direction, _DIRECTIONS)
        check_input(op, self.input, self.scores)
        checks.check_texts(op, labels=self.labels)
        for name in ("limit", "eps"):
            if (number := getattr(self, name)) is not None:
                checks.check_numbers(op, **{name: number})
                if not 0.0 < number < math.inf:
                    raise ValueError(f"edl::{op}: {name} must be finite and above 0 (got {number})")
                object.__setattr__(self, name, float(number))

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def segments(self, batch: Batch) -> Segments:
        return batch.tokens(self.labels, self.num_modalities)

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        return domain_sums(layers, segments, self.input, self.scores)

    def formula(self, sums: Sums) -> Tensor:
        divergences, are_pairs = self._pairs(sums)
        if self.limit is not None:
            divergences = divergences.clamp(max=self.limit)
        return -divergences.where(are_pairs, 0.0).sum((1, 2)) / are_pairs.sum((1, 2)).clamp(min=1)

    def has_effect(self, sums: Sums) -> Tensor:
        return (sums["counts"].select(0, -1) > 0).sum() > 1  # as in all layers

    def measures(self, sums: Sums) -> dict[str, Tensor]:
        """The mean divergence of pairs and layers in nats, not limited, NaN without a pair, and the number of pairs."""
        with torch.no_grad():
            divergences, are_pairs = self._pairs(sums)
            return {"nats": divergences.where(are_pairs, 0.0).sum() / are_pairs.sum(), "pairs": are_pairs[-1].sum()}

    def _pairs(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """Of modalities m < n their divergence [L, M, M], float64, and whether both occur."""
        counts = sums["counts"].detach().double()
        occurs = counts != 0  # NaN does
        means = sums["sums"].double() / counts.where(occurs, 1.0).unsqueeze(-1)
        logs = torch.log(means + self.eps)
        own = (means * logs).sum(-1)
        forward = own.unsqueeze(2) - means @ logs.transpose(1, 2)  # [m, n] = KL(p_m ‖ p_n)
        chosen = {
            "forward": lambda: forward,
            "backward": lambda: forward.transpose(1, 2),
            "symmetric": lambda: (forward + forward.transpose(1, 2)) / 2,
        }[self.direction]()
        return chosen, (occurs.unsqueeze(2) & occurs.unsqueeze(1)).triu(diagonal=1)

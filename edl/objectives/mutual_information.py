"""Mutual information: what the expert of a token tells of its domain, or the bin of the expert of its modality."""

import dataclasses

import torch
from torch import Tensor

from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.domain_sums import domain_sums, information, joint_of
from edl.objectives.tokens import check_input, needs_of
from edl.ops import checks


@dataclasses.dataclass(frozen=True)
class MutualInformation(Objective):
    """-I(D; E) = -Σ_de P(d, e) log(P(d, e) / (P(d) P(e))): what the expert tells of the domain, in nats.

    Reconstructed: arXiv 2212.08066 (Mod-Squad, with tasks for domains), whose equations we have not read; its abstract
    names the mutual information of tasks and experts. P(e | d) is the mean of the router's scores over the tokens of
    domain d. The prior P(d), the natural logarithm and the mean over layers are our choice. With two domains alike in
    size it is minus their Jensen-Shannon divergence, bounded where the logarithm of `ExpertDivergence` is not: it
    pushes hardest where domains differ already.

    Between -min(log D, log E) and 0, which is also the loss where a single domain occurs. 0 log 0 = 0.

    Args:
        num_domains (int): D, at least 2.
        prior (str): P(d). "batch" (default): as probable as its tokens are many. "uniform": domains that occur are
            alike.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid".
        labels (str): the name of its set of labels: one for each token, sequence or document, or weights of domains
            that are at least 0: [T, D] or [B, S_len, D] per token, [B, D] per sequence, [N, D] per document. Default:
            "domain_ids".

    Raises:
        ValueError: an option outside its range.

    Source: arXiv 2212.08066, reconstructed.
    """

    num_domains: int
    prior: str = "batch"
    input: str = "logits"
    scores: str = "softmax"
    labels: str = "domain_ids"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_domains", checks.as_integer("MutualInformation", "num_domains", self.num_domains))
        if self.num_domains < 2:
            raise ValueError(
                "edl::MutualInformation: num_domains must be at least 2, or there is nothing to tell "
                f"(got {self.num_domains})"
            )
        checks.check_choice("MutualInformation", "prior", self.prior, ["batch", "uniform"])
        check_input("MutualInformation", self.input, self.scores)
        checks.check_texts("MutualInformation", labels=self.labels)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def segments(self, batch: Batch) -> Segments:
        return batch.tokens(self.labels, self.num_domains)

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        return domain_sums(layers, segments, self.input, self.scores)

    def formula(self, sums: Sums) -> Tensor:
        return -information(sums, joint_of(sums, self.prior))

    def has_effect(self, sums: Sums) -> Tensor:
        return (sums["counts"].select(0, -1) > 0).sum() > 1  # as in all layers

    def measures(self, sums: Sums) -> dict[str, Tensor]:
        """The part of what there is to know, I(D; E) / H(D): 1 where the expert tells the domain; NaN with one domain;
        mean over layers."""
        with torch.no_grad():
            joint = joint_of(sums, self.prior)
            domains = joint.sum(-1)
            entropy = -torch.special.xlogy(domains, domains).sum(-1)
            return {"part_known": (information(sums, joint) / entropy.where(entropy > 0, torch.nan)).mean()}


@dataclasses.dataclass(frozen=True)
class ModalityMutualInformation(Objective):
    """-I(M; B) = -Σ_mb P(m, b) log(P(m, b) / (P(m) P(b))) of modalities and bins of experts, in nats.

    Second-hand: arXiv 2604.23996 (SMoES), from notes: the router's scores of the tokens, weighted by their soft scores
    of modality m, are averaged over them and added over the experts of bin b; what comes out, normalised, is P(m, b).
    So all modalities that occur are as probable. A bin is what lies on one device of expert parallelism: modalities
    that keep to theirs send less. Scores of modality are given as labels, for instance those of
    `edl.GaussianModalityScores`; the paper's other estimator, from attention weights, is left out. The running average
    by which the paper sorts experts is that of the batch here.

    Between -min(log M, log B) and 0, which is also the loss where a single modality occurs. 0 log 0 = 0.

    Args:
        num_modalities (int): M, at least 2. Default: 2.
        bins (int): B, at least 2, of equally many experts. Default: 8.
        binning (str): "place" (default): neighbours share a bin, as they share a device. "specialisation": they are
            sorted by their part of modality 0 first, in each layer, of the whole batch; the order is a constant of the
            gradient, and may change at every step.
        input (str): "logits" (default) or "probs": what it reads of an observation, logits or scores.
        scores (str): of logits, "softmax" (default) or "sigmoid".
        labels (str): the name of its set of labels, in the forms that `MutualInformation` takes: scores of modality
            [T, M] for instance. Default: "modality_ids".

    Raises:
        ValueError: an option outside its range.

    Source: arXiv 2604.23996, second-hand; its weight is 1e-4.
    """

    num_modalities: int = 2
    bins: int = 8
    binning: str = "place"
    input: str = "logits"
    scores: str = "softmax"
    labels: str = "modality_ids"

    def __post_init__(self) -> None:
        op = "ModalityMutualInformation"
        for name in ("num_modalities", "bins"):
            object.__setattr__(self, name, checks.as_integer(op, name, getattr(self, name), lowest=2))
        checks.check_choice(op, "binning", self.binning, ["place", "specialisation"])
        check_input(op, self.input, self.scores)
        checks.check_texts(op, labels=self.labels)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.input)

    def segments(self, batch: Batch) -> Segments:
        return batch.tokens(self.labels, self.num_modalities)

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        sums = domain_sums(layers, segments, self.input, self.scores)
        num_experts = sums["sums"].shape[2]
        if num_experts % self.bins != 0:
            raise ValueError(
                f"edl::ModalityMutualInformation: bins must divide the number of experts, {num_experts} "
                f"(got {self.bins})"
            )
        return {**sums, "sums": self._in_bins(sums["sums"])} if self.binning == "place" else sums

    def formula(self, sums: Sums) -> Tensor:
        joint = joint_of(sums, "uniform")
        if self.binning == "specialisation":
            means = joint.detach()
            part = means[:, 0] / means.sum(1).where(means.sum(1) != 0, 1.0)
            order = part.argsort(dim=1, descending=True, stable=True)
            joint = self._in_bins(joint.gather(2, order.unsqueeze(1).expand_as(joint)))
        return -information(sums, joint)

    def has_effect(self, sums: Sums) -> Tensor:
        return (sums["counts"].select(0, -1) > 0).sum() > 1  # as in all layers

    def _in_bins(self, of_experts: Tensor) -> Tensor:
        of_bins: Tensor = of_experts.unflatten(2, (self.bins, -1)).sum(3)
        return of_bins

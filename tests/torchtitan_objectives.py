"""Objectives for torchtitan's routers, one of them of one's own, and the plain loop that integrations must equal."""

import dataclasses

import torch

from edl.objectives import (
    ExpertDivergence,
    LoadBalancing,
    MutualInformation,
    Objective,
    Objectives,
    RouterZ,
    linear_warmup,
)
from edl.routing import Observation

NUM_DOMAINS, TOP_K = 3, 2
# Soft scores of modality of the tokens [B, S_len], another set of labels; of some there are none.
MODALITIES = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MODALITIES[1, 2:4] = 0.0


@dataclasses.dataclass(frozen=True)
class Certainty(Objective):
    """The square of the mean over tokens of Σ_k weight · score of the chosen experts."""

    needs = frozenset({"scores", "weights", "experts"})

    def of_tokens(self, layers, segments):
        counts = (segments.segment_ids == 0).double()
        each = [(layer.weights * layer.scores.gather(1, layer.experts)).sum(1).double() @ counts for layer in layers]
        return {"sum": torch.stack(each), "tokens": counts.sum().expand(len(layers))}

    def formula(self, sums):
        return (sums["sum"] / sums["tokens"].clamp(min=1)).square()

    def has_effect(self, sums):
        return sums["tokens"].sum() > 0


def objectives(scores="softmax", sequence_reduction="sequence"):
    """Two divergences of different options and one that needs no labels. In a router `scores` says nothing."""
    options = {"scores": scores, "num_domains": NUM_DOMAINS}
    of_tokens = ExpertDivergence(**options, sequence_reduction="token", pair_reduction="log_of_mean")
    return Objectives(
        {
            "sequences": (ExpertDivergence(**options, sequence_reduction=sequence_reduction, eps=1e-4), 0.7),
            "tokens": (of_tokens, 0.3),
            "certainty": (Certainty(), 0.2),
        }
    )


def of_two_sets(scores="softmax"):
    """One objective of domains, and one of modalities."""
    modalities = MutualInformation(2, input="probs", labels="modality_ids")
    return Objectives({"domains": (ExpertDivergence(NUM_DOMAINS, scores=scores), 0.7), "modalities": (modalities, 2.0)})


def observation(logits):
    """What a router with sigmoid scores did, with its logits [B, S_len, E] or [T, E]."""
    flat = logits.reshape(-1, logits.shape[-1])
    scores = flat.sigmoid()
    weights, experts = scores.topk(TOP_K, dim=-1)
    size = logits.shape[0] if logits.dim() == 3 else -1
    return Observation(flat, scores / scores.sum(-1, keepdim=True), weights, experts, size)


def plain_loop(bound, weight, batches, shares):
    """(gradient of a gate, values in each batch) of one process in float64; a batch is (hidden, arguments)."""
    weight = weight.detach().double().requires_grad_()
    losses = [bound(observation(hidden.double() @ weight.T), **arguments) for hidden, arguments in batches]
    total = sum(share * loss for share, (loss, _) in zip(shares, losses, strict=True))
    return torch.autograd.grad(total, weight)[0], [values for _, values in losses]


def refused(add_objectives, config):
    """What `add_objectives` complains of, for a configuration that it must leave alone."""
    divergence = ExpertDivergence(NUM_DOMAINS)
    arguments = {
        "logits": Objectives({"divergence": (divergence, 1.0), "z": (RouterZ(), 1.0)}),
        "balance": Objectives({"balance": (LoadBalancing(), 1.0)}),
        "bound": Objectives({"divergence": (divergence, 1.0)}, averaging_ranks=1),
        "no objectives": {"divergence": (divergence, 1.0)},
    }
    options = {"micro_batches": {"micro_batches": 2.5}, "memory": {"memory": "yes"}}
    sentences = {}
    for name in (*arguments, *options):
        try:
            add_objectives(config, arguments.get(name, objectives()), **options.get(name, {}))
        except ValueError as error:
            sentences[name] = str(error)
    return sentences


def warmed_up():
    return Objectives({"divergence": (ExpertDivergence(NUM_DOMAINS), linear_warmup(0.8, steps=4))})

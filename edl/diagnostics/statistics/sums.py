"""What one layer's routing of some tokens adds up to. Nothing here waits for a device, and nothing has a gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from edl.diagnostics.layers import LayerFacts
from edl.ops import checks
from edl.reduction.ranks import reads_values
from edl.reference import routing_scores
from edl.routing import Observation

OP = "RoutingStatistics"


class LayerSums(NamedTuple):
    """The sums of a layer over the tokens that count.

    Attributes:
        choices (Tensor[D, E]): int64, how often each expert was chosen by each domain.
        mass (Tensor[D, E]): float64, of the scores, which are distributions over experts; NaN where the layer tells
            neither logits nor scores.
        tokens (Tensor[D]): int64, their number.
        coactivation (Tensor[E, E]): int64, how many tokens chose two experts; on the diagonal, one.
        entropy (Tensor[D]): float64, of the tokens' scores, nats; NaN as mass is.
        margin (Tensor[D]): float64, of the distances of the K-th highest score to the next; NaN as mass is, and where
            there is no next.
    """

    choices: Tensor
    mass: Tensor
    tokens: Tensor
    coactivation: Tensor
    entropy: Tensor
    margin: Tensor


class CourseSums(NamedTuple):
    """What a snapshot keeps of a layer, as `LayerSums` has it."""

    choices: Tensor
    tokens: Tensor
    entropy: Tensor
    margin: Tensor


def shapes_of(num_domains: int, num_experts: int) -> LayerSums:
    """The shapes of sums, in the place of these."""
    by_expert, by_domain = (num_domains, num_experts), (num_domains,)
    shapes: list[tuple[int, ...]] = [by_expert, by_expert, by_domain, (num_experts, num_experts), by_domain, by_domain]
    return LayerSums(*shapes)  # type: ignore[arg-type]


def nothing(num_domains: int, num_experts: int, device: torch.device) -> LayerSums:
    """Sums over no token."""
    counts = {"choices", "tokens", "coactivation"}
    with torch.inference_mode(False):  # what is made inside can only be changed inside
        zeros = [
            torch.zeros(shape, dtype=torch.int64 if name in counts else torch.float64, device=device)
            for name, shape in shapes_of(num_domains, num_experts)._asdict().items()
        ]
    return LayerSums(*zeros)


def course_of(sums: LayerSums) -> CourseSums:
    """The part of sums that a snapshot keeps."""
    return CourseSums(sums.choices, sums.tokens, sums.entropy, sums.margin)


def facts_of(observation: Observation, place: int, num_tokens: int, top_k: int | None) -> LayerFacts:
    """What is known of a layer that was observed.

    Args:
        observation (Observation): of T tokens.
        place (int): which layer it is where it does not say so itself.
        num_tokens (int): T.
        top_k (int, optional): K where it does not tell its choices.

    Raises:
        ValueError: what is no routing of T tokens, or does not tell E or K.
    """
    number = place if observation.layer < 0 else observation.layer
    routing = observation.logits if observation.scores is None else observation.scores
    experts, counts = observation.experts, observation.tokens_per_expert
    given = {
        "logits": observation.logits,
        "scores": observation.scores,
        "experts": experts,
        "tokens_per_expert": counts,
    }
    checks.check_given(OP, **given)
    checks.check_memory(OP, **given)
    for name, tensor in {"logits or scores": routing, "experts": experts}.items():
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[0] != num_tokens or tensor.shape[1] < 1):
            raise ValueError(
                f"edl::{OP}: {name} of layer {number} must have a row for each of the {num_tokens} tokens (got "
                f"{list(tensor.shape)})"
            )
    if routing is not None and experts is not None and routing.device != experts.device:
        raise ValueError(
            f"edl::{OP}: what layer {number} tells must lie on one device (got {routing.device} and {experts.device})"
        )
    if routing is not None and not routing.is_floating_point():
        raise ValueError(f"edl::{OP}: logits or scores must be floating (got {routing.dtype})")
    if experts is not None and experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"edl::{OP}: experts must be int32 or int64 (got {experts.dtype})")
    if routing is None and (counts is None or counts.dim() != 1):
        raise ValueError(
            f"edl::{OP}: layer {number} must tell its number of experts, by logits, scores or tokens_per_expert (got "
            f"{'experts alone' if experts is not None else 'none of its tokens'})"
        )
    if experts is None and (routing is None or top_k is None):
        raise ValueError(
            f"edl::{OP}: layer {number} must tell its choices, experts; where these are the K highest scores, top_k=K "
            "says so (got a layer that does not tell, and no top_k)"
        )
    num_experts = routing.shape[1] if routing is not None else len(counts)  # type: ignore[arg-type]
    chosen = experts.shape[1] if experts is not None else top_k
    assert chosen is not None
    if chosen > num_experts:
        raise ValueError(f"edl::{OP}: a token chooses at most {num_experts} experts (got {chosen} of layer {number})")
    return LayerFacts(number, observation.router, num_experts, chosen)


def sums_of(observation: Observation, ids: Tensor, facts: LayerFacts, num_domains: int, scores: str) -> LayerSums:
    """The sums of a layer.

    Args:
        observation (Observation): of T tokens; those that do not count may hold NaN.
        ids (Tensor[T]): int32, the domain of each token, on the layer's device; -1 = not counted. D, a label or mask
            value that is not allowed, makes mass, entropy and margin NaN where the CPU does not refuse it.
        facts (LayerFacts): of the layer.
        num_domains (int): D.
        scores (str): of logits, "softmax" or "sigmoid".

    Raises:
        IndexError: an expert outside [0, E], a domain outside [-1, D) (on the CPU; elsewhere the expert is none).
    """
    routing, kind = observation.scores, "none"
    if routing is None:
        routing, kind = observation.logits, scores
    routing = None if routing is None else routing.detach()
    sizes = (num_domains, facts.num_experts, facts.top_k)
    if ids.device.type == "cpu":
        sums = torch.ops.edl._routing_sums(routing, observation.experts, ids, *sizes, kind, caller=f"edl::{OP}")
        return LayerSums(*sums)
    return sums_in_torch(routing, observation.experts, ids, *sizes, kind)


def sums_in_torch(
    routing: Tensor | None,
    experts: Tensor | None,
    ids: Tensor,
    num_domains: int,
    num_experts: int,
    top_k: int,
    scores: str,
) -> LayerSums:
    """The sums of a layer where the operator has no kernel, and what it is held to; arguments as it takes them.

    Args:
        routing (Tensor[T, E], optional): logits or scores.
        experts (Tensor[T, K], optional): the choices; without, the K highest scores.
        ids, num_domains: as `sums_of`.
        num_experts (int): E.
        top_k (int): K.
        scores (str): of logits, or "none".

    Raises:
        IndexError: as `sums_of`, where the host reads values.
    """
    # Tokens that do not count have a row of their own, which is left out at the end: no value of theirs is looked at.
    rows = ids.long().masked_fill(ids < 0, num_domains)

    def by_domain(values: Tensor) -> Tensor:
        zeros = torch.zeros(num_domains + 1, dtype=values.dtype, device=values.device)
        return zeros.scatter_add_(0, rows, values).narrow(0, 0, num_domains)

    distribution = None
    margin = entropy = torch.full([num_domains], torch.nan, dtype=torch.float64, device=ids.device)
    mass = entropy.unsqueeze(1).expand(-1, num_experts)
    if routing is not None:
        # As the operator of the objectives sums them.
        mass = torch.ops.edl._segment_sums([routing], ids, num_domains, scores, f"edl::{OP}")[0][0].double()
        distribution = routing_scores(routing if routing.dtype == torch.float64 else routing.float(), scores)
        wrong = torch.where((ids >= num_domains).any(), torch.nan, 0.0)  # a label that is not allowed
        # As torch.special.entr in a third of its time; a score of 0 adds nothing.
        logarithms = distribution.log().clamp_(min=torch.finfo(distribution.dtype).min)
        entropy = by_domain((distribution * logarithms).sum(1).neg_().double()) + wrong
        if top_k < num_experts:
            best = distribution.topk(top_k + 1, dim=1).values
            distance = best[:, -2] - best[:, -1] + distribution.sum(1).mul_(0)  # a NaN has no order
            margin = by_domain(distance.double()) + wrong
    if experts is None:
        assert distribution is not None
        experts = distribution.topk(top_k, dim=1).indices
    chosen = _checked(experts.detach().long().masked_fill((rows == num_domains).unsqueeze(1), num_experts), num_experts)
    cells = (rows.unsqueeze(1) * (num_experts + 1) + chosen).flatten()
    choices = torch.zeros((num_domains + 1) * (num_experts + 1), dtype=torch.int64, device=ids.device)
    choices = choices.scatter_add_(0, cells, torch.ones_like(cells)).view(num_domains + 1, -1)
    return LayerSums(
        choices.narrow(0, 0, num_domains).narrow(1, 0, num_experts),
        mass,
        by_domain(torch.ones_like(rows)),
        _coactivation(chosen, num_experts),
        entropy,
        margin,
    )


def _checked(chosen: Tensor, num_experts: int) -> Tensor:
    """The choices [T, K] in [0, E], E for none; others, where the host may not look for them, are none."""
    if not reads_values(chosen):
        return torch.where((chosen >= 0) & (chosen <= num_experts), chosen, num_experts)
    for end in chosen.aminmax() if chosen.numel() else ():
        if not 0 <= end <= num_experts:
            raise IndexError(f"edl::{OP}: experts must be in [0, {num_experts}], {num_experts} for none (got {end})")
    return chosen


def _coactivation(chosen: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose two experts [E, E], from choices [T, K] in [0, E]."""
    with torch.autocast(chosen.device.type, enabled=False):
        flags = torch.zeros([len(chosen), num_experts + 1], device=chosen.device)  # exact up to 2^24 tokens
        flags = flags.scatter_(1, chosen, 1.0).narrow(1, 0, num_experts)
        return (flags.T @ flags).round().long()

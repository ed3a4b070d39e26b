"""Load balancing: every expert gets its share."""

import dataclasses
import typing
from collections.abc import Sequence

import torch
from torch import Tensor

from edl import ops
from edl.labels.segments import Segments
from edl.objectives.arguments import Routings, as_logits, check_logits, check_masks, counted_tokens, flat, layers_of
from edl.objectives.base import Objective, Sums
from edl.ops import checks
from edl.routing import Observation, Routing


@dataclasses.dataclass(frozen=True)
class LoadBalancing(Objective):
    """E · Σ_e f_e P_e: f_e the fraction of all choices that went to expert e, P_e the mean of its score over tokens.

    1 at perfect balance, E where one expert gets everything, 0 without a token that counts.

    Args:
        scores (str): the router's scores, as `edl.ops.aggregate_routing` takes them. Default: "softmax".
        scope (str): whose balance it is. "global" (default): of the tokens of all ranks together, so that ranks with
            different data may use different experts. "rank": the mean over ranks of each one's own.

    Raises:
        ValueError: an unknown option.

    Source: arXiv 2101.03961, Eq. 4 to 6, with f over all K choices (GShard, arXiv 2006.16668); over the global batch:
        arXiv 2501.11873.
    """

    scores: str = "softmax"
    scope: str = "global"

    needs = frozenset({"logits", "experts"})

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("scores", self.scores, checks.router_scores()),
            ("scope", self.scope, ["global", "rank"]),
        ):
            if value not in choices:
                raise ValueError(f"edl::LoadBalancing: {name} must be one of {choices} (got {value!r})")

    def of_tokens(self, layers: Sequence[Observation], segments: Segments) -> Sums:
        of_layers = []
        for layer in layers:
            assert layer.logits is not None and layer.experts is not None
            of_layers.append(_balance_sums(layer.logits, layer.experts, segments.segment_ids, self.scores))
        mass, tokens, choices = (torch.stack(numbers) for numbers in zip(*of_layers))
        if self.scope == "global":
            return {"scores": mass, "tokens": tokens, "choices": choices}
        return {"loss": _balance(mass, tokens, choices), "ranks": (tokens > 0).to(mass.dtype)}

    def formula(self, sums: Sums) -> Tensor:
        if self.scope == "global":
            return _balance(sums["scores"], sums["tokens"], sums["choices"])
        return sums["loss"] / sums["ranks"].clamp(min=1)

    def has_effect(self, sums: Sums) -> Tensor:
        return sums["tokens" if self.scope == "global" else "ranks"].sum() > 0


def _balance_sums(logits: Tensor, experts: Tensor, counted: Tensor, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that count: the scores of each expert [E], their number, and the choices of each expert [E]."""
    num_experts = logits.shape[1]
    mass, tokens = ops.aggregate_routing(logits, counted, 1, scores)
    # The sort counts without a scatter; a token that does not count is a sentinel there.
    chosen = torch.where((counted == 0).unsqueeze(1), experts, torch.full_like(experts, num_experts))
    _, offsets = ops.sort_by_expert(chosen, num_experts)
    return mass.squeeze(0), tokens.squeeze(0), offsets.diff()


def _balance(mass: Tensor, tokens: Tensor, choices: Tensor) -> Tensor:
    """E · Σ_e f_e P_e of sums [..., E] over so many tokens [...]."""
    means = mass / tokens.unsqueeze(-1).clamp(min=1)
    fractions = choices.to(means.dtype) / choices.sum(-1, keepdim=True).clamp(min=1)
    return mass.shape[-1] * (fractions * means).sum(-1)


def _as_routings(routings: Sequence[Routing | Tensor], top_k: int | None, scores: str) -> list[Routing]:
    """The layers' routings, from several, or from router logits."""
    layers = []
    for routing in routings:
        if not isinstance(routing, Routing):
            assert top_k is not None
            logits = flat(routing)[0]
            weights, experts = ops.route_tokens(logits.detach(), top_k, scores)
            routing = Routing(routing, weights, experts, experts.new_empty(0))
        layers.append(routing)
    return layers


def load_balancing_loss(
    routings: Routings,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    scores: str = "softmax",
    top_k: int | None = None,
) -> Tensor:
    """The load-balancing loss of Switch Transformers: E · Σ_e f_e P_e per layer, mean over layers.

    `edl.objectives.LoadBalancing` of one process. f_e is the fraction of all choices that went to expert e, P_e the
    mean of its score over tokens; both sum to 1 over experts, so the loss is 1 at perfect balance and E when one expert
    gets everything. (transformers' value is K times this one.) Without any token that counts it is 0. A token whose
    logits are all -inf has no distribution: where it counts, the loss is NaN.

    Args:
        routings (Routing, or a list or tuple of them): one per layer, as `MoELayer` returns them. Also router logits, a
            Tensor[T, E] or Tensor[B, S_len, E] or a list or tuple of them, together with `top_k`. Scripted: a list of
            Routing only.
        attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
        padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
        scores (str): the router's scores, as `edl.ops.aggregate_routing` takes them. Default: "softmax".
        top_k (int, optional): K, for router logits.

    Returns:
        The loss, a scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: no layer, wrong shapes, both masks, logits without `top_k`, a DTensor.
        IndexError: a mask value other than 0 and 1 (on the CPU; elsewhere the loss is NaN).

    Source: arXiv 2101.03961, Eq. 4 to 6, with f over all K choices (GShard, arXiv 2006.16668); tokens of all sequences
        together.
    """
    if typing.TYPE_CHECKING or not torch.jit.is_scripting():  # type checkers: from here on a list of Routing
        layers = layers_of("load_balancing_loss", "routings", routings)
        check_masks("load_balancing_loss", attention_mask, padding_mask)
        checks.check_texts("load_balancing_loss", scores=scores)
        if any(not isinstance(layer, Routing) for layer in layers):
            if top_k is None:
                raise ValueError("edl::load_balancing_loss: router logits need top_k, the experts per token (got None)")
            checks.check_integers("load_balancing_loss", top_k=top_k)
        check_logits("load_balancing_loss", as_logits(layers), attention_mask, padding_mask)
        routings = _as_routings(layers, top_k, scores)
    if len(routings) == 0:
        raise ValueError("edl::load_balancing_loss: routings must hold at least one layer (got an empty list)")
    check_logits("load_balancing_loss", [routing.logits for routing in routings], attention_mask, padding_mask)
    losses: list[Tensor] = []
    for routing in routings:
        logits, batch_size = flat(routing.logits)
        if routing.experts.dim() != 2 or routing.experts.shape[0] != logits.shape[0]:
            raise ValueError(
                f"edl::load_balancing_loss: experts must have the shape [{logits.shape[0]}, K] (got "
                f"{list(routing.experts.shape)})"
            )
        if routing.experts.device != logits.device:
            raise ValueError(
                f"edl::load_balancing_loss: experts must be on the device of logits (got {routing.experts.device} and "
                f"{logits.device})"
            )
        counted = counted_tokens(logits.shape[0], batch_size, logits.device, attention_mask, padding_mask)
        mass, tokens, choices = _balance_sums(logits, routing.experts, counted, scores)
        losses.append(_balance(mass, tokens, choices))
    return torch.stack(losses).mean()

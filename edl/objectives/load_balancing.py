"""Load balancing: every expert gets its share."""

import dataclasses
import typing
from collections.abc import Sequence

import torch
from torch import Tensor

from edl import ops
from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.arguments import Routings, as_logits, check_logits, check_masks, counted_tokens, flat, layers_of
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.tokens import are_ignored, chosen_experts, readable_logits, stacked, sums_by_segment
from edl.ops import checks
from edl.routing import Routing


@dataclasses.dataclass(frozen=True)
class LoadBalancing(Objective):
    """N · Σ_i f_i P_i over N experts, or devices: f_i the fraction of all choices that went to i, P_i the mean of its
    score over tokens.

    Verified: arXiv 2101.03961, Eq. 4 to 6, with f over all K choices (GShard, arXiv 2006.16668); over the global batch
    arXiv 2501.11873; per expert and device arXiv 2401.06066. Second-hand: communication of arXiv 2405.04434, per
    sequence of arXiv 2412.19437. All have the size of the first here: 1 at perfect balance, N where one expert gets
    everything, 0 without a token that counts. f is a constant of the gradient.

    Args:
        scores (str): the router's, "softmax" (default) or "sigmoid" (normalised over experts, as in DeepSeek-V3).
        scope (str): whose balance it is. "global" (default): of the tokens of all ranks together, so that ranks with
            different data may use different experts. "sequence": the mean over sequences, or packed documents, of each
            one's own, whole also where context parallelism cuts it (DeepSeek-V3). "micro_batch": the mean over the
            micro-batches of all ranks, of those that hold parts of the same sequences together. "rank": over those of
            each rank's own tokens, also where others hold parts of its sequences.
        devices (int, optional): experts lie on so many devices, in their order and equally many on each: the balance
            is that of devices (DeepSeekMoE).
        devices_per_token (int, optional): M. f_i is the number of tokens that are sent to device i, divided by M · T:
            the balance of communication, 1 where each token is sent to M devices (DeepSeek-V2).
        choices (str): "made" (default): those of the layer. "by_score": the K highest scores, whatever a bias or a
            rule chose, as DeepSeek-V3 and Megatron count.

    Raises:
        ValueError: an unknown option, `devices_per_token` without `devices` or above it.

    Source: above. DeepSeek-V3's weight is 1e-4, DeepSeekMoE's 1e-3, that of DeepSeek-V2 3e-3 for experts, 5e-2 for
        devices and 2e-2 for communication, Switch Transformers' 1e-2.
    """

    scores: str = "softmax"
    scope: str = "global"
    devices: int | None = None
    devices_per_token: int | None = None
    choices: str = "made"

    needs = frozenset({"logits", "experts"})

    def __post_init__(self) -> None:
        checks.check_choice("LoadBalancing", "scores", self.scores, checks.router_scores())
        checks.check_choice("LoadBalancing", "scope", self.scope, ["global", "sequence", "micro_batch", "rank"])
        checks.check_choice("LoadBalancing", "choices", self.choices, ["made", "by_score"])
        for name in ("devices", "devices_per_token"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.as_integer("LoadBalancing", name, number, lowest=1))
        if self.devices_per_token is not None and self.devices_per_token > (self.devices or 0):
            raise ValueError(
                "edl::LoadBalancing: devices_per_token must be at most devices "
                f"(got {self.devices_per_token} of {self.devices})"
            )

    @property
    def by_unit(self) -> bool:
        return self.scope in ("sequence", "micro_batch")

    def segments(self, batch: Batch) -> Segments:
        return batch.sequences() if self.scope == "sequence" else batch.counted()

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        ids, num_segments, _ = segments
        mass, tokens = sums_by_segment(layers, segments, "logits", self.scores)
        chosen, num = self._chosen(layers, segments), mass.shape[2]
        if self.devices is not None:
            if num % self.devices != 0:
                raise ValueError(
                    f"edl::LoadBalancing: devices must divide the number of experts, {num} (got {self.devices})"
                )
            mass = mass.unflatten(2, (self.devices, -1)).sum(3)
            chosen, num = chosen // (num // self.devices), self.devices
        if self.devices_per_token is not None:
            chosen = _once_per_token(chosen, num)
        sums = {"scores": mass, "tokens": tokens, "choices": _count(chosen, ids, num_segments, num)}
        if self.by_unit:
            return sums
        if self.scope == "rank":
            return self._of_balances(self._balances(sums), tokens)
        return {name: x.squeeze(1) for name, x in sums.items()}

    def of_units(self, sums: Sums, labels: Tensor) -> Sums:
        return self._of_balances(self._balances(sums), sums["tokens"])

    def formula(self, sums: Sums) -> Tensor:
        return self._balances(sums) if self.scope == "global" else sums["loss"] / sums["units"].clamp(min=1)

    def has_effect(self, sums: Sums) -> Tensor:
        return sums["tokens" if self.scope == "global" else "units"].sum() > 0

    def _chosen(self, layers: Layers, segments: Segments) -> Tensor:
        """The choices [L, T, K] in [0, E], E for none."""
        if self.choices == "made":
            return chosen_experts(layers, segments)
        top_k = stacked(layers, "experts").shape[2]
        readable = readable_logits(layers, segments).detach().flatten(0, 1)
        chosen = ops.route_tokens(readable, top_k, self.scores)[1].view(len(layers), -1, top_k)
        return chosen.masked_fill(are_ignored(layers, segments).unsqueeze(1), readable.shape[1])

    def _balances(self, sums: Sums) -> Tensor:
        return _balance(sums["scores"], sums["tokens"], sums["choices"], self.devices_per_token or 0)

    def _of_balances(self, balances: Tensor, tokens: Tensor) -> Sums:
        """Sums of balances [L, U] of units of so many tokens [L, U]; that of no token is 0."""
        return {"loss": balances.sum(1), "units": (tokens > 0).to(torch.float64).sum(1)}


def _once_per_token(chosen: Tensor, none: int) -> Tensor:
    """Choices [..., K] without those that repeat one of the same token."""
    ordered = chosen.sort(dim=-1).values
    repeats = ordered[..., 1:] == ordered[..., :-1]
    return torch.cat([ordered[..., :1], ordered[..., 1:].masked_fill(repeats, none)], -1)


def _count(chosen: Tensor, segment_ids: Tensor, num_segments: int, num: int) -> Tensor:
    """How often each segment chose each of so many, int64 [L, S, N], of choices [L, T, K] in [0, N], N for none."""
    num_layers = chosen.shape[0]
    none = num_layers * num_segments * num
    of_layer = torch.arange(num_layers, device=chosen.device).view(-1, 1, 1) * num_segments
    keys = (of_layer + segment_ids.long().unsqueeze(1)) * num + chosen
    keys = keys.masked_fill(chosen == num, none).flatten()
    counts = torch.zeros(none + 1, dtype=torch.int64, device=keys.device)
    counts = counts.scatter_add(0, keys, torch.ones_like(keys)).narrow(0, 0, none)
    return counts.view(num_layers, num_segments, num)


def _balance_sums(
    logits: Tensor, experts: Tensor, counted: Tensor, scores: str, op: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that count: the scores of each expert [E], their number, and the choices of each expert [E]."""
    num_experts = logits.shape[1]
    mass, tokens = torch.ops.edl.aggregate_routing(logits, counted, 1, scores, caller="edl::" + op)
    chosen = torch.where((counted == 0).unsqueeze(1), experts, torch.full_like(experts, num_experts))
    _, offsets = torch.ops.edl.sort_by_expert(chosen, num_experts, caller="edl::" + op)
    return mass.squeeze(0), tokens.squeeze(0), offsets.diff()


def _balance(mass: Tensor, tokens: Tensor, choices: Tensor, choices_per_token: int = 0) -> Tensor:
    """E · Σ_e f_e P_e of sums [..., E] over so many tokens [...]; the choices of a token are counted, or told."""
    means = mass / tokens.unsqueeze(-1).clamp(min=1)
    all_choices = choices.sum(-1, keepdim=True)
    if choices_per_token > 0:
        all_choices = choices_per_token * tokens.unsqueeze(-1)
    fractions = choices.to(means.dtype) / all_choices.clamp(min=1)
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
        scores (str): the router's, "softmax" (default) or "sigmoid" (normalised over experts, as in DeepSeek-V3).
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
        counted = counted_tokens(
            "load_balancing_loss", logits.shape[0], batch_size, logits.device, attention_mask, padding_mask
        )
        mass, tokens, choices = _balance_sums(logits, routing.experts, counted, scores, "load_balancing_loss")
        losses.append(_balance(mass, tokens, choices))
    return torch.stack(losses).mean()

"""What a router is told, what it decides, and what of it objectives may look at."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from edl.ops import checks


class Routing(NamedTuple):
    """What a layer's router decided for the T tokens of one call, in the order of the flattened input.

    Attributes:
        logits (Tensor[T, E]): in the router's type; what the auxiliary losses take.
        weights (Tensor[T, K]): the weight of each chosen expert.
        experts (Tensor[T, K]): the chosen experts; those of `edl.routers.TopK` are int64, best first.
        tokens_per_expert (Tensor[E]): int64, how often each expert was chosen.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    tokens_per_expert: Tensor


class RoutingContext(NamedTuple):
    """What a router may know of the T tokens of one call, beside what they hold; all of it is optional.

    It is an argument of the layer's forward and never kept, so that the replays of activation checkpointing see what
    the first pass saw. Tokens are in the order of the flattened input, on the device of the input.

    Attributes:
        documents (Tensor[T], optional): int32, the document of each token, numbered alike on all ranks that hold a
            sequence; -1 = none.
        pool_sizes (Tensor[N], optional): int32, of each of the N documents.
        groups (Tensor[T] or Tensor[T, 2], optional): int32, the cluster, task or domain of each token.
        choices (Tensor[T, K], optional): int32 or int64, recorded choices that are to be made again; -1 = none.
    """

    documents: Tensor | None = None
    pool_sizes: Tensor | None = None
    groups: Tensor | None = None
    choices: Tensor | None = None


class Choice(NamedTuple):
    """What a router decides for the T tokens of one call.

    Attributes:
        logits (Tensor[T, E]): before any rule; what objectives read.
        weights (Tensor[T, K]): the weight of each chosen expert, in the type of the tokens, or float32 beside 16-bit
            tokens.
        experts (Tensor[T, K]): int32 or int64, the chosen experts in [0, E), or E for none, which adds nothing.
        shared_weights (Tensor[T, S], optional): a weight for each shared expert; no layer takes it yet.
        token_loss (Tensor[T], optional): a loss of the router's own; no layer takes it yet.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    shared_weights: Tensor | None = None
    token_loss: Tensor | None = None


# torch.export saves a program only if it can name the structure of its inputs and outputs.
_pytree._register_namedtuple(Routing, serialized_type_name="edl.moe.Routing")
_pytree._register_namedtuple(RoutingContext, serialized_type_name="edl.routing.RoutingContext")
_pytree._register_namedtuple(Choice, serialized_type_name="edl.routing.Choice")
# It keeps the example's inputs, which torch.load refuses otherwise.
torch.serialization.add_safe_globals([RoutingContext])


def _check_type(context: object) -> None:
    """Raises where a context is something else, or holds what is no dense tensor."""
    if not isinstance(context, RoutingContext):
        raise ValueError(f"edl::MoELayer: context must be an edl.RoutingContext (got {type(context).__name__})")
    for name, field in zip(context._fields, context):
        checks.check_given("MoELayer", **{f"context.{name}": field})


def _check_per_token(name: str, tensor: Tensor, width: str, is_shaped: bool, is_typed: bool, tokens: Tensor) -> None:
    """Raises where a tensor of a context, for each of the tokens, has another shape, type or device."""
    if not is_shaped or tensor.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"edl::MoELayer: context.{name} must have the shape {width}, a row for each of the {tokens.shape[0]} "
            f"tokens (got {list(tensor.shape)})"
        )
    if not is_typed:
        kinds = "int32 or int64" if name == "choices" else "int32"
        raise ValueError(f"edl::MoELayer: context.{name} must be {kinds} (got {tensor.dtype})")
    if tensor.device != tokens.device:
        raise ValueError(
            f"edl::MoELayer: context.{name} must be on the device of hidden (got {tensor.device} and {tokens.device})"
        )


def check_context(context: RoutingContext, tokens: Tensor) -> None:
    """Raises where a context is none of these tokens.

    Args:
        context (RoutingContext): what the layer was called with.
        tokens (Tensor[T, H]): the flattened input of the layer.

    Raises:
        ValueError: something else, or a field of another shape, type or device.
    """
    if not torch.jit.is_scripting():
        _check_type(context)
    documents, pool_sizes, groups, choices = context.documents, context.pool_sizes, context.groups, context.choices
    if documents is not None:
        is_typed = documents.dtype == torch.int32
        _check_per_token("documents", documents, "[T]", documents.dim() == 1, is_typed, tokens)
    if pool_sizes is not None and (pool_sizes.dim() != 1 or pool_sizes.dtype != torch.int32):
        raise ValueError(
            "edl::MoELayer: context.pool_sizes must be int32 and have the shape [N], one for each document "
            f"(got {pool_sizes.dtype} {list(pool_sizes.shape)})"
        )
    if groups is not None:
        is_shaped = groups.dim() == 1 or (groups.dim() == 2 and groups.shape[1] == 2)
        _check_per_token("groups", groups, "[T] or [T, 2]", is_shaped, groups.dtype == torch.int32, tokens)
    if choices is not None:
        is_typed = choices.dtype in [torch.int32, torch.int64]
        _check_per_token("choices", choices, "[T, K]", choices.dim() == 2, is_typed, tokens)


def check_choice(choice: Choice, tokens: Tensor, num_experts: int) -> None:
    """Raises where no layer can follow what a router decided.

    Args:
        choice (Choice): of the router; that its experts exist, `sort_by_expert` says.
        tokens (Tensor[T, H]): what the router was given.
        num_experts (int): E.

    Raises:
        ValueError: something else, another shape, type or device, or a field that no layer takes yet.
    """
    if not torch.jit.is_scripting():
        if not isinstance(choice, Choice):
            raise ValueError(f"edl::MoELayer: the router must return an edl.Choice (got {type(choice).__name__})")
        checks.check_tensors("MoELayer", logits=choice.logits, weights=choice.weights, experts=choice.experts)
    logits, weights, experts = choice.logits, choice.weights, choice.experts
    num_tokens = tokens.shape[0]
    if logits.dim() != 2 or logits.shape[0] != num_tokens:
        raise ValueError(
            f"edl::MoELayer: the router must give logits of the shape [{num_tokens}, {num_experts}] (got "
            f"{list(logits.shape)})"
        )
    if logits.shape[1] != num_experts:
        raise ValueError(
            f"edl::MoELayer: the router must give {num_experts} logits, one per expert (got {logits.shape[1]})"
        )
    is_shaped = weights.dim() == 2 and experts.dim() == 2 and weights.shape[0] == num_tokens and weights.shape[1] > 0
    if not is_shaped or weights.shape != experts.shape:
        raise ValueError(
            f"edl::MoELayer: the router must give weights and experts of one shape [{num_tokens}, K] (got "
            f"{list(weights.shape)} and {list(experts.shape)})"
        )
    if not (logits.is_floating_point() and weights.is_floating_point()):
        raise ValueError(
            f"edl::MoELayer: the router must give floating-point logits and weights (got {logits.dtype} and "
            f"{weights.dtype})"
        )
    if experts.dtype not in [torch.int32, torch.int64]:
        raise ValueError(f"edl::MoELayer: the router must give experts in int32 or int64 (got {experts.dtype})")
    for tensor in (logits, weights, experts):
        if tensor.device != tokens.device:
            raise ValueError(
                "edl::MoELayer: the router must give logits, weights and experts on the device of its tokens (got "
                f"{tensor.device} and {tokens.device})"
            )
    if choice.shared_weights is not None:
        raise ValueError(
            "edl::MoELayer: the router must leave shared_weights None, no layer takes them yet (got a tensor)"
        )
    if choice.token_loss is not None:
        raise ValueError(
            "edl::MoELayer: the router must leave token_loss None, no layer hands it on yet (got a tensor)"
        )


class Observation(NamedTuple):
    """What a layer did with its tokens, as far as somebody tells: an objective says what it needs.

    Attributes:
        logits (Tensor[T, E], optional): the router's, before any rule.
        scores (Tensor[T, E], optional): distributions over experts, of routers that give no logits.
        weights (Tensor[T, K], optional): of the chosen experts.
        experts (Tensor[T, K], optional): int32 or int64, the chosen experts.
        batch_size (int): B where it is known, else -1 (default).
        tokens_per_expert (Tensor[E], optional): int64, how often each expert was chosen.
        output_gram (Tensor[T, K, K], optional): inner products of each token's K expert outputs before their weights,
            as `edl.ops.expert_mlp_with_gram` gives them.
        activation_gram (Tensor[T, K, K], optional): of the K activations before `down`.
        router_gram (Tensor[E, E], optional): inner products of the router's rows, as `edl.moe.router_weights.gram_of`
            gives them.
        router_responses (Tensor[E, E_local], optional): how strongly the gates of this process' experts answer to the
            router's rows, as `edl.moe.router_weights.responses_of` gives it.
        first_expert (int): the expert of its first column. Default: 0.
        layer (int): the number of the layer in the model, from 0, where somebody tells, else -1 (default).
        router (str): the name of its router in the model, or "" (default).
    """

    logits: Tensor | None = None
    scores: Tensor | None = None
    weights: Tensor | None = None
    experts: Tensor | None = None
    batch_size: int = -1
    tokens_per_expert: Tensor | None = None
    output_gram: Tensor | None = None
    activation_gram: Tensor | None = None
    router_gram: Tensor | None = None
    router_responses: Tensor | None = None
    first_expert: int = 0
    layer: int = -1
    router: str = ""


_pytree._register_namedtuple(Observation, serialized_type_name="edl.routing.Observation")


# The fields with a row for each token.
_OF_TOKENS = ("logits", "scores", "weights", "experts", "output_gram", "activation_gram")


def tokens_seen(layers: list[Observation], op: str = "Objectives") -> Tensor:
    """What says how many tokens a call has, and where: the first tensor with a row for each of them, or none of the
    rows of what was observed of weights alone.

    Args:
        layers (list of Observation): of all layers.
        op (str): in whose name it refuses. Default: "Objectives".

    Raises:
        ValueError: nothing was observed.
    """
    fields = [(name, getattr(layer, name)) for layer in layers for name in Observation._fields]
    observed = [(name, x) for name, x in fields if isinstance(x, Tensor)]
    if not observed:
        raise ValueError(f"edl::{op}: observations must hold what was observed (got {len(layers)} of nothing)")
    of_tokens = [x for name, x in observed if name in _OF_TOKENS]
    return of_tokens[0] if of_tokens else torch.empty(0, device=observed[0][1].device)


def observations_of(given: Any, op: str = "Objectives") -> list[Observation]:
    """One observation for each layer.

    Args:
        given (Observation, Routing or Tensor, or a list or tuple of them): of one layer or several; a tensor is logits
            [T, E] or [B, S_len, E].
        op (str): in whose name it refuses. Default: "Objectives".

    Raises:
        ValueError: something else.
    """
    is_one = isinstance(given, (Observation, Routing, Tensor))
    layers: Any = [given] if is_one else given
    if not isinstance(layers, (list, tuple)) or len(layers) == 0:
        got = f"an empty {type(given).__name__}" if isinstance(layers, (list, tuple)) else type(given).__name__
        raise ValueError(
            f"edl::{op}: observations must be an Observation, a Routing or router logits, or a list of them (got {got})"
        )
    return [_observation_of(layer, op) for layer in layers]


def _observation_of(layer: Any, op: str) -> Observation:
    if isinstance(layer, Observation):
        return layer
    if isinstance(layer, Routing):
        logits, weights, experts, tokens_per_expert = layer
        return Observation(logits, weights=weights, experts=experts, tokens_per_expert=tokens_per_expert)
    if isinstance(layer, Tensor):
        if layer.dim() == 3:
            return Observation(logits=layer.flatten(0, 1), batch_size=layer.shape[0])
        return Observation(logits=layer)
    raise ValueError(
        f"edl::{op}: observations must hold Observations, Routings or router logits, and nothing for a layer "
        f"without a router (got a list with {type(layer).__name__})"
    )

"""What a layer's router decided, and what of it objectives may look at."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree


class Routing(NamedTuple):
    """What a layer's router decided for the T tokens of one call, in the order of the flattened input.

    Attributes:
        logits (Tensor[T, E]): in the router's type; what the auxiliary losses take.
        weights (Tensor[T, K]): the weight of each chosen expert.
        experts (Tensor[T, K]): int64, the chosen experts, best first.
        tokens_per_expert (Tensor[E]): int64, how often each expert was chosen.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    tokens_per_expert: Tensor


# torch.export saves a program only if it can name the structure of its outputs.
_pytree._register_namedtuple(Routing, serialized_type_name="edl.moe.Routing")


class Observation(NamedTuple):
    """What a layer did with its tokens, as far as somebody tells: an objective says what it needs.

    Attributes:
        logits (Tensor[T, E], optional): the router's, before any rule.
        scores (Tensor[T, E], optional): distributions over experts, of routers that give no logits.
        weights (Tensor[T, K], optional): of the chosen experts.
        experts (Tensor[T, K], optional): int32 or int64, the chosen experts.
        batch_size (int): B where it is known, else -1 (default).
    """

    logits: Tensor | None = None
    scores: Tensor | None = None
    weights: Tensor | None = None
    experts: Tensor | None = None
    batch_size: int = -1


def observations_of(given: Any) -> list[Observation]:
    """One observation for each layer.

    Args:
        given (Observation, Routing or Tensor, or a list or tuple of them): of one layer or several; a tensor is logits
            [T, E] or [B, S_len, E].

    Raises:
        ValueError: something else.
    """
    is_one = isinstance(given, (Observation, Routing, Tensor))
    layers: Any = [given] if is_one else given
    if not isinstance(layers, (list, tuple)) or len(layers) == 0:
        got = f"an empty {type(given).__name__}" if isinstance(layers, (list, tuple)) else type(given).__name__
        raise ValueError(
            "edl::Objectives: observations must be an Observation, a Routing or router logits, or a list of them "
            f"(got {got})"
        )
    return [_observation_of(layer) for layer in layers]


def _observation_of(layer: Any) -> Observation:
    if isinstance(layer, Observation):
        return layer
    if isinstance(layer, Routing):
        return Observation(logits=layer.logits, weights=layer.weights, experts=layer.experts)
    if isinstance(layer, Tensor):
        if layer.dim() == 3:
            return Observation(logits=layer.flatten(0, 1), batch_size=layer.shape[0])
        return Observation(logits=layer)
    raise ValueError(
        "edl::Objectives: observations must hold Observations, Routings or router logits, and nothing for a layer "
        f"without a router (got a list with {type(layer).__name__})"
    )

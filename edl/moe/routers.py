"""Routers: which experts a token passes, and with what weights."""

import abc
import math

import torch
from torch import Tensor, nn

from edl import ops
from edl.ops import checks
from edl.routing import Choice, RoutingContext

_WEIGHT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPUTATION_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_weight_type(op: str, dtype: torch.dtype | None) -> None:
    """Raises where parameters cannot be of a type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _WEIGHT_TYPES):
        raise ValueError(f"edl::{op}: dtype must be one of {list(_WEIGHT_TYPES)} (got {dtype!r})")


class Router(nn.Module, abc.ABC):
    """What an `edl.MoELayer` asks which experts its tokens take; derive from it, or from `TopK`.

    A forward pass writes no state: activation checkpointing runs it twice, and both must decide alike. For the same
    reason what a router knows beside the tokens comes in as an argument, an `edl.RoutingContext`.

    A router whose forward has a third parameter, `expert_bias (Tensor[E], optional)`, is handed the layer's.
    """

    @abc.abstractmethod
    def forward(self, tokens: Tensor, context: RoutingContext | None = None) -> Choice:
        """Decides.

        Args:
            tokens (Tensor[T, H]): in the order of the flattened input of the layer.
            context (RoutingContext, optional): what the layer was called with.

        Returns:
            An `edl.Choice`.
        """


def check_top_k_options(
    op: str,
    num_experts: int,
    top_k: int,
    scores: str = "softmax",
    normalize_top_k: bool = True,
    routed_scaling_factor: float = 1.0,
    router_dtype: torch.dtype = torch.float32,
) -> None:
    """Raises where an option is none that `TopK` takes, in the name of who was given it."""
    top_k = checks.as_integer(op, "top_k", top_k, lowest=1)
    checks.check_flags(op, normalize_top_k=normalize_top_k)
    checks.check_numbers(op, routed_scaling_factor=routed_scaling_factor)
    if not math.isfinite(routed_scaling_factor):
        raise ValueError(f"edl::{op}: routed_scaling_factor must be finite (got {routed_scaling_factor})")
    checks.check_texts(op, scores=scores)
    if top_k > num_experts:
        raise ValueError(f"edl::{op}: top_k must not exceed num_experts (got {top_k} of {num_experts})")
    checks.check_choice(op, "scores", scores, checks.router_scores())
    if not isinstance(router_dtype, torch.dtype) or router_dtype not in _COMPUTATION_TYPES:
        raise ValueError(
            f"edl::{op}: router_dtype must be torch.float32, torch.bfloat16 or torch.float16 (got {router_dtype})"
        )


class TopK(Router):
    """A linear layer from tokens to one logit per expert; each token takes the `top_k` experts that score best.

    The product runs in a type of its own, also under autocast; choice and weights are those of `edl.ops.route_tokens`.

    Args:
        hidden_size (int): H.
        num_experts (int): E.
        top_k (int): K, experts per token, in [1, E].
        scores (str): of logits, "softmax" (default: Switch, Mixtral, Qwen, OLMoE) or "sigmoid" (DeepSeek-V3).
        normalize_top_k (bool): divide a token's weights by their sum. Default: True.
        routed_scaling_factor (float): factor of the weights (DeepSeek-V3: 2.5). Default: 1.
        router_dtype (torch.dtype): type of the product, torch.float32 (default), torch.bfloat16 or torch.float16;
            float64 for float64 tokens. TF32 never takes the place of float32 here.
        device (torch.device, str or int, optional): where the weight is created.
        dtype (torch.dtype, optional): type of the weight.

    Raises:
        ValueError: a size that is no integer or below 1, `top_k` beyond `num_experts`, or an unknown option.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scores: str = "softmax",
        normalize_top_k: bool = True,
        routed_scaling_factor: float = 1.0,
        router_dtype: torch.dtype = torch.float32,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = checks.as_integer("TopK", "hidden_size", hidden_size, lowest=1)
        num_experts = checks.as_integer("TopK", "num_experts", num_experts, lowest=1)
        check_top_k_options("TopK", num_experts, top_k, scores, normalize_top_k, routed_scaling_factor, router_dtype)
        check_weight_type("TopK", dtype)
        self.top_k = checks.as_integer("TopK", "top_k", top_k)
        self.scores = scores
        self.normalize_top_k = normalize_top_k
        self.routed_scaling_factor = float(routed_scaling_factor)
        self.router_dtype = router_dtype
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as `nn.Linear`."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def logits_of(self, tokens: Tensor) -> Tensor:
        """`Tensor[T, H]` → logits `Tensor[T, E]`."""
        kind = self.weight.dtype
        if kind not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(
                "edl::MoELayer: router.weight must be float32, float64, bfloat16 or float16, not quantised "
                f"(got {kind})"
            )
        if tokens.device != self.weight.device:
            raise ValueError(
                f"edl::MoELayer: hidden must be on the device of the layer (got {tokens.device} and "
                f"{self.weight.device})"
            )
        if self.weight.dim() != 2 or self.weight.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"edl::MoELayer: router.weight must have the shape [E, {tokens.shape[1]}] (got "
                f"{list(self.weight.shape)})"
            )
        logits: Tensor = torch.ops.edl._router_logits(tokens, self.weight, self.router_dtype)
        return logits

    def choice_of(self, logits: Tensor, expert_bias: Tensor | None = None) -> Choice:
        """Chooses by logits, also by others than the router's own.

        Args:
            logits (Tensor[T, E]): -inf masks an expert.
            expert_bias (Tensor[E], optional): float32 or float64, shifts the choice and never enters a weight.

        Returns:
            The `edl.Choice`, with experts in int64, best first.

        Raises:
            ValueError: a bias in 16 bits.
        """
        if expert_bias is not None and expert_bias.dtype in [torch.bfloat16, torch.float16]:
            raise ValueError(
                "edl::MoELayer: the router must be given expert_bias in float32 or float64, under FSDP2 a router that "
                f"is sharded by itself needs MixedPrecisionPolicy(cast_forward_inputs=False) (got {expert_bias.dtype})"
            )
        weights, experts = ops.route_tokens(
            logits, self.top_k, self.scores, expert_bias, self.normalize_top_k, self.routed_scaling_factor
        )
        return Choice(logits, weights, experts)

    def forward(
        self, tokens: Tensor, context: RoutingContext | None = None, expert_bias: Tensor | None = None
    ) -> Choice:
        """Decides by the tokens alone.

        Args:
            tokens (Tensor[T, H]): float32, float64, bfloat16 or float16.
            context (RoutingContext, optional): it has no say, and must not have recorded choices.
            expert_bias (Tensor[E], optional): the layer's, see `choice_of`.

        Returns:
            The `edl.Choice`.

        Raises:
            ValueError: recorded choices, tokens of another device or size than the weight.
        """
        if context is not None:
            choices = context.choices
            if choices is not None:
                raise ValueError(
                    "edl::MoELayer: context.choices needs a router that makes recorded choices again, TopK does not "
                    f"(got choices of the shape {list(choices.shape)})"
                )
        return self.choice_of(self.logits_of(tokens), expert_bias)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, scores={self.scores!r}, "
            f"normalize_top_k={self.normalize_top_k}, routed_scaling_factor={self.routed_scaling_factor}, "
            f"router_dtype={self.router_dtype}"
        )

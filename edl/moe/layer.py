"""A Mixture-of-Experts feed-forward layer on the operators of edl."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edl import ops
from edl.moe import expert_parallel, router_weights
from edl.moe.routers import Router, TopK, check_top_k_options, check_weight_type
from edl.ops import checks
from edl.reduction.ranks import Group
from edl.routing import Choice, Observation, Routing, RoutingContext, check_choice, check_context


class SharedExpert(nn.Module):
    """A SwiGLU network that every token passes: down(silu(gate(x)) * up(x)).

    Args:
        hidden_size (int): H.
        intermediate_size (int): I of all shared experts together.
        device (torch.device, str or int, optional): where the parameters are created.
        dtype (torch.dtype, optional): type of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """`Tensor[T, H]` → `Tensor[T, H]`."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))
        return output


def _check_own_router(router: Router, options: dict[str, Any], expert_bias: bool) -> None:
    """Raises where a layer cannot have the router that it was given."""
    if not isinstance(router, Router):
        raise ValueError(f"edl::MoELayer: router must be an edl.routers.Router (got {type(router).__name__})")
    if options:
        raise ValueError(
            f"edl::MoELayer: a router of one's own has its options already, give them to it (got {', '.join(options)})"
        )
    if expert_bias and list(inspect.signature(router.forward).parameters)[2:3] != ["expert_bias"]:
        raise ValueError(
            "edl::MoELayer: expert_bias needs a router whose forward takes it, as forward(tokens, context=None, "
            f"expert_bias=None) (got {type(router).__name__})"
        )


_OBSERVED = ("output_gram", "activation_gram", "router_gram", "router_responses")


def _check_observed(asked: dict[str, bool], return_routing: bool, has_group: bool, has_rows: bool) -> None:
    """Raises where a layer cannot tell objectives what they ask for."""
    checks.check_flags("MoELayer", **asked)
    if any(asked.values()) and not return_routing:
        raise ValueError(
            f"edl::MoELayer: {', '.join(_OBSERVED)} are returned with the routing, they need return_routing=True (got "
            "False)"
        )
    if asked["activation_gram"] and has_group:
        raise ValueError(
            "edl::MoELayer: activation_gram needs all activations of a token in one process, which no expert_group has "
            "(got an expert_group)"
        )
    if (asked["router_gram"] or asked["router_responses"]) and not has_rows:
        raise ValueError(
            "edl::MoELayer: router_gram and router_responses need a router with a row for each expert, weight [E, H] "
            "(got one without)"
        )


def _of_router(name: str) -> Any:
    """A setting of a layer that stands in its router; a router without it gives the layer none."""
    return property(lambda layer: getattr(layer.router, name), lambda layer, value: setattr(layer.router, name, value))


# Called whenever there is a new layer, for frameworks that must know of them.
layer_listeners: list[Callable[[], None]] = []


def _tell_listeners() -> None:
    for listener in layer_listeners:
        listener()


def _check_whole(*experts: Tensor) -> None:
    """Raises where experts that are not spread by the layer itself are shards."""
    if any(checks.is_dtensor(weights) for weights in experts):
        raise ValueError(
            "edl::MoELayer: experts must be whole where the layer runs, so spread them by expert_group, not by tensor "
            "parallelism, and call the module that FSDP2 gathers, not the layer inside (got a DTensor)"
        )


class MoELayer(nn.Module):
    """A Mixture-of-Experts layer: each token passes some of `num_experts` SwiGLU networks, which its router chooses.

    output = Σ_k w_k · down_e(silu(gate_e(x)) * up_e(x)), e the k-th choice, plus the shared expert where there is one.
    The parameters are `router.weight [E, H]`, `gate_up_proj [E, 2I, H]` (the gate's rows first) and `down_proj [E, H,
    I]`, the layout of transformers v5; the shared expert's are `shared_expert.{gate,up,down}_proj.weight`, its gate's
    `shared_expert_gate.weight`. All are initialised like `nn.Linear` weights, uniform in ±1/√(inputs).

    Compiles with `fullgraph=True`, exports and scripts. Under autocast the experts run in its type, the router does
    not.

    With `expert_group` the experts are spread over its R ranks: rank r owns experts r·E/R to (r+1)·E/R, every other
    parameter is replicated. All ranks call the layer together, forward and backward, each with tokens of its own (T may
    differ and be 0), and get what one process would compute; the layer reads the exchanged sizes on the host once per
    forward. `gate_up_proj` and `down_proj` are then DTensors of all experts that hold the local shards, initialised as
    in one process from the same seed. Their gradients arrive summed over the group and are to be divided by all data
    ranks: see `edl.expert_parallel`. It compiles with `fullgraph=True` under
    `torch._dynamo.config.capture_scalar_outputs`, and is neither exported nor scripted.

    Args:
        hidden_size (int): H, size of a token.
        intermediate_size (int): I, size inside an expert.
        num_experts (int): E.
        top_k (int): K, experts per token, in [1, E]. It and the next four make the router, an `edl.routers.TopK`; a
            layer with a `router` of one's own takes none of them.
        scores (str): of logits, "softmax" (default: Switch, Mixtral, Qwen, OLMoE) or "sigmoid" (DeepSeek-V3).
        normalize_top_k (bool): divide a token's weights by their sum. With one expert per token the weight is then 1
            and the router learns nothing from the model's loss: the layer warns. Default: True.
        routed_scaling_factor (float): factor of the weights (DeepSeek-V3: 2.5). Default: 1.
        router_dtype (torch.dtype): type of the router's computation, torch.float32 (default), torch.bfloat16 or
            torch.float16; float64 tokens are always routed in float64. TF32 never takes the place of float32 here.
        router (edl.routers.Router, optional): decides in the place of one made from these options. Default: None.
        expert_bias (bool): keep a buffer `expert_bias [E]`, zero at first, that shifts the choice and never enters a
            weight; `edl.update_expert_bias` balances the experts with it. It stays float32 in a 16-bit model, whose
            type does not resolve its steps: where a state is loaded, the layer is cast or the bias is updated, a bias
            in 16 bits is replaced by a float32 buffer. The layer hands it to its router, whose forward must take it:
            `forward(tokens, context=None, expert_bias=None)`. Default: False.
        num_shared_experts (int): experts that every token passes, run as one network. Default: 0.
        shared_intermediate_size (int, optional): size inside one shared expert. Default: `intermediate_size`.
        shared_expert_gate (bool): multiply the shared output by a learned sigmoid per token (Qwen2-MoE). Default:
            False.
        expert_group (ProcessGroup or one-dimensional DeviceMesh, optional): the R ranks over which the experts are
            spread; R divides E. FSDP2 needs a dimension of the DeviceMesh that it shards over. Default: None, all
            experts are here.
        recompute_activations (bool): keep the tokens `[T, H]` and the routing alone until the backward pass, which then
            computes the experts' pre-activations `[T·K, 2I]` again: 22 % more operations, the same bits in gradients
            on the CPU. With `expert_group` the rows that travelled are kept too. Default: False.
        return_routing (bool): return (output, `Routing`), the default; False returns the output alone, as any
            feed-forward module does.
        output_gram (bool): return (output, `edl.routing.Observation`), in which `output_gram [T, K, K]` tells
            objectives how alike the outputs of a token's experts are; it is differentiable, and keeps these outputs
            until the backward pass, but with `recompute_activations`. Default: False.
        activation_gram (bool): the same of the experts' activations before `down`, as `activation_gram`; nothing more
            is kept. Not with `expert_group`, whose ranks hold a token's activations apart. Default: False.
        router_gram (bool): the same of the router's rows, as `router_gram [E, E]`, which does not depend on the tokens.
            The router must have them as `weight [E, H]`. Default: False.
        router_responses (bool): how strongly each expert's gate answers to each of these rows, perturbed, as
            `router_responses`: see `edl.objectives.ExpertRouterCoupling`, also for what it costs. With `expert_group`
            of this rank's experts, from `first_expert` on. Default: False.
        device (torch.device, str or int, optional): where the parameters are created.
        dtype (torch.dtype, optional): type of the parameters.

    Raises:
        ValueError: a size that is no integer or below 1, `top_k` beyond `num_experts`, an unknown option, options of
            a router beside a `router`, or an `expert_group` that does not fit.
    """

    if TYPE_CHECKING:  # TorchScript would make an attribute of it, which no state_dict holds and `to` does not move
        expert_bias: Tensor | None
    return_routing: Final[bool]  # these decide the type that a scripted layer returns
    output_gram: Final[bool]
    activation_gram: Final[bool]
    router_gram: Final[bool]
    router_responses: Final[bool]
    returns_observation: Final[bool]
    transformers_family: str | None = None  # the model type of the block that the layer was made from
    top_k, scores = _of_router("top_k"), _of_router("scores")
    normalize_top_k, routed_scaling_factor = _of_router("normalize_top_k"), _of_router("routed_scaling_factor")
    __jit_unused_properties__ = ("top_k", "scores", "normalize_top_k", "routed_scaling_factor")

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        scores: str | None = None,
        normalize_top_k: bool | None = None,
        routed_scaling_factor: float | None = None,
        router_dtype: torch.dtype | None = None,
        router: Router | None = None,
        expert_bias: bool = False,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        expert_group: Group | None = None,
        recompute_activations: bool = False,
        return_routing: bool = True,
        output_gram: bool = False,
        activation_gram: bool = False,
        router_gram: bool = False,
        router_responses: bool = False,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = checks.as_integer("MoELayer", "hidden_size", hidden_size, lowest=1)
        intermediate_size = checks.as_integer("MoELayer", "intermediate_size", intermediate_size, lowest=1)
        num_experts = checks.as_integer("MoELayer", "num_experts", num_experts, lowest=1)
        num_shared_experts = checks.as_integer("MoELayer", "num_shared_experts", num_shared_experts)
        checks.check_flags(
            "MoELayer",
            expert_bias=expert_bias,
            shared_expert_gate=shared_expert_gate,
            recompute_activations=recompute_activations,
            return_routing=return_routing,
        )
        check_weight_type("MoELayer", dtype)
        if num_shared_experts == 0 and (shared_expert_gate or shared_intermediate_size is not None):
            raise ValueError(
                "edl::MoELayer: shared_intermediate_size and shared_expert_gate need num_shared_experts of at least 1 "
                "(got 0)"
            )
        options: dict[str, Any] = {
            "top_k": top_k,
            "scores": scores,
            "normalize_top_k": normalize_top_k,
            "routed_scaling_factor": routed_scaling_factor,
            "router_dtype": router_dtype,
        }
        options = {name: option for name, option in options.items() if option is not None}
        if router is None:
            options["top_k"] = top_k  # also where it is lacking
            check_top_k_options("MoELayer", num_experts, **options)
            router = TopK(hidden_size, num_experts, **options, device=device, dtype=dtype)
        else:
            _check_own_router(router, options, expert_bias)
        asked = dict(zip(_OBSERVED, (output_gram, activation_gram, router_gram, router_responses)))
        has_rows = router_weights.has_rows(router, num_experts, hidden_size)
        _check_observed(asked, return_routing, expert_group is not None, has_rows)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.recompute_activations = recompute_activations
        self.return_routing = return_routing
        self.output_gram = output_gram
        self.activation_gram = activation_gram
        self.router_gram = router_gram
        self.router_responses = router_responses
        self.returns_observation = any(asked.values())
        self.router = router
        self.expert_mesh: torch.distributed.device_mesh.DeviceMesh | None = None
        if expert_group is not None:
            self.expert_mesh = expert_parallel.as_mesh(expert_group, torch.empty(0, device=device).device)
        self.gate_up_proj = self._empty_experts(2 * intermediate_size, hidden_size, device, dtype)
        self.down_proj = self._empty_experts(hidden_size, intermediate_size, device, dtype)
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        bias = torch.zeros(num_experts, device=device, dtype=bias_dtype) if expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.shared_expert: SharedExpert | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if num_shared_experts > 0:
            width = intermediate_size
            if shared_intermediate_size is not None:
                width = checks.as_integer("MoELayer", "shared_intermediate_size", shared_intermediate_size, lowest=1)
            self.shared_expert = SharedExpert(hidden_size, num_shared_experts * width, device, dtype)
            if shared_expert_gate:
                self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype)
        self._reset_experts()
        _tell_listeners()
        if isinstance(router, TopK) and router.top_k == 1 and router.normalize_top_k and num_experts > 1:
            warnings.warn(
                "edl::MoELayer: with top_k=1 and normalised weights every weight is 1 and the router gets no gradient "
                "from the model's loss, set normalize_top_k=False (in a configuration of transformers "
                "norm_topk_prob=False), or top_k to at least 2",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        _tell_listeners()

    def _empty_experts(
        self, rows: int, columns: int, device: torch.types.Device, dtype: torch.dtype | None
    ) -> nn.Parameter:
        size = self.num_experts, rows, columns
        if self.expert_mesh is None:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        return nn.Parameter(expert_parallel.empty_experts(*size, self.expert_mesh, device, dtype))

    def _reset_experts(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            expert_parallel.uniform_experts_(weight, 1 / math.sqrt(weight.shape[2]))

    def reset_parameters(self) -> None:
        """Initialises all parameters again, and sets the expert bias to zero.

        A `PreTrainedModel` of transformers that holds layers calls it in its `_init_weights`: parameters and bias that
        a checkpoint has stay what was loaded.
        """
        self._reset_experts()
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)  # unlike zero_ it spares a bias that transformers has loaded

    def __prepare_scriptable__(self) -> "MoELayer":
        """Called by torch.jit.script."""
        if self.expert_mesh is not None:
            raise ValueError(
                "edl::MoELayer: a layer with expert_group cannot be scripted (got a call of torch.jit.script)"
            )
        return self

    @torch.jit.export
    def _widen_expert_bias(self) -> Tensor | None:
        """The expert bias, after a 16-bit one was replaced: its type does not resolve the steps of an update."""
        bias = self.expert_bias
        if bias is not None:  # noqa: SIM102  (behind an `and` TorchScript looks for the type of None)
            if bias.dtype not in [torch.float32, torch.float64]:
                self.expert_bias = bias.float()
        return self.expert_bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoELayer":
        bias = self._widen_expert_bias()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype not in (torch.float32, torch.float64):
            self.expert_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._widen_expert_bias()  # a 16-bit one would round what is copied into it
        super()._load_from_state_dict(*arguments)
        self._widen_expert_bias()  # `assign=True` takes the type of the state

    def _route(self, hidden: Tensor, context: RoutingContext | None) -> tuple[Tensor, Choice, Tensor, Tensor]:
        """Tokens [T, H], the router's choice, and the order of their rows by expert."""
        if not torch.jit.is_scripting():
            checks.check_tensors("MoELayer", hidden=hidden)
        if hidden.dim() == 0:
            raise ValueError("edl::MoELayer: hidden must have the shape [..., H] (got a scalar)")
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"edl::MoELayer: hidden must end in {self.hidden_size}, the hidden size (got {hidden.shape[-1]})"
            )
        tokens = hidden.reshape(-1, self.hidden_size)
        if context is not None:
            check_context(context, tokens)
        bias = self.expert_bias
        if bias is None:
            choice = self.router(tokens, context)
        else:
            wide = bias if bias.dtype == torch.float64 else bias.float()
            choice = self.router(tokens, context, wide)  # by position, also for hooks
        if not torch.jit.is_tracing():  # which would warn of each comparison
            check_choice(choice, tokens, self.num_experts)
        row_order, offsets = torch.ops.edl.sort_by_expert(choice.experts, self.num_experts, caller="edl::MoELayer")
        return tokens, choice, row_order, offsets

    def _router_rows(self) -> Tensor:
        """The router's weight [E, H]; TorchScript looks at it only where it is asked for."""
        weight = self.router.weight
        assert isinstance(weight, Tensor)
        return weight

    def _observation(
        self,
        choice: Choice,
        tokens_per_expert: Tensor,
        output_gram: Tensor | None,
        activation_gram: Tensor | None,
    ) -> Observation:
        """What was asked for, of tokens and of weights."""
        of_rows: Tensor | None = None
        responses: Tensor | None = None
        first_expert = 0
        if self.router_gram:
            of_rows = router_weights.gram_of(self._router_rows())
        if self.router_responses:
            if self.expert_mesh is not None:
                responses, first_expert = expert_parallel.router_responses(
                    self._router_rows(), self.gate_up_proj, self.expert_mesh
                )
            else:
                responses = router_weights.responses_of(self._router_rows(), self.gate_up_proj)
        return Observation(
            choice.logits,
            None,
            choice.weights,
            choice.experts,
            -1,
            tokens_per_expert,
            output_gram,
            activation_gram,
            of_rows,
            responses,
            first_expert,
        )

    # Returns what return_routing says: TorchScript, which reads annotations, infers it.
    def forward(self, hidden: Tensor, context: RoutingContext | None = None):  # type: ignore[no-untyped-def]
        """Runs the layer.

        Args:
            hidden (Tensor[..., H]): the tokens, T in all.
            context (RoutingContext, optional): what the router is told beside them.

        Returns:
            output (Tensor[..., H]), and the `Routing` of the T tokens unless `return_routing` is False; with
            `output_gram`, `activation_gram`, `router_gram` or `router_responses` an `edl.routing.Observation` in its
            place.

        Raises:
            ValueError: no dense tensor, a last dimension other than H, a type or device other than that of the experts,
                a DTensor, a context of other tokens, or a choice that the layer cannot follow.
            RuntimeError: with `expert_group`, an error on another rank before the exchange.
        """
        output_gram: Tensor | None = None
        activation_gram: Tensor | None = None
        if self.expert_mesh is not None:
            with expert_parallel.reporting_failures(self.gate_up_proj, self.expert_mesh):
                tokens, choice, row_order, offsets = self._route(hidden, context)
            output, output_gram = expert_parallel.expert_mlp(
                tokens,
                choice.weights,
                row_order,
                offsets,
                self.gate_up_proj,
                self.down_proj,
                self.expert_mesh,
                self.output_gram,
                self.recompute_activations,
            )
        else:
            if not torch.jit.is_scripting():
                _check_whole(self.gate_up_proj, self.down_proj)
            tokens, choice, row_order, offsets = self._route(hidden, context)
            if self.output_gram or self.activation_gram:
                output, of_outputs, of_activations = ops.expert_mlp_with_gram(
                    tokens,
                    choice.weights,
                    row_order,
                    offsets,
                    self.gate_up_proj,
                    self.down_proj,
                    self.output_gram,
                    self.activation_gram,
                    self.recompute_activations,
                )
                output_gram = of_outputs if self.output_gram else None
                activation_gram = of_activations if self.activation_gram else None
            else:
                output = ops.expert_mlp(
                    tokens,
                    choice.weights,
                    row_order,
                    offsets,
                    self.gate_up_proj,
                    self.down_proj,
                    self.recompute_activations,
                )
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            output = output + shared
        # Not a view, like the output of nn.Linear: an in-place operation on a view would drop the hooks of FSDP2. (In a
        # trace the sizes that it is given would become constants.)
        output = output.view_as(hidden) if torch.jit.is_tracing() else torch.ops.aten._unsafe_view(output, hidden.shape)
        if self.return_routing:
            tokens_per_expert = (offsets[1:] - offsets[:-1]).to(torch.int64)
            if self.returns_observation:
                return output, self._observation(choice, tokens_per_expert, output_gram, activation_gram)
            return output, Routing(choice.logits, choice.weights, choice.experts, tokens_per_expert)
        return output

    @classmethod
    def from_transformers(
        cls,
        block: nn.Module,
        return_routing: bool = True,
        router_dtype: torch.dtype = torch.float32,
        recompute_activations: bool = False,
    ) -> "MoELayer":
        """Makes a layer of a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE block (transformers v5).

        The layer shares the block's parameters and gives the same output and gradients; put it in the block's place
        with `return_routing=False`.

        Args:
            block (nn.Module): `MixtralSparseMoeBlock`, `Qwen2MoeSparseMoeBlock`, `Qwen3MoeSparseMoeBlock` or
                `OlmoeSparseMoeBlock`.
            return_routing (bool): as for the constructor. Default: True.
            router_dtype (torch.dtype): as for the constructor. transformers runs a 16-bit model's router in 16 bits, so
                that a few tokens with nearly equal logits choose otherwise there; pass the model's type to follow it.
                Default: torch.float32.
            recompute_activations (bool): as for the constructor. Default: False.

        Returns:
            The layer.

        Raises:
            ValueError: another kind of module, further parameters (adapters of PEFT), an activation other than SiLU, or
                router jitter noise.
        """
        from edl.integrations.transformers import layer_from_block

        return layer_from_block(block, return_routing, router_dtype, recompute_activations)

    def to_transformers(self, family: str | None = None) -> nn.Module:
        """Makes a block of transformers v5 that shares the layer's parameters and gives the same output.

        Args:
            family (str, optional): "mixtral", "qwen2_moe", "qwen3_moe" or "olmoe". Default: that of the block which the
                layer was made from, else "qwen2_moe" with a shared expert and "qwen3_moe" without.

        Returns:
            The block, an nn.Module of transformers.

        Raises:
            ValueError: an unknown family, one that cannot express the layer, or further parameters (adapters of PEFT).
        """
        from edl.integrations.transformers import block_from_layer

        return block_from_layer(self, family)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, expert_bias={self.expert_bias is not None}, "
            f"num_shared_experts={self.num_shared_experts}, return_routing={self.return_routing}"
            + "".join(f", {name}=True" for name in ("recompute_activations", *_OBSERVED) if getattr(self, name))
            + (f", expert_group of {self.expert_mesh.size()} ranks" if self.expert_mesh is not None else "")
        )

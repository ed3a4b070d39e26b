"""A Megatron router that adds the objectives of its layer.

How the gradient is scaled. Every rank computes the same loss and differentiates it by its own rows; the gradient of the
global batch is the sum over all ranks. Megatron sums router gradients over tensor parallelism (sequence parallel),
averages them over data·context parallelism, and scales auxiliary losses by context_parallel_size / num_microbatches.
What is missing is the number of data-parallel ranks: `averaging_ranks`. With `calculate_per_token_loss` it neither
averages nor divides by micro-batches, but divides by the tokens of the whole step: each micro-batch then weighs as many
tokens as a data-parallel rank has in it. And it adds up the auxiliary losses of its layers, where the weight of an
objective is that of their mean: each router has a share of one by their number.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

import edl
from edl.integrations.megatron.batch import RouterBatch, check_dimensions
from edl.integrations.megatron.metrics import RouterLog, place_of
from edl.moe.router_weights import gram_of
from edl.objectives import ExpertDivergence, Objectives
from edl.reduction.ranks import reads_values
from edl.routing import Observation

NATIVE_SCORES = ("softmax", "sigmoid")
CHOICES = frozenset({"experts", "weights"})
OBSERVED = CHOICES | {"logits", "scores", "router_gram"}  # what a router tells


class EDTopKRouter(TopKRouter):
    """`TopKRouter` with the objectives of its layer, added while training, and what their statistics count.

    Objectives that need labels take them from `edl.domain_scope`. Built by Megatron from a spec that `patch_spec` has
    patched. The parameters and their names are those of `TopKRouter`.

    Args:
        config (TransformerConfig): Megatron's.
        pg_collection (ProcessGroupCollection): Megatron's.
        objectives, num_domains, coeff, eps, bias_correction, accumulate, steps_taken: see `patch_spec`.
        kwargs: further arguments of Megatron's own router.

    Raises:
        ValueError: a configuration under which labels cannot reach the router, or the router sees parts of sequences
            only; or which does not tell what the objectives need.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        objectives: Objectives | None = None,
        num_domains: int | None = None,
        coeff: float = 0.0,
        eps: float = 1e-6,
        bias_correction: bool = False,
        accumulate: bool = False,
        steps_taken: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_config(config)
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        # The default groups of an MoE layer lack this one.
        data_group = getattr(pg_collection, "dp", None) or parallel_state.get_data_parallel_group()
        self.data_parallel_size = data_group.size()
        if objectives is None:
            unbound = divergence_of(num_domains, coeff, eps, bias_correction, self.score_function)
            self.share = 1.0
        else:
            unbound, self.share = objectives, 1 / _num_moe_layers(config)
        bound = unbound.bind(
            sequence_group=self.tp_cp_group if self.tp_cp_group.size() > 1 else None,
            group=data_group if data_group.size() > 1 else None,
            averaging_ranks=data_group.size(),
            memory=edl.DomainMemory() if accumulate else None,
        )
        # No child module: checkpoints keep the keys of TopKRouter, and load with and without objectives.
        object.__setattr__(self, "objectives", bound)
        self._needs = bound.needs
        self._need_labels = [name for name, objective in bound.objectives.items() if objective.labels is not None]
        if self._needs & CHOICES and config.moe_expert_capacity_factor is not None:
            raise ValueError(
                "edl::EDTopKRouter: objectives that read choices need all of them, moe_expert_capacity_factor None "
                f"(got {config.moe_expert_capacity_factor})"
            )
        self._refuse_names_of_megatron()
        self._steps_taken = steps_taken
        self._log: RouterLog | None = None  # from the first loss on, when the layer has its number

    def _refuse_names_of_megatron(self) -> None:
        """The log would add the losses of two that share a name."""
        coefficients = {
            "load_balancing": self.get_aux_loss_coeff("aux_loss"),
            "seq_load_balancing": self.get_aux_loss_coeff("seq_aux_loss"),
            "global_load_balancing": self.get_aux_loss_coeff("global_aux_loss"),
            "z": self.config.moe_z_loss_coeff,
        }
        for name in self.objectives.objectives:
            if coefficients.get(name):
                raise ValueError(
                    "edl::EDTopKRouter: an objective must have another name than an auxiliary loss that Megatron adds "
                    f"itself (got {name!r} twice)"
                )

    @property
    def label_sets(self) -> set[str]:
        """The names of the sets of labels that its objectives and statistics need."""
        return set(self.objectives.label_sets)

    @property
    def evaluation_label_sets(self) -> set[str]:
        """The names of those that it needs in evaluation, for statistics."""
        statistics = self.objectives.evaluation_statistics
        return set() if statistics is None else set(statistics.label_sets)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's routing of logits [S_len, B, E], with the loss attached to the weights.

        Logits [T, E] have token s of sequence b in row s·B + b and do not say B. It is taken from a `padding_mask`
        [S_len, B], a mask [B, S_len] of the scope, or of any set labels [B] (B below T) or [B, S_len], or weights
        [B, D] or [B, S_len, D]; with `cu_seqlens` from a mask, labels [B, S_len] or weights [B, S_len, D].

        Raises:
            ValueError: logits of other dimensions, or [T, E] where B is needed and cannot be told or does not divide T.
        """
        counts = self.objectives.evaluation_statistics is not None
        # Asked also where only a replay needs them.
        scope = edl.current_labels() if self.training or counts else None
        if not (self.training and torch.is_grad_enabled() and self.objectives.objectives):
            return self._count(super().routing(logits, padding_mask=padding_mask), logits, padding_mask, scope)
        if scope is None and self._need_labels:
            warnings.warn(
                f"edl::EDTopKRouter: trains outside any edl.domain_scope, without {', '.join(self._need_labels)}",
                stacklevel=2,
            )
            if len(self._need_labels) == len(self.objectives.objectives):
                return self._count(super().routing(logits, padding_mask=padding_mask), logits, padding_mask, scope)
        self._follow_steps()
        begin = lambda routed: self.objectives.begin_batch(
            # Made inside, which keeps the other ranks from waiting where the labels of one are wrong.
            lambda: [self._observation(logits, routed)],
            lambda _: self._batch(logits, padding_mask, scope),
        )
        if self._needs & CHOICES:
            routed = super().routing(logits, padding_mask=padding_mask)
            finish = begin(routed)
        else:  # data-parallel ranks add up their sums while Megatron routes
            finish = begin(None)
            routed = super().routing(logits, padding_mask=padding_mask)
        probs, routing_map = routed
        return self._attach(probs, finish()[0], logits, padding_mask, scope), routing_map

    def _count(
        self, routed: tuple[Tensor, Tensor], logits: Tensor, padding_mask: Tensor | None, scope: edl.Labels | None
    ) -> tuple[Tensor, Tensor]:
        """Megatron's routing of a pass without losses, which statistics count."""
        objectives = self.objectives
        statistics = objectives.statistics if self.training else objectives.evaluation_statistics
        if statistics is None:
            return routed
        if scope is None and statistics.label_sets:
            warnings.warn(
                f"edl::EDTopKRouter: statistics count no token outside any edl.domain_scope, without "
                f"{', '.join(sorted(statistics.label_sets))}",
                stacklevel=3,
            )
        objectives.look(
            lambda: [self._observation(logits, routed)],
            lambda _: self._batch(logits, padding_mask, scope),
            self.training,
        )
        return routed

    def _follow_steps(self) -> None:
        """Sees to it that the steps of the objectives are those of the training."""
        if self._steps_taken is not None:
            self.objectives.set_extra_state(self._steps_taken())
            self._steps_taken = None
        _end_step_with_gradients(self.config, self.objectives)

    def _observation(self, logits: Tensor, routed: tuple[Tensor, Tensor] | None) -> Observation:
        """What objectives may look at: logits where they become scores in a way that objectives know."""
        check_dimensions(logits)
        rows = logits.reshape(-1, logits.shape[-1])
        weights, experts = (None, None) if routed is None else _choices(*routed, self.topk)
        counts = self.objectives.statistics is not None or self.objectives.evaluation_statistics is not None
        if counts and place_of(self) < 0:
            raise ValueError(
                "edl::EDTopKRouter: statistics need the number of the layer, which set_layer_number() gives a router "
                "(got none)"
            )
        return Observation(
            logits=rows if self.score_function in NATIVE_SCORES else None,
            scores=compute_routing_scores_for_aux_loss(rows, self.topk, self.score_function)[1]
            if "scores" in self._needs
            else None,
            weights=weights,
            experts=experts,
            router_gram=gram_of(self.weight) if "router_gram" in self._needs else None,
            layer=place_of(self),
        )

    def _batch(self, logits: Tensor, padding_mask: Tensor | None, scope: edl.Labels | None) -> RouterBatch:
        is_cut = self.config.sequence_parallel and self.tp_group.size() > 1
        return RouterBatch.of(
            logits,
            padding_mask,
            scope,
            num_slices=self.tp_group.size() if is_cut else 1,
            slice_index=self.tp_group.rank() if is_cut else 0,
            context_ranks=self.cp_group.size(),
        )

    def _attach(
        self, probs: Tensor, loss: Tensor, logits: Tensor, padding_mask: Tensor | None, scope: edl.Labels | None
    ) -> Tensor:
        """Megatron's weights, which carry the loss into the backward pass."""
        num_tokens = None
        if self.calculate_per_token_loss:
            num_tokens = self._tokens_per_data_rank(logits, padding_mask, scope)
            if _attach_multiplies_by_group():
                num_tokens = num_tokens / self.tp_cp_group.size()
        if self._log is None:
            self._log = RouterLog(self, self.objectives)
        self._log.count_loss()
        # Of this sum the log shows the parts: divided by infinity, it adds nothing.
        return self.attach_and_log_load_balancing_loss(
            probs, torch.inf, self.share * loss, self._log.first_name, None, valid_token_count=num_tokens
        )

    def _tokens_per_data_rank(self, logits: Tensor, padding_mask: Tensor | None, scope: edl.Labels | None) -> Tensor:
        """Tokens of this micro-batch that are no padding, the mean over data-parallel ranks."""
        num_tokens = logits.shape[:-1].numel()
        # Filled on the device: a copy from the host would wait for it.
        tokens = torch.full([], num_tokens, dtype=torch.float32, device=logits.device)
        if padding_mask is not None:
            tokens = (~padding_mask).sum(dtype=torch.float32)
        else:
            mask = None if scope is None else scope.attention_mask
            if mask is None and scope is not None and scope.padding_mask is not None:
                mask = scope.padding_mask.logical_not()
            if mask is not None:  # it covers the tensor-parallel slices
                tokens = mask.sum(dtype=torch.float32) * (tokens / mask.numel())
        torch.distributed.all_reduce(tokens, group=self.tp_dp_cp_group)
        return tokens / self.data_parallel_size


@functools.cache
def divergence_of(num_domains: Any, coeff: float, eps: float, bias_correction: bool, score_function: str) -> Objectives:
    """The objectives of the short form, the same for all routers, so that they warn once."""
    form = {"scores": score_function} if score_function in NATIVE_SCORES else {"input": "probs"}
    objective = ExpertDivergence(num_domains, eps=eps, bias_correction=bias_correction, **form)
    return Objectives({"expert_divergence": (objective, coeff)})


def _choices(probs: Tensor, routing_map: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K] of Megatron's routing [T, E], best first; where a token has fewer, weight 0 and the
    sentinel E."""
    if reads_values(routing_map) and bool((routing_map.sum(1) > top_k).any()):
        raise ValueError(
            f"edl::EDTopKRouter: a token must have at most {top_k} experts, moe_router_topk (got "
            f"{int(routing_map.sum(1).max())})"
        )
    weights, experts = probs.masked_fill(~routing_map, -torch.inf).topk(top_k, dim=1)
    is_missing = ~routing_map.gather(1, experts)
    return weights.masked_fill(is_missing, 0.0), experts.masked_fill(is_missing, routing_map.shape[1])


def _num_moe_layers(config: Any) -> int:
    """The MoE layers of the model, on all pipeline stages, counted as Megatron's log does."""
    frequency = config.moe_layer_freq
    if getattr(config, "is_hybrid_model", False) or not isinstance(frequency, (int, list)):
        got = "is_hybrid_model" if isinstance(frequency, (int, list)) else repr(frequency)
        raise ValueError(
            "edl::EDTopKRouter: an objective's weight is that of the mean over the model's MoE layers, which "
            f"moe_layer_freq must tell (got {got})"
        )
    pattern = frequency if isinstance(frequency, list) else [i % frequency == 0 for i in range(config.num_layers)]
    return max(1, sum(map(bool, pattern)))


def _check_config(config: Any) -> None:
    """Refuses what would give a wrong loss, or none, without a word."""
    if getattr(config, "mlp_chunks_for_training", 1) > 1:
        raise ValueError(
            "edl::EDTopKRouter: the router must see whole micro-batches, mlp_chunks_for_training 1 "
            f"(got {config.mlp_chunks_for_training})"
        )
    for name in ("hybrid_context_parallel", "dynamic_context_parallel"):
        if getattr(config, name, False):
            raise ValueError(
                f"edl::EDTopKRouter: sequences must be cut over one fixed context-parallel group (got {name})"
            )
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "edl::EDTopKRouter: labels are bound to the forward call of the model, which "
            "overlap_moe_expert_parallel_comm takes apart (got overlap_moe_expert_parallel_comm)"
        )
    if _is_router_captured(config):
        raise ValueError(
            "edl::EDTopKRouter: the router must run outside CUDA graphs, whose replay keeps the labels of the capture "
            f"(got cuda_graph_impl '{config.cuda_graph_impl}')"
        )


def _is_router_captured(config: Any) -> bool:
    implementation = getattr(config, "cuda_graph_impl", "none")
    if implementation == "none":
        return False
    parts = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or []
    names = {getattr(part, "name", part) for part in parts}  # an empty list: the whole layer
    return implementation == "full_iteration" or not names or bool(names & {"full_iteration", "moe", "moe_router"})


@functools.lru_cache(maxsize=1)
def _attach_multiplies_by_group() -> bool:
    """Whether Megatron's `attach_and_log_load_balancing_loss` multiplies a loss per token by the tensor·context ranks
    (0.19 on).

    Asked of the method itself, with a group of two ranks and one token.
    """
    router = types.SimpleNamespace(
        config=types.SimpleNamespace(num_layers=1, mtp_num_layers=None),
        calculate_per_token_loss=True,
        is_mtp_layer=False,
        layer_number=None,  # not logged
        tp_cp_group=types.SimpleNamespace(size=lambda: 2),
    )
    loss = torch.zeros((), requires_grad=True)
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(())
    try:
        with torch.enable_grad():
            activation = TopKRouter.attach_and_log_load_balancing_loss(
                router, torch.zeros(1, requires_grad=True), 1.0, loss, "", None, valid_token_count=1
            )
            (multiplier,) = torch.autograd.grad(activation.sum(), loss)
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale
    return multiplier.item() == 2


class _EndOfStep:
    """Megatron's `finalize_model_grads_func`, which also ends the step of the routers' objectives."""

    def __init__(self, finalize: Any) -> None:
        self.finalize = finalize
        self.objectives: list[Objectives] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.finalize(*args, **kwargs)
        for objectives in self.objectives:
            objectives.step()
        return result


def _end_step_with_gradients(config: Any, objectives: Objectives) -> None:
    """Ends the step when Megatron finishes the gradients. It sets the function after the model is built."""
    finalize = config.finalize_model_grads_func
    if finalize is None:
        if objectives.has_schedule:
            raise ValueError(
                "edl::EDTopKRouter: weights with a schedule need the model's config.finalize_model_grads_func, with "
                "which a step ends (got None)"
            )
        return
    if not isinstance(finalize, _EndOfStep):
        config.finalize_model_grads_func = finalize = _EndOfStep(finalize)
    if not any(known is objectives for known in finalize.objectives):
        finalize.objectives.append(objectives)

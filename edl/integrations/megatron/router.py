"""A Megatron router that adds the Expert Divergence loss of its layer.

How the gradient is scaled. Every rank computes the same loss and differentiates it by its own rows; the gradient of the
global batch is the sum over all ranks. Megatron sums router gradients over tensor parallelism (sequence parallel),
averages them over data·context parallelism, and scales auxiliary losses by context_parallel_size / num_microbatches.
What is missing is the number of data-parallel ranks: `averaging_ranks`. With `calculate_per_token_loss` it neither
averages nor divides by micro-batches, but divides by the tokens of the whole step: each micro-batch then weighs as many
tokens as a data-parallel rank has in it.
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
from edl.integrations.megatron.metrics import NAME, RouterLog
from edl.segments import Segments, make_segments


class EDTopKRouter(TopKRouter):
    """`TopKRouter` with the Expert Divergence loss of its layer, added while training inside `edl.domain_scope`.

    Built by Megatron from a spec that `patch_spec` has patched. The parameters and their names are those of
    `TopKRouter`.

    Args:
        config (TransformerConfig): Megatron's.
        pg_collection (ProcessGroupCollection): Megatron's.
        num_domains, coeff, eps, bias_correction, accumulate: see `patch_spec`.
        kwargs: further arguments of Megatron's own router.

    Raises:
        ValueError: a configuration under which labels cannot reach the router, or the router sees parts of sequences
            only.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        num_domains: int,
        coeff: float,
        eps: float = 1e-6,
        bias_correction: bool = False,
        accumulate: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_config(config)
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        # The default groups of an MoE layer lack this one.
        data_group = getattr(pg_collection, "dp", None) or parallel_state.get_data_parallel_group()
        self.divergence_coeff = coeff
        self.data_parallel_size = data_group.size()
        divergence = edl.ExpertDivergenceLoss(
            num_domains,
            eps=eps,
            input="logits" if self._has_native_scores() else "probs",
            scores=self.score_function if self._has_native_scores() else "softmax",
            bias_correction=bias_correction,
            sequence_group=self.tp_cp_group if self.tp_cp_group.size() > 1 else None,
            group=data_group if data_group.size() > 1 else None,
            averaging_ranks=data_group.size(),
            memory=edl.DomainMemory() if accumulate else None,
        )
        # No child module: checkpoints keep the keys of TopKRouter, and load with and without the loss.
        divergence.keep_moments()
        object.__setattr__(self, "divergence", divergence)
        self.divergence_log: RouterLog | None = None  # from the first loss on, when the layer has its number

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's routing of logits [S_len, B, E], with the loss attached to the weights.

        Logits [T, E] have token s of sequence b in row s·B + b and do not say B. It is taken from a `padding_mask`
        [S_len, B], a mask [B, S_len] of the scope, labels [B] (B below T) or [B, S_len], or weights [B, D]; with
        `cu_seqlens` from a mask, or labels [B, S_len].

        Raises:
            ValueError: logits of other dimensions, or [T, E] where B cannot be told or does not divide T.
        """
        labels = edl.current_labels() if self.training else None  # asked also where only a replay needs them
        if labels is not None and torch.is_grad_enabled():
            # Data-parallel ranks add up their moments while Megatron routes.
            divergence = self._begin_divergence(logits, padding_mask, labels)
            probs, routing_map = super().routing(logits, padding_mask=padding_mask)
            return self._attach(probs, divergence(), logits, padding_mask, labels), routing_map
        if self.training and torch.is_grad_enabled():
            warnings.warn(
                "edl::EDTopKRouter: trains outside any edl.domain_scope, without divergence loss", stacklevel=2
            )
        return super().routing(logits, padding_mask=padding_mask)

    def _begin_divergence(
        self, logits: Tensor, padding_mask: Tensor | None, labels: edl.Labels
    ) -> Callable[[], Tensor]:
        if self.divergence.memory is not None:
            _end_step_with_gradients(self.config, self.divergence.memory)
        # Segments are made inside the loss, which keeps the other ranks from waiting where the labels of one are wrong.
        return self.divergence.begin_from_segments(
            self._routing_of(logits.reshape(-1, logits.shape[-1])),
            lambda: self._segments(*self._sizes(logits, padding_mask, labels), padding_mask, labels),
        )

    def _attach(
        self, probs: Tensor, loss: Tensor, logits: Tensor, padding_mask: Tensor | None, labels: edl.Labels
    ) -> Tensor:
        """Megatron's weights, which carry the loss into the backward pass."""
        num_tokens = None
        if self.calculate_per_token_loss:
            num_tokens = self._tokens_per_data_rank(logits, padding_mask, labels)
            if _attach_multiplies_by_group():
                num_tokens = num_tokens / self.tp_cp_group.size()
        if self.divergence_log is None:
            self.divergence_log = RouterLog(self)
        self.divergence_log.add(loss, self.divergence.last_moments())
        # The value is the same on all ranks: no group to reduce it over.
        return self.attach_and_log_load_balancing_loss(
            probs, self.divergence_coeff, self.divergence_coeff * loss, NAME, None, valid_token_count=num_tokens
        )

    def _has_native_scores(self) -> bool:
        return self.score_function in ("softmax", "sigmoid")

    def _routing_of(self, logits: Tensor) -> Tensor:
        """What the loss is taken of: the logits, or Megatron's normalised scores where their function is another
        one."""
        if self._has_native_scores():
            return logits
        return compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)[1]

    def _sizes(self, logits: Tensor, padding_mask: Tensor | None, labels: edl.Labels) -> tuple[int, int]:
        """S_len and B of this rank's logits."""
        if logits.dim() == 3:
            return logits.shape[0], logits.shape[1]
        if logits.dim() != 2:
            raise ValueError(
                f"edl::EDTopKRouter: router logits must be [S_len, B, E] or [T, E] (got {list(logits.shape)})"
            )
        num_rows = logits.shape[0]
        batch_size = _told_batch_size(num_rows, padding_mask, labels)
        if batch_size < 1 or num_rows % batch_size != 0:
            raise ValueError(
                "edl::EDTopKRouter: with router logits [T, E], token s of sequence b in row s·B + b, labels must tell "
                "a B that divides T: domain_ids [B] (B below T), [B, S_len] or weights [B, D], with cu_seqlens "
                "[B, S_len]; else pass logits [S_len, B, E] "
                f"(got {num_rows} rows, domain_ids {list(labels.domain_ids.shape)}"
                f"{'' if labels.cu_seqlens is None else ' and cu_seqlens'})"
            )
        return num_rows // batch_size, batch_size

    def _segments(
        self, sequence_length: int, batch_size: int, padding_mask: Tensor | None, labels: edl.Labels
    ) -> Segments:
        """Segments of this rank's rows, row s·B + b; labels and masks of the scope are those of its context-parallel
        slice."""
        sequence_slices = self.tp_group.size() if self.config.sequence_parallel else 1
        num_rows = sequence_length * batch_size
        segments = make_segments(
            num_rows * sequence_slices,
            labels.domain_ids,
            self.divergence.num_domains,
            attention_mask=labels.attention_mask,
            padding_mask=labels.padding_mask,
            cu_seqlens=_context_parallel_boundaries(labels.cu_seqlens, self.cp_group.size()),
            batch_size=batch_size if labels.cu_seqlens is None else -1,
        )
        ids = segments.segment_ids
        if labels.cu_seqlens is None:  # [B, S_len] in whole sequences, of which this rank holds a slice
            rows = ids.view(batch_size, -1).t().chunk(sequence_slices)
            ids = rows[self.tp_group.rank()] if sequence_slices > 1 else rows[0]
        else:  # one stream of documents, of which this rank holds a slice; newer versions then cut it into samples
            ids = ids.view(sequence_slices, batch_size, sequence_length)
            ids = ids[self.tp_group.rank() if sequence_slices > 1 else 0].t()
        ids = ids.reshape(-1)
        if padding_mask is not None:
            ids = ids.masked_fill(padding_mask.reshape(-1), -1)
        return Segments(ids, segments.num_segments, segments.labels)

    def _tokens_per_data_rank(self, logits: Tensor, padding_mask: Tensor | None, labels: edl.Labels) -> Tensor:
        """Tokens of this micro-batch that are no padding, the mean over data-parallel ranks."""
        num_tokens = logits.shape[:-1].numel()
        # Filled on the device: a copy from the host would wait for it.
        tokens = torch.full([], num_tokens, dtype=torch.float32, device=logits.device)
        if padding_mask is not None:
            tokens = (~padding_mask).sum(dtype=torch.float32)
        else:
            mask = labels.attention_mask
            if mask is None and labels.padding_mask is not None:
                mask = labels.padding_mask.logical_not()
            if mask is not None:  # it covers the tensor-parallel slices
                tokens = mask.sum(dtype=torch.float32) * (tokens / mask.numel())
        torch.distributed.all_reduce(tokens, group=self.tp_dp_cp_group)
        return tokens / self.data_parallel_size


def _told_batch_size(num_rows: int, padding_mask: Tensor | None, labels: edl.Labels) -> int:
    """B where logits [T, E] leave it open; 0 where it cannot be told."""
    if padding_mask is not None and padding_mask.dim() == 2:  # [S_len, B]
        return padding_mask.shape[1]
    for mask in (labels.attention_mask, labels.padding_mask):
        if mask is not None and mask.dim() == 2:
            return mask.shape[0]
    ids = labels.domain_ids
    is_per_token = ids.dim() == 2 and not ids.is_floating_point()
    if is_per_token or (labels.cu_seqlens is None and (ids.shape[0] != num_rows or num_rows == 1)):
        return ids.shape[0]
    return 0  # one label per token or per sequence of one token; or a stream that may be cut into samples


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


def _context_parallel_boundaries(cu_seqlens: Tensor | None, slices: int) -> Tensor | None:
    """Boundaries of the documents in this rank's slice: Megatron gives every rank the same share of every (padded)
    document."""
    if cu_seqlens is None or slices == 1:
        return cu_seqlens
    # Boundaries that cannot be cut so become no boundaries, which `make_segments` refuses.
    return torch.where((cu_seqlens % slices != 0).any(), torch.full_like(cu_seqlens, -1), cu_seqlens // slices)


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
                router, torch.zeros(1, requires_grad=True), 1.0, loss, NAME, None, valid_token_count=1
            )
            (multiplier,) = torch.autograd.grad(activation.sum(), loss)
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale
    return multiplier.item() == 2


class _EndOfStep:
    """Megatron's `finalize_model_grads_func`, which also ends the step of the routers' memories."""

    def __init__(self, finalize: Any) -> None:
        self.finalize = finalize
        self.memories: list[edl.DomainMemory] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.finalize(*args, **kwargs)
        for memory in self.memories:
            memory.step()
        return result


def _end_step_with_gradients(config: Any, memory: edl.DomainMemory) -> None:
    """Ends the memory's step when Megatron finishes the gradients. It sets the function after the model is built."""
    finalize = config.finalize_model_grads_func
    if finalize is None:
        return
    if not isinstance(finalize, _EndOfStep):
        config.finalize_model_grads_func = finalize = _EndOfStep(finalize)
    if not any(known is memory for known in finalize.memories):
        finalize.memories.append(memory)

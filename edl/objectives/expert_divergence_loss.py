"""Expert Divergence Learning (arXiv 2603.00054): the loss that pushes the routing of different domains apart."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edl.labels.segments import Segments, make_segments
from edl.objectives.base import Layers, Sums
from edl.objectives.exchange import Exchange, Part, Parts
from edl.objectives.expert_divergence import ExpertDivergence, check_options, check_types
from edl.ops import checks
from edl.reduction.micro_batches import DomainMemory
from edl.reduction.ranks import Group, Ranks
from edl.routing import Observation

if TYPE_CHECKING:
    _RouterLogits = Tensor | list[Tensor] | tuple[Tensor, ...]
else:  # what TorchScript takes
    _RouterLogits = Tensor | list[Tensor]


def _check_layers(layers: list[Tensor]) -> None:
    if len(layers) == 0:
        raise ValueError("edl::expert_divergence_loss: router_logits must hold at least one layer (got an empty list)")
    first = layers[0]
    if first.dim() != 2 and first.dim() != 3:
        raise ValueError(
            "edl::expert_divergence_loss: router_logits must have the shape [T, E] or [B, S_len, E] (got "
            f"{list(first.shape)})"
        )
    for layer in layers[1:]:
        if layer.shape != first.shape or layer.dtype != first.dtype or layer.device != first.device:
            raise ValueError(
                "edl::expert_divergence_loss: all layers must have one shape, dtype and device "
                f"(got {list(first.shape)} {first.dtype} on {first.device} and {list(layer.shape)} {layer.dtype} on "
                f"{layer.device})"
            )


def _as_layers(router_logits: _RouterLogits) -> list[Tensor]:
    if not torch.jit.is_scripting() and not isinstance(router_logits, (Tensor, list, tuple)):
        raise ValueError(
            "edl::expert_divergence_loss: router_logits must be a tensor, or a list of tensors "
            f"(got {type(router_logits).__name__})"
        )
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not torch.jit.is_scripting():
        for layer in layers:
            if not isinstance(layer, Tensor):
                raise ValueError(
                    "edl::expert_divergence_loss: router_logits must hold tensors, and nothing for a layer without a "
                    f"router (got a list with {type(layer).__name__})"
                )
            checks.check_tensor("expert_divergence_loss", "router_logits", layer)
        checks.refuse_dtensor("expert_divergence_loss", *layers)
    _check_layers(layers)
    return layers


def _segments_of(
    layer: Tensor,
    domain_ids: Tensor,
    num_domains: int,
    sequence_reduction: str,
    bias_correction: bool,
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Segments:
    """What each token of a layer [T, E] or [B, S_len, E] counts for."""
    if not torch.jit.is_scripting():
        checks.check_tensor("expert_divergence_loss", "domain_ids", domain_ids)
        for name, mask in (
            ("attention_mask", attention_mask),
            ("padding_mask", padding_mask),
            ("cu_seqlens", cu_seqlens),
        ):
            if mask is not None:
                checks.check_tensor("expert_divergence_loss", name, mask)
        checks.refuse_dtensor("expert_divergence_loss", domain_ids, attention_mask, padding_mask, cu_seqlens)
    if bias_correction and domain_ids.is_floating_point():
        raise ValueError("edl::expert_divergence_loss: bias_correction needs one label per segment (got soft labels)")
    if domain_ids.device != layer.device:
        raise ValueError(
            "edl::expert_divergence_loss: domain_ids must be on the device of router_logits "
            f"(got {domain_ids.device} and {layer.device})"
        )
    batch_size = layer.shape[0] if layer.dim() == 3 else -1
    num_tokens = layer.shape[0] * layer.shape[1] if layer.dim() == 3 else layer.shape[0]
    return make_segments(
        num_tokens,
        domain_ids,
        num_domains,
        sequence_reduction,
        attention_mask,
        padding_mask,
        cu_seqlens,
        batch_size,
        "expert_divergence_loss",
    )


def expert_divergence_loss(
    router_logits: _RouterLogits,
    domain_ids: Tensor,
    num_domains: int,
    eps: float = 1e-6,
    input: str = "logits",
    scores: str = "softmax",
    sequence_reduction: str = "sequence",
    pair_reduction: str = "mean_of_logs",
    layer_reduction: str = "mean",
    bias_correction: bool = False,
    attention_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The Expert Divergence loss of the batch of one process; see `ExpertDivergenceLoss`, whose arguments these are.

    What needs a state between calls, process groups and a memory, only the module takes.
    """
    if not torch.jit.is_scripting():
        num_domains = checks.as_integer("expert_divergence_loss", "num_domains", num_domains)
        check_types("expert_divergence_loss", eps, input, scores, sequence_reduction, pair_reduction, bias_correction)
        checks.check_texts("expert_divergence_loss", layer_reduction=layer_reduction)
    check_options(
        "expert_divergence_loss", num_domains, eps, input, scores, sequence_reduction, pair_reduction, bias_correction
    )
    checks.check_choice("expert_divergence_loss", "layer_reduction", layer_reduction, ["mean", "sum", "none"])
    layers = _as_layers(router_logits)
    segments = _segments_of(
        layers[0],
        domain_ids,
        num_domains,
        sequence_reduction,
        bias_correction,
        attention_mask,
        padding_mask,
        cu_seqlens,
    )
    loss: Tensor = torch.ops.edl.expert_divergence_loss(
        layers,
        segments.segment_ids,
        segments.num_segments,
        segments.labels,
        num_domains,
        eps,
        scores if input == "logits" else "none",
        sequence_reduction,
        pair_reduction,
        layer_reduction,
        bias_correction,
    )
    return loss


_OPTIONS = [field.name for field in dataclasses.fields(ExpertDivergence) if field.name not in ("labels", "_op")]


class ExpertDivergenceLoss(nn.Module):
    """Expert Divergence: the mean over pairs of domains of -log(JSD + eps) between their average router distributions.

    Router distributions are averaged over the tokens of a sequence, and these over the sequences of a domain in the
    batch; the Jensen-Shannon divergence between the domains is pushed up. Add it as `lm_loss + alpha * load_balancing +
    beta * loss`. The result is float32 (float64 for float64 routing) whatever autocast says, and lies between -log(log
    2 + eps) and -log(eps); with fewer than two domains in the batch it is 0 with zero gradient.

    Args:
        num_domains (int): D, at least 2.
        eps (float): at least 0, default 1e-6. Domains whose divergence is far below eps are no longer pushed apart.
        input (str): "logits" (default) or "probs": what is passed to forward; checked.
        scores (str): of logits, "softmax" (default) or "sigmoid" (normalised over experts, as in DeepSeek-V3).
        sequence_reduction (str): "sequence" (default, the paper) gives every sequence the same weight in its domain,
            "token" every token.
        pair_reduction (str): "mean_of_logs" (default, the paper) or "log_of_mean".
        layer_reduction (str): "mean" (default), "sum" or "none" (a loss per layer).
        bias_correction (bool): take the gradient of the divergence less what noise between the sequences of one domain
            contributes. The value stays. Domains with fewer than two segments in the batch do not count. Default:
            False.
        sequence_group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold parts of the same
            sequences (context parallel; tensor parallel with sequence parallel). Segment sums are added over it: every
            rank of it passes the same segments, that is the same labels [B] or `cu_seqlens` of the whole sequences.
        group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that share the batch, one of each
            `sequence_group`. Domain moments are added over it, and the loss is that of all ranks' tokens, the same on
            every rank.
        averaging_ranks (int, optional): the number of ranks over which the framework averages gradients; the gradient
            is multiplied by it, once. Default: the size of `group`; required with `sequence_group`. DDP or FSDP with
            context parallel: data ranks times context ranks; tensor parallel with sequence parallel, which sums: data
            ranks; Megatron: data ranks, as its loss scale carries the context ranks.
        memory (DomainMemory, optional): carries the moments over the micro-batches of a step; of this loss alone. It
            may be assigned later, and None frees it for another loss.

    With groups: **after the framework's own averaging, the gradients of the parameters equal those of one process that
    saw the whole batch.** There is one all-reduce per seam forward, for all layers together, and none backward. All
    ranks must call with the same layers, experts, domains, dtype and options; the first call outside torch.compile
    compares them. A rank that finds an error takes part with NaN and raises afterwards; on the CPU, or with
    EDL_CHECK=1, all ranks raise and name it. Compiles without graph breaks, but not together with a memory; groups and
    memory are not for TorchScript.

    Raises:
        ValueError: an option outside its range, or options that exclude each other; no such groups.

    Source: arXiv 2603.00054. Where the paper is silent we chose: the natural logarithm, eps = 1e-6, the full softmax
        before top-k, the mean over layers. The bias correction is ours; the paper has none.
    """

    def __init__(
        self,
        num_domains: int,
        eps: float = 1e-6,
        input: str = "logits",
        scores: str = "softmax",
        sequence_reduction: str = "sequence",
        pair_reduction: str = "mean_of_logs",
        layer_reduction: str = "mean",
        bias_correction: bool = False,
        sequence_group: Group | None = None,
        group: Group | None = None,
        averaging_ranks: int | None = None,
        memory: DomainMemory | None = None,
    ) -> None:
        super().__init__()
        num_domains = checks.as_integer("expert_divergence_loss", "num_domains", num_domains)
        check_types("expert_divergence_loss", eps, input, scores, sequence_reduction, pair_reduction, bias_correction)
        checks.check_texts("expert_divergence_loss", layer_reduction=layer_reduction)
        check_options(
            "expert_divergence_loss",
            num_domains,
            eps,
            input,
            scores,
            sequence_reduction,
            pair_reduction,
            bias_correction,
        )
        checks.check_choice("expert_divergence_loss", "layer_reduction", layer_reduction, ["mean", "sum", "none"])
        self.num_domains = num_domains
        self.eps = float(eps)
        self.input = input
        self.scores = scores
        self.sequence_reduction = sequence_reduction
        self.pair_reduction = pair_reduction
        self.layer_reduction = layer_reduction
        self.bias_correction = bias_correction
        self._ranks = Ranks(sequence_group, group, averaging_ranks)
        self._is_alone = sequence_group is None and group is None and averaging_ranks is None
        self._values_checked = False
        self._exchange = Exchange("expert_divergence_loss", self._ranks)
        self._made: tuple[list[Any], ExpertDivergence] | None = None  # of these options
        self._keeps_moments = False  # for `pairs_and_nats`
        self._sums: Sums | None = None
        self.memory = memory

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("sequence_group", "group", "averaging_ranks"):
            raise ValueError(
                f"edl::expert_divergence_loss: {name} must be given when the loss is made (got an assignment)"
            )
        if name == "memory":
            if value is not None:
                if not isinstance(value, DomainMemory):
                    raise ValueError(
                        f"edl::expert_divergence_loss: memory must be a DomainMemory (got {type(value).__name__})"
                    )
                value.serve(self)
            former = getattr(self, "memory", None)
            if former is not None and former is not value:
                former.release(self)
        super().__setattr__(name, value)

    def forward(
        self,
        router_logits: _RouterLogits,
        domain_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a batch.

        Args:
            router_logits (Tensor[T, E], Tensor[B, S_len, E], or a list or tuple of them): one tensor per MoE layer, of
                one shape. Token s of sequence b is row b·S_len + s.
            domain_ids (Tensor): [B] one label per sequence, [B, S_len] one per token, int32 or int64 in [-1, D), -1 =
                not counted; floating [B, D] weights. With cu_seqlens also [N] per document or [T] per token; with
                sequence_reduction="token" also [T].
            attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
            padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents, starting at 0.

        Returns:
            Tensor: The loss, a scalar, or Tensor[L] with layer_reduction="none".

        Raises:
            ValueError: wrong shapes, dtypes or devices, both masks; on the CPU, probabilities passed as logits or the
                reverse.
            IndexError: on the CPU, a label outside [-1, D) or a mask value other than 0 and 1 (on CUDA the loss becomes
                NaN).
        """
        if not torch.jit.is_scripting():
            if not self._is_alone or self.memory is not None or self._keeps_moments:
                return self.begin(router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens)()
            self._check_values_once(router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens)
        elif not self._is_alone or self.memory is not None:
            raise ValueError("edl::expert_divergence_loss: groups and memory are not for TorchScript")
        return self._local_loss(router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens)

    def _local_loss(
        self,
        router_logits: _RouterLogits,
        domain_ids: Tensor,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """The loss of this process's micro-batch alone."""
        return expert_divergence_loss(
            router_logits,
            domain_ids,
            self.num_domains,
            self.eps,
            self.input,
            self.scores,
            self.sequence_reduction,
            self.pair_reduction,
            self.layer_reduction,
            self.bias_correction,
            attention_mask,
            padding_mask,
            cu_seqlens,
        )

    @torch.jit.unused
    def from_segments(self, router_logits: _RouterLogits, segments: Segments | Callable[[], Segments]) -> Tensor:
        """Computes the loss of tokens whose segments are known, for frameworks with an order of tokens of their own.

        Args:
            router_logits (Tensor[T, E], or a list or tuple of them): one per layer.
            segments (edl.segments.Segments, or a function that makes them): what each row counts for. Make them in a
                function where ranks share the loss: an error in it then keeps no other rank waiting.

        Returns:
            The loss, as `forward`.

        Raises:
            ValueError, IndexError: as `forward`.
        """
        return self.begin_from_segments(router_logits, segments)()

    @torch.jit.unused
    def begin(
        self,
        router_logits: _RouterLogits,
        domain_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """Begins the loss of a batch: the all-reduce over `group` runs while the caller goes on.

            finish = divergence.begin(output.router_logits, domain_ids)
            lm_loss = F.cross_entropy(output.logits, targets)
            loss = lm_loss + beta * finish()

        Args:
            router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens: as `forward` takes them.

        Returns:
            A function that waits for the other ranks and returns the loss. Every rank must call it, also after an error
            of its own: others may wait for its sentence. With a memory the ranks are waited for here.

        Raises:
            ValueError, IndexError: as `forward`; at the first call, and without groups, some from here, on all ranks;
                else from the function, so that a rank with an error goes on beside the others until all have it.
            RuntimeError: from the function: `router_logits` or labels were changed in place since.
        """

        def segments_of(layer: Tensor) -> Segments:
            self._check_values_once(router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens)
            return _segments_of(
                layer,
                domain_ids,
                self.num_domains,
                self.sequence_reduction,
                self.bias_correction,
                attention_mask,
                padding_mask,
                cu_seqlens,
            )

        return self._begin_jointly(router_logits, segments_of)

    @torch.jit.unused
    def begin_from_segments(
        self, router_logits: _RouterLogits, segments: Segments | Callable[[], Segments]
    ) -> Callable[[], Tensor]:
        """`begin` for tokens whose segments are known.

        Args:
            router_logits, segments: as `from_segments` takes them.

        Returns:
            A function, as `begin` does.

        Raises:
            ValueError, IndexError: as `begin`.
        """
        return self._begin_jointly(router_logits, lambda layer: segments() if callable(segments) else segments)

    @torch.jit.unused
    def keep_moments(self) -> None:
        """Lets `pairs_and_nats` tell of every loss from now on."""
        self._keeps_moments = True

    @torch.jit.unused
    def pairs_and_nats(self) -> tuple[Tensor, Tensor]:
        """What the last loss compared, for logs; needs `keep_moments` before.

        Returns:
            The number of pairs of domains, without which the loss is 0; and their Jensen-Shannon divergence in nats,
            the mean over pairs and layers, NaN without a pair. Scalars on the device of the loss, of all ranks and
            micro-batches that it spans.

        Raises:
            ValueError: no loss since.
        """
        if self._sums is None:
            raise ValueError(
                "edl::expert_divergence_loss: pairs_and_nats() tells of a loss after keep_moments() (got no such loss)"
            )
        measures = self._objective().measures(self._sums)
        return measures["pairs"], measures["nats"]

    @torch.jit.unused
    def allocate_memory(self, num_layers: int, num_experts: int) -> None:
        """Fixes the size of the memory's state before the first micro-batch does, for what loads a state into the
        tensors of a new model, as torch.distributed.checkpoint.

        Args:
            num_layers (int): L, the MoE layers of the loss.
            num_experts (int): E.

        Raises:
            ValueError: no memory, a number below 1, other numbers than are known already.
        """
        if self.memory is None:
            raise ValueError("edl::expert_divergence_loss: allocate_memory() needs a memory (got none)")
        num_layers = checks.as_integer("expert_divergence_loss", "num_layers", num_layers, lowest=1)
        num_experts = checks.as_integer("expert_divergence_loss", "num_experts", num_experts, lowest=1)
        no_segment = torch.full([1], -1, dtype=torch.int32)
        num_segments = self.num_domains if self.sequence_reduction == "token" else 1
        segments = Segments(no_segment, num_segments, torch.zeros(num_segments, dtype=torch.int64))
        layers = [torch.full([1, num_experts], 1.0 / num_experts)] * num_layers
        self._exchange.reserve([self._part(layers, segments)], self.memory)

    @torch.jit.unused
    def _objective(self) -> ExpertDivergence:
        """The loss as an objective, with the options as they are now."""
        options = [getattr(self, name) for name in _OPTIONS]
        if self._made is None or options != self._made[0]:
            self._made = options, ExpertDivergence(*options, _op="expert_divergence_loss")
        return self._made[1]

    @torch.jit.unused
    def _part(self, layers: list[Tensor], segments: Segments) -> Part:
        if not isinstance(segments, Segments):
            raise ValueError(
                "edl::expert_divergence_loss: segments must be edl.segments.Segments, or a function that makes them "
                f"(got {type(segments).__name__})"
            )
        checks.check_tensors("expert_divergence_loss", segment_ids=segments.segment_ids, labels=segments.labels)
        reads_logits = self.input == "logits"
        observations = [Observation(logits=x) if reads_logits else Observation(scores=x) for x in layers]
        # Under a name that tells the ranks of what a part does not hold.
        return Part(f"layer_reduction={self.layer_reduction!r}", self._objective(), Layers(observations), segments)

    @torch.jit.unused
    def _begin_jointly(
        self, router_logits: _RouterLogits, segments_of: Callable[[Tensor], Segments]
    ) -> Callable[[], Tensor]:
        """Begins the loss over all ranks and micro-batches; `segments_of` makes the segments of a layer."""
        memory = self.memory if self.memory is not None and self.memory.in_use else None
        if memory is not None:
            memory.serve(self)  # a copy's memory, or a loss's copy, comes here without an assignment

        def parts() -> Parts:
            layers = _as_layers(router_logits)
            return [self._part(layers, segments_of(layers[0]))]

        wait = self._exchange.begin(parts, memory)

        def finish() -> Tensor:
            (part,), (sums,) = wait()
            routing = part.layers[0].logits if self.input == "logits" else part.layers[0].scores
            assert routing is not None
            if self._keeps_moments:
                self._sums = {name: x.detach() for name, x in sums.items()}
            losses = part.objective.formula(sums)
            if routing.dtype != torch.float64:
                losses = losses.float()
            if self.layer_reduction == "none":
                return losses
            return losses.sum() if self.layer_reduction == "sum" else losses.mean()

        return finish

    @torch.jit.unused
    def _check_values_once(
        self,
        router_logits: _RouterLogits,
        domain_ids: Tensor,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        """Lets the CPU kernels look at the values of the first eager call elsewhere: logits or probabilities, labels,
        masks."""
        layer = router_logits[0] if isinstance(router_logits, (list, tuple)) and router_logits else router_logits
        if self._values_checked or torch.compiler.is_compiling() or not isinstance(layer, Tensor) or not layer.is_cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        self._values_checked = True
        on_cpu: list[Any] = [
            None if x is None else x.cpu() for x in (domain_ids, attention_mask, padding_mask, cu_seqlens)
        ]
        with torch.no_grad():
            self._local_loss(layer.detach().cpu(), *on_cpu)

    def extra_repr(self) -> str:
        return (
            f"num_domains={self.num_domains}, eps={self.eps:g}, input={self.input!r}, scores={self.scores!r}, "
            f"sequence_reduction={self.sequence_reduction!r}, pair_reduction={self.pair_reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}, bias_correction={self.bias_correction}"
        )

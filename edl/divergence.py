"""Expert Divergence Learning (arXiv 2603.00054): the loss that pushes the routing of different domains apart."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from edl import ops
from edl.divergence_log import pairs_and_nats
from edl.reduction.micro_batches import DomainMemory, Moments
from edl.reduction.ranks import Group, Ranks
from edl.reduction.share import share
from edl.segments import Segments, make_segments

if TYPE_CHECKING:
    _RouterLogits = Tensor | list[Tensor] | tuple[Tensor, ...]
else:  # what TorchScript takes
    _RouterLogits = Tensor | list[Tensor]


def _check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"edl::expert_divergence_loss: {name} must be one of {choices} (got '{value}')")


@torch.jit.unused
def _check_types(
    eps: Any,
    input: Any,
    scores: Any,
    sequence_reduction: Any,
    pair_reduction: Any,
    layer_reduction: Any,
    bias_correction: Any,
) -> None:
    op = "expert_divergence_loss"
    ops._check_numbers(op, eps=eps)
    ops._check_texts(op, input=input, scores=scores, sequence_reduction=sequence_reduction)
    ops._check_texts(op, pair_reduction=pair_reduction, layer_reduction=layer_reduction)
    ops._check_flags(op, bias_correction=bias_correction)


def _check_options(
    num_domains: int,
    eps: float,
    input: str,
    scores: str,
    sequence_reduction: str,
    pair_reduction: str,
    layer_reduction: str,
    bias_correction: bool,
) -> None:
    if num_domains < 2:
        raise ValueError(
            "edl::expert_divergence_loss: num_domains must be at least 2, or there is no pair to push apart (got "
            f"{num_domains})"
        )
    if not (eps >= 0.0 and eps < float("inf")):
        raise ValueError(f"edl::expert_divergence_loss: eps must be finite and not negative (got {eps})")
    _check_choice("input", input, ["logits", "probs"])
    _check_choice("scores", scores, ["softmax", "sigmoid"])
    _check_choice("sequence_reduction", sequence_reduction, ["sequence", "token"])
    _check_choice("pair_reduction", pair_reduction, ["mean_of_logs", "log_of_mean"])
    _check_choice("layer_reduction", layer_reduction, ["mean", "sum", "none"])
    if bias_correction and (sequence_reduction != "sequence" or pair_reduction != "mean_of_logs"):
        raise ValueError(
            "edl::expert_divergence_loss: bias_correction needs sequence_reduction='sequence' and "
            f"pair_reduction='mean_of_logs' (got '{sequence_reduction}' and '{pair_reduction}')"
        )


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
            ops._check_tensor("expert_divergence_loss", "router_logits", layer)
        ops._refuse_dtensor("expert_divergence_loss", *layers)
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
        ops._check_tensor("expert_divergence_loss", "domain_ids", domain_ids)
        for name, mask in (
            ("attention_mask", attention_mask),
            ("padding_mask", padding_mask),
            ("cu_seqlens", cu_seqlens),
        ):
            if mask is not None:
                ops._check_tensor("expert_divergence_loss", name, mask)
        ops._refuse_dtensor("expert_divergence_loss", domain_ids, attention_mask, padding_mask, cu_seqlens)
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
        num_tokens, domain_ids, num_domains, sequence_reduction, attention_mask, padding_mask, cu_seqlens, batch_size
    )


class Layout(NamedTuple):
    """What all ranks must agree on; segments may differ in number between ranks of `group`, and from call to call."""

    layers: int
    domains: int
    experts: int
    dtype: torch.dtype  # of the segment sums
    device: str
    averaging_ranks: int
    options: str


def _versions(tensors: list[Tensor]) -> list[int]:
    """Tells tensors that were changed in place; where there is no telling, nothing."""
    if torch.compiler.is_compiling():
        return []
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


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
        num_domains = ops._as_integer("expert_divergence_loss", "num_domains", num_domains)
        _check_types(eps, input, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction)
    _check_options(
        num_domains, eps, input, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction
    )
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
    loss: Tensor = torch.ops.edl._expert_divergence_loss(
        layers,
        segments.segment_ids,
        segments.num_segments,
        segments.labels,
        num_domains,
        scores if input == "logits" else "none",
        sequence_reduction,
        eps,
        pair_reduction,
        bias_correction,
        layer_reduction,
    )
    return loss


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
        scores (str): how logits become a distribution: "softmax" (default) or "sigmoid" (normalised over experts).
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
            ranks;
                Megatron:
            data ranks, as its loss scale carries the context ranks.
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
        before
    top-k, the mean over layers. The bias correction is ours; the paper has none.
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
        num_domains = ops._as_integer("expert_divergence_loss", "num_domains", num_domains)
        _check_types(eps, input, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction)
        _check_options(
            num_domains, eps, input, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction
        )
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
        self._keeps_moments = False  # for `pairs_and_nats`
        self._moments: Moments | None = None
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
            The loss: a scalar, or Tensor[L] with layer_reduction="none".

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
    def last_moments(self) -> Moments:
        """What `pairs_and_nats` is of, for logs that look later; needs `keep_moments` before.

        Raises:
            ValueError: no loss since.
        """
        if self._moments is None:
            raise ValueError(
                "edl::expert_divergence_loss: pairs_and_nats() tells of a loss after keep_moments() (got no such loss)"
            )
        return self._moments

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
        pairs, nats = pairs_and_nats([self.last_moments()])
        return pairs[0], nats[0]

    @torch.jit.unused
    def _begin_jointly(
        self, router_logits: _RouterLogits, segments_of: Callable[[Tensor], Segments]
    ) -> Callable[[], Tensor]:
        """Begins the loss over all ranks and micro-batches; `segments_of` makes the segments of a layer.

        Sums over the tokens of a segment are added over `sequence_group`, moments of whole segments over `group` and
        micro-batches; the loss is a formula of these. Whatever goes wrong on this rank, other ranks wait for its part:
        it is raised once they have it.
        """
        ranks = self._ranks
        memory = self.memory if self.memory is not None and self.memory.in_use else None
        if memory is not None:
            memory.serve(self)  # a copy's memory, or a loss's copy, comes here without an assignment
        before = None if memory is None else memory.before_pass()

        layers, segments, sums, counts, layout, problem = self._sum_own_segments(router_logits, segments_of, memory)
        problem = ranks.agree(layout, lambda: "nothing" if before is None else before.described(), problem)
        labels = None if segments is None else segments.labels
        sums, counts, problem = ranks.sum_units(sums, counts, labels, problem, self._stand_in_segments)

        own, problem = self._moments_of(sums, counts, labels, problem)
        # In the second of two passes what was collected is the sum already.
        group = None if memory is not None and memory.has_collected else ranks.group
        wait = ranks.start_sum(group, [own], problem)
        shape = (len(layers), self.num_domains, sums.shape[-1])
        carried: Moments | None = None
        if memory is not None:  # micro-batches are carried in the order in which they begin
            total, problem = wait()
            if problem is None:
                carried = memory.add(before, self._as_moments(total, shape))
            wait = lambda: (total, problem)
        read = [] if segments is None else [*layers, segments.segment_ids, segments.labels]
        versions = _versions(read)

        def finish() -> Tensor:
            total, problem = wait()
            if problem is not None:
                raise problem
            if _versions(read) != versions:
                raise RuntimeError(
                    "edl::expert_divergence_loss: router_logits and labels must stay as they are until a loss that "
                    "was begun is finished (got one that was changed in place)"
                )
            moments = self._as_moments(total, shape) if carried is None else carried
            if self._keeps_moments:
                self._moments = moments
            worth = None if memory is None else moments.worth
            loss: Tensor = torch.ops.edl._expert_divergence_of_moments(
                share(own, moments.packed, float(ranks.averaging_ranks), worth),
                *shape,
                self.eps,
                self.pair_reduction,
                self.bias_correction,
                self.layer_reduction,
                sums.dtype,
            )
            return loss

        return finish

    @torch.jit.unused
    def _sum_own_segments(
        self,
        router_logits: _RouterLogits,
        segments_of: Callable[[Tensor], Segments],
        memory: DomainMemory | None,
    ) -> tuple[list[Tensor], Segments | None, Tensor, Tensor, Layout | None, Exception | None]:
        """Layers, their segments, sums [L, S, E] and counts [S] over this rank's tokens, what ranks must agree on, and
        what went wrong."""
        layers: list[Tensor] = []
        segments: Segments | None = None
        try:
            layers = _as_layers(router_logits)
            if memory is not None:
                memory.refuse_without_values(layers[0])
            segments = segments_of(layers[0])
            if not isinstance(segments, Segments):
                raise ValueError(
                    "edl::expert_divergence_loss: segments must be edl.segments.Segments, or a function that makes "
                    f"them (got {type(segments).__name__})"
                )
            ops._check_tensors("expert_divergence_loss", segment_ids=segments.segment_ids, labels=segments.labels)
            scores = self.scores if self.input == "logits" else "none"
            sums, counts = torch.ops.edl._segment_sums(layers, segments.segment_ids, segments.num_segments, scores)
            if self._ranks.compares_values(counts) and self.sequence_reduction == "sequence":
                # Labels are looked at with the domains; the ranks of sequence_group must hear of wrong ones before.
                ops.domain_moments(torch.ones_like(counts).unsqueeze(1), counts, segments.labels, self.num_domains)
            if torch.compiler.is_compiling():
                return layers, segments, sums, counts, None, None
            sizes = len(layers), self.num_domains, sums.shape[-1]
            averaging_ranks, options = self._ranks.averaging_ranks, self.extra_repr()
            layout = Layout(*sizes, sums.dtype, sums.device.type, averaging_ranks, options)
            return layers, segments, sums, counts, layout, None
        except Exception as error:
            nothing = torch.empty(0)
            return layers, segments, nothing, nothing, None, error

    @torch.jit.unused
    def _moments_of(
        self, sums: Tensor, counts: Tensor, labels: Tensor | None, problem: Exception | None
    ) -> tuple[Tensor, Exception | None]:
        """Packed domain moments of this rank, and what went wrong; those of a rank that has none to give stand in."""
        if problem is None:
            try:
                moments: Tensor = torch.ops.edl._packed_moments(
                    sums, counts, labels, self.num_domains, self.sequence_reduction, self.bias_correction
                )
                return moments, None
            except Exception as error:
                problem = error
        no_sums, no_counts = self._stand_in_segments(0)
        no_labels = no_counts.new_zeros(0, dtype=torch.int64)
        stand_in: Tensor = torch.ops.edl._packed_moments(
            no_sums, no_counts, no_labels, self.num_domains, "sequence", self.bias_correction
        )
        return stand_in, problem

    @torch.jit.unused
    def _stand_in_segments(self, num_segments: int) -> tuple[Tensor, Tensor]:
        """Segment sums and counts of a rank that has none to give, in the layout of its last call."""
        layout: Layout | None = self._ranks.layout  # type: ignore[assignment]
        assert layout is not None
        shape = layout.layers, num_segments, layout.experts
        sums = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        return sums, sums.new_zeros(num_segments)

    @torch.jit.unused
    def _as_moments(self, packed: Tensor, shape: tuple[int, int, int]) -> Moments:
        """Of one micro-batch."""
        return Moments(packed, shape, self.bias_correction, packed.new_ones(()))

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

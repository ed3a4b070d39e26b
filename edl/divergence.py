"""Expert Divergence Learning (arXiv 2603.00054): the loss that pushes the routing of different domains apart."""

from typing import List, Optional, Union

import torch
from torch import Tensor, nn

from edl import ops
from edl.segments import make_segments


def _check_choice(name: str, value: str, choices: List[str]) -> None:
    if value not in choices:
        raise ValueError(f"edl::expert_divergence_loss: {name} must be one of {choices} (got '{value}')")


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
    if num_domains < 1:
        raise ValueError(f"edl::expert_divergence_loss: num_domains must be at least 1 (got {num_domains})")
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
            "pair_reduction='mean_of_logs' "
            f"(got '{sequence_reduction}' and '{pair_reduction}')"
        )


def _check_layers(layers: List[Tensor]) -> None:
    if len(layers) == 0:
        raise ValueError("edl::expert_divergence_loss: router_logits must hold at least one layer (got an empty list)")
    first = layers[0]
    for layer in layers:
        if layer.dim() != 2 and layer.dim() != 3:
            raise ValueError(
                f"edl::expert_divergence_loss: router_logits must have the shape [T, E] or [B, S_len, E] (got {list(layer.shape)})"
            )
        if layer.shape != first.shape or layer.dtype != first.dtype or layer.device != first.device:
            raise ValueError(
                "edl::expert_divergence_loss: all layers must have one shape, dtype and device "
                f"(got {list(first.shape)} {first.dtype} and {list(layer.shape)} {layer.dtype})"
            )


def expert_divergence_loss(
    router_logits: Union[Tensor, List[Tensor]],
    domain_ids: Tensor,
    num_domains: int,
    eps: float = 1e-6,
    input: str = "logits",
    scores: str = "softmax",
    sequence_reduction: str = "sequence",
    pair_reduction: str = "mean_of_logs",
    layer_reduction: str = "mean",
    bias_correction: bool = False,
    attention_mask: Optional[Tensor] = None,
    padding_mask: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> Tensor:
    """The Expert Divergence loss of a batch; see `ExpertDivergenceLoss`, whose arguments these are."""
    _check_options(
        num_domains, eps, input, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction
    )
    if isinstance(router_logits, Tensor):
        layers = [router_logits]
    else:
        layers = [layer for layer in router_logits]
    if not torch.jit.is_scripting():
        for layer in layers:
            if not isinstance(layer, Tensor):
                raise ValueError(
                    "edl::expert_divergence_loss: router_logits must be a tensor, or a list of tensors "
                    f"(got a list with {type(layer).__name__})"
                )
        ops._refuse_dtensor("expert_divergence_loss", *layers, domain_ids, attention_mask, padding_mask, cu_seqlens)
    _check_layers(layers)
    if bias_correction and domain_ids.is_floating_point():
        raise ValueError("edl::expert_divergence_loss: bias_correction needs one label per segment (got soft labels)")
    first = layers[0]
    if domain_ids.device != first.device:
        raise ValueError(
            "edl::expert_divergence_loss: domain_ids must be on the device of router_logits "
            f"(got {domain_ids.device} and {first.device})"
        )
    batch_size = first.shape[0] if first.dim() == 3 else -1
    num_tokens = first.shape[0] * first.shape[1] if first.dim() == 3 else first.shape[0]
    segments = make_segments(
        num_tokens, domain_ids, num_domains, sequence_reduction, attention_mask, padding_mask, cu_seqlens, batch_size
    )

    sums: List[Tensor] = []
    counts: List[Tensor] = []
    for layer in layers:
        layer_sums, layer_counts = ops.aggregate_routing(
            layer.flatten(0, 1) if layer.dim() == 3 else layer,
            segments.segment_ids,
            segments.num_segments,
            scores if input == "logits" else "none",
        )
        sums.append(layer_sums)
        counts.append(layer_counts)
    stacked = torch.stack(sums) if len(sums) > 1 else sums[0].unsqueeze(0)
    if sequence_reduction == "token":
        domain_sums = stacked.double()
        squares = domain_sums.new_empty([0])
        domain_counts = counts[0].double().expand(len(layers), num_domains)
    else:
        domain_sums, squares, domain_counts = ops.domain_moments(
            stacked, counts[0], segments.labels, num_domains, bias_correction
        )
    loss = ops.expert_divergence(domain_sums, squares, domain_counts, eps, pair_reduction, bias_correction)
    loss = loss.to(stacked.dtype)
    if layer_reduction == "mean":
        return loss.mean()
    if layer_reduction == "sum":
        return loss.sum()
    return loss


class ExpertDivergenceLoss(nn.Module):
    """Expert Divergence: the mean over pairs of domains of -log(JSD + eps) between their average router distributions.

    Router distributions are averaged over the tokens of a sequence, and these over the sequences of a domain in the batch; the
    Jensen-Shannon divergence between the domains is pushed up. Add it as `lm_loss + alpha * load_balancing + beta * loss`.
    The result is float32 (float64 for float64 routing) whatever autocast says, and lies between -log(log 2 + eps) and
    -log(eps); with fewer than two domains in the batch it is 0 with zero gradient.

    Args:
        num_domains (int): D, at least 1.
        eps (float): at least 0, default 1e-6. Domains whose divergence is far below eps are no longer pushed apart.
        input (str): "logits" (default) or "probs": what is passed to forward; checked.
        scores (str): how logits become a distribution: "softmax" (default) or "sigmoid" (normalised over experts).
        sequence_reduction (str): "sequence" (default, the paper) gives every sequence the same weight in its domain, "token"
            every token.
        pair_reduction (str): "mean_of_logs" (default, the paper) or "log_of_mean".
        layer_reduction (str): "mean" (default), "sum" or "none" (a loss per layer).
        bias_correction (bool): take the gradient of the divergence less what noise between the sequences of one domain
            contributes. The value stays. Domains with fewer than two segments in the batch do not count. Default: False.

    Raises:
        ValueError: an option outside its range, or options that exclude each other.

    Source: arXiv 2603.00054. Where the paper is silent we chose: the natural logarithm, eps = 1e-6, the full softmax before
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
    ) -> None:
        super().__init__()
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
        self._values_checked = False

    def forward(
        self,
        router_logits: Union[Tensor, List[Tensor]],
        domain_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        padding_mask: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Tensor:
        """Computes the loss of a batch.

        Args:
            router_logits (Tensor[T, E], Tensor[B, S_len, E], or a list or tuple of them): one tensor per MoE layer, of one
                shape. Token s of sequence b is row b·S_len + s.
            domain_ids (Tensor): [B] one label per sequence, [B, S_len] one per token, int32 or int64 in [-1, D), -1 = not
                counted; floating [B, D] weights. With cu_seqlens also [N] per document or [T] per token; with
                sequence_reduction="token" also [T].
            attention_mask (Tensor[B, S_len] or Tensor[T], optional): 1 = keep, 0 = padding (Hugging Face's sense).
            padding_mask (Tensor[B, S_len] or Tensor[T], optional): True = padding (Megatron's sense).
            cu_seqlens (Tensor[N + 1], optional): boundaries of packed documents, starting at 0.

        Returns:
            The loss: a scalar, or Tensor[L] with layer_reduction="none".

        Raises:
            ValueError: wrong shapes, dtypes or devices, both masks; on the CPU, probabilities passed as logits or the reverse.
            IndexError: on the CPU, a label outside [-1, D) or a mask value other than 0 and 1 (on CUDA the loss becomes NaN).
        """
        if not torch.jit.is_scripting():
            self._check_values_once(router_logits, domain_ids, attention_mask, padding_mask, cu_seqlens)
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
    def _check_values_once(
        self,
        router_logits: Union[Tensor, List[Tensor]],
        domain_ids: Tensor,
        attention_mask: Optional[Tensor],
        padding_mask: Optional[Tensor],
        cu_seqlens: Optional[Tensor],
    ) -> None:
        """Lets the CPU kernels look at the values of the first eager call elsewhere: logits or probabilities, labels, masks."""
        layer = router_logits if isinstance(router_logits, Tensor) else router_logits[0] if router_logits else None
        if self._values_checked or layer is None or not layer.is_cuda or torch.compiler.is_compiling():
            return
        if torch.cuda.is_current_stream_capturing():
            return
        self._values_checked = True
        on_cpu = [None if x is None else x.cpu() for x in (domain_ids, attention_mask, padding_mask, cu_seqlens)]
        with torch.no_grad():
            self.forward(layer.detach().cpu(), *on_cpu)

    def extra_repr(self) -> str:
        return (
            f"num_domains={self.num_domains}, eps={self.eps:g}, input={self.input!r}, scores={self.scores!r}, "
            f"sequence_reduction={self.sequence_reduction!r}, pair_reduction={self.pair_reduction!r}, "
            f"layer_reduction={self.layer_reduction!r}, bias_correction={self.bias_correction}"
        )

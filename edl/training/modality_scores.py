"""Soft scores of modality for tokens, of where they lie among the hidden states of each modality."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edl.ops import checks
from edl.reduction.ranks import Group, Ranks, reads_values

_ROWS = 1024  # that are summed in float64 at once


class GaussianModalityScores(nn.Module):
    """How much a token belongs to each modality: the likelihoods of its hidden state under a Gaussian of each.

    Second-hand: arXiv 2604.23996 (SMoES), from notes: Gaussians with diagonal covariance, whose means and variances are
    running averages, and softmax over modalities of their log-likelihoods / temperature. It gives what
    `ModalityMutualInformation` and `ModalityDivergence` take as labels. Ours: the averages are those of means and of
    variances of a step's tokens, over all its micro-batches and ranks; the first step with tokens of a modality sets
    them; until all modalities have been seen all scores are 1 / M, of which nothing can be learned. One set of hidden
    states serves all layers of a call, as labels do; the paper has one for each layer.

        scores = edl.GaussianModalityScores(num_modalities=2, hidden_size=H, group=group)
        ...
        scores.observe(hidden, modality_ids)
        total, values = objectives(routings, modality_ids=scores(hidden))
        ...
        optimizer.step()
        objectives.step()
        scores.step()

    A forward pass changes nothing, so that replays of activation checkpointing see what the first pass saw: `observe`
    adds up what it is shown, once for each micro-batch, and `step` moves the averages after the optimizer's step.
    `state_dict` holds the averages.

    Args:
        num_modalities (int): M, at least 2.
        hidden_size (int): H.
        decay (float): of the running averages, in [0, 1). Default: 0.99.
        temperature (float, optional): above 0. Default: H / 2.
        eps (float): added to variances, above 0. Default: 1e-6.
        group (ProcessGroup or DeviceMesh of one dimension, optional): ranks whose tokens count together.

    Raises:
        ValueError: an option outside its range, no such group.

    Source: arXiv 2604.23996, second-hand. Its other estimator, from attention weights, is left out.
    """

    means: Tensor
    variances: Tensor
    is_known: Tensor
    _pending: Tensor

    def __init__(
        self,
        num_modalities: int,
        hidden_size: int,
        decay: float = 0.99,
        temperature: float | None = None,
        eps: float = 1e-6,
        group: Group | None = None,
    ) -> None:
        super().__init__()
        op = "GaussianModalityScores"
        self.num_modalities = checks.as_integer(op, "num_modalities", num_modalities, lowest=2)
        self.hidden_size = checks.as_integer(op, "hidden_size", hidden_size, lowest=1)
        self.temperature = self.hidden_size / 2 if temperature is None else temperature
        checks.check_numbers(op, decay=decay, temperature=self.temperature, eps=eps)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"edl::{op}: decay must be in [0, 1) (got {decay})")
        for name, number in (("temperature", self.temperature), ("eps", eps)):
            if not 0.0 < number < math.inf:
                raise ValueError(f"edl::{op}: {name} must be finite and above 0 (got {number})")
        self.decay, self.eps = decay, eps
        self._ranks = Ranks(None, group, None)
        self.register_buffer("means", torch.zeros(self.num_modalities, self.hidden_size))
        self.register_buffer("variances", torch.ones(self.num_modalities, self.hidden_size))
        self.register_buffer("is_known", torch.zeros(self.num_modalities, dtype=torch.bool))
        # Of each modality the number of tokens, their sums and the sums of their squares, of the running step.
        size = self.num_modalities, 1 + 2 * self.hidden_size
        self.register_buffer(
            "_pending",
            torch.zeros(size, dtype=torch.float64),
            persistent=False,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GaussianModalityScores":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for name, buffer in before.items():
            moved = self.get_buffer(name)
            # 16 bits would not resolve the steps of an average, and sums need float64.
            if name == "_pending" or moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The scores of tokens; changes nothing.

        Args:
            hidden (Tensor[..., H]): their hidden states, floating-point.

        Returns:
            Tensor[..., M], float32 (float64 for float64 hidden states), which adds up to 1; without gradient.

        Raises:
            ValueError: another shape or type.
        """
        self._check("hidden", hidden)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        means, variances = self.means.to(wide.dtype), self.variances.to(wide.dtype) + self.eps
        distances = [
            ((wide - mean).square() / variance).sum(-1) + variance.log().sum()
            for mean, variance in zip(means, variances)
        ]
        scores = torch.softmax(torch.stack(distances, -1) / (-2.0 * self.temperature), -1)
        return scores.where(self.is_known.all(), 1.0 / self.num_modalities)

    @torch.no_grad()
    def observe(self, hidden: Tensor, modality_ids: Tensor) -> None:
        """Adds tokens to those of the running step.

        Args:
            hidden (Tensor[..., H]): their hidden states, floating-point; of tokens that do not count also NaN.
            modality_ids (Tensor[...]): int32 or int64, in [-1, M); -1 = not counted.

        Raises:
            ValueError: another shape or type.
            IndexError: an id outside [-1, M) (on the CPU; elsewhere with EDL_CHECK=1, else the averages become NaN).
        """
        self._check("hidden", hidden)
        checks.check_tensors("GaussianModalityScores", modality_ids=modality_ids)
        if modality_ids.shape != hidden.shape[:-1] or modality_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "edl::GaussianModalityScores: modality_ids must be int32 or int64 and have the shape "
                f"{list(hidden.shape[:-1])} (got {modality_ids.dtype} {list(modality_ids.shape)})"
            )
        if modality_ids.device != hidden.device:
            raise ValueError(
                "edl::GaussianModalityScores: modality_ids must be on the device of hidden "
                f"(got {modality_ids.device} and {hidden.device})"
            )
        ids = modality_ids.flatten()
        is_wrong = (ids < -1) | (ids >= self.num_modalities)
        if reads_values(ids) and bool(is_wrong.any()):
            raise IndexError(
                f"edl::GaussianModalityScores: modality_ids must be at least -1 and below {self.num_modalities} "
                f"(got {ids[is_wrong][0]})"
            )
        of_modality = torch.arange(self.num_modalities, device=ids.device).unsqueeze(1)
        for some, some_ids in zip(hidden.flatten(0, -2).split(_ROWS), ids.split(_ROWS)):
            rows = some.double().masked_fill((some_ids < 0).unsqueeze(1), 0.0)
            belongs = (some_ids == of_modality).double()
            self._pending += torch.cat([belongs.sum(1, keepdim=True), belongs @ rows, belongs @ rows.square()], dim=1)
        self._pending.masked_fill_(is_wrong.any(), torch.nan)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the averages by the tokens that were observed since the last step, of all ranks, which call it
        together."""
        pending = self._pending
        if self._ranks.group is not None:
            torch.distributed.all_reduce(pending, group=self._ranks.group)
        counts, sums, squares = pending.split([1, self.hidden_size, self.hidden_size], dim=1)
        is_seen = counts.ne(0).squeeze(1)  # NaN is
        means = sums / counts.where(counts != 0, 1.0)
        variances = (squares / counts.where(counts != 0, 1.0) - means.square()).clamp(min=0.0)
        kept = self.decay * self.is_known.double().unsqueeze(1)
        for average, now in ((self.means, means), (self.variances, variances)):
            moved = kept * average + (1.0 - kept) * now
            average.copy_(moved.where(is_seen.unsqueeze(1), average.double()))
        self.is_known |= is_seen
        pending.zero_()

    def _check(self, name: str, hidden: Tensor) -> None:
        checks.check_tensors("GaussianModalityScores", **{name: hidden})
        if hidden.dim() < 2 or hidden.shape[-1] != self.hidden_size or not hidden.is_floating_point():
            raise ValueError(
                f"edl::GaussianModalityScores: {name} must be floating-point and have the shape [..., "
                f"{self.hidden_size}] (got {hidden.dtype} {list(hidden.shape)})"
            )

    def extra_repr(self) -> str:
        return (
            f"num_modalities={self.num_modalities}, hidden_size={self.hidden_size}, decay={self.decay}, "
            f"temperature={self.temperature}"
        )

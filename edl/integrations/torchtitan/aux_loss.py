"""Objectives as an auxiliary loss of torchtitan's routers, which its development version has."""

import dataclasses

import torch
from spmd_types import no_typecheck
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torchtitan.models.common.aux_loss import AuxLoss

from edl.integrations.torchtitan.router_objectives import RouterObjectives, is_replay
from edl.objectives import Objectives


class _LoggedMean:
    """Makes torchtitan, which adds up the losses of a step's passes, log the mean of those that had an effect.

    A pass without, as one without a pair of domains, has the loss 0, which would look perfect: it counts as the mean of
    the others of the step, or of the latest step that had one; 0 before there was any.
    """

    _loss: Tensor | float
    _logged: Tensor | float
    _share: Tensor | float
    _share_with_effect: Tensor | float

    def __init__(self) -> None:
        self._mean: Tensor | float = 0.0
        self.end_step()

    def add(self, loss: Tensor, share: Tensor | int, has_effect: Tensor) -> Tensor:
        """What is to be added for a pass, whose loss is multiplied by its share already."""
        self._loss, self._share = self._loss + loss.where(has_effect, 0.0), self._share + share
        self._share_with_effect = self._share_with_effect + has_effect.to(loss.dtype) * share
        self._mean = torch.where(self._share_with_effect > 0, self._loss / self._share_with_effect, self._mean)
        before, self._logged = self._logged, self._mean * self._share
        return self._logged - before

    def end_step(self) -> None:
        self._loss = self._logged = self._share = self._share_with_effect = 0.0


class _ObjectiveMetric(AuxLoss):
    """Lets torchtitan log one more objective of an `ObjectivesAuxLoss`; it has no gradient."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        objective: str

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._objective = config.objective

    @property
    def metric_name(self) -> str:
        return f"{self._objective}_loss"


class ObjectivesAuxLoss(AuxLoss):
    """Objectives as an auxiliary loss of torchtitan's routers.

    On each of R data ranks the value is L_m · T_m / R. Divided by the tokens of the step and added over ranks and
    micro-batches, as torchtitan does, each objective is logged as `<name>_loss/mean`, without its weight: the mean
    of the L_m, over layers too, of the passes in which it had an effect. The gradient is multiplied by R, once.
    Tokens are those that `padding_mask_T` leaves. A forward pass outside any `edl.domain_scope` has no labels.

    Args:
        config (Config): coeff, the factor of this router's total: 1 by the number of layers; objectives and
            memory, as `add_objectives` takes them; also, the configuration of another auxiliary loss of the router,
            or None; the rest as `AuxLoss.Config`.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(AuxLoss.Config):
        objectives: Objectives
        memory: bool = False
        also: AuxLoss.Config | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.objectives = RouterObjectives(config.objectives, config.memory, shares_tokens=True)
        self._logged_means = {name: _LoggedMean() for name in config.objectives.objectives}
        self._first, *others = self._logged_means
        same = {field.name: getattr(config, field.name) for field in dataclasses.fields(AuxLoss.Config)}
        for place, name in enumerate(others, start=1):
            metric = _ObjectiveMetric(_ObjectiveMetric.Config(**same, objective=name))
            self.add_module(f"metric_{place}", metric)
        self.also = None if config.also is None else config.also.build()

    @property
    def metric_name(self) -> str:
        return f"{self._first}_loss"

    def _share_of_tokens(self, num_tokens: int, padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | int:
        """T_m / R: the tokens of this pass over all ranks, per data rank."""
        ranks = self.objectives.ranks
        if padding_mask is None:
            return num_tokens * ranks.context_size  # the same on all ranks
        tokens = (~padding_mask).sum().to(dtype)
        for group in (ranks.context, ranks.data):
            if group is not None:
                tokens = all_reduce(tokens, "sum", group)
        return tokens / ranks.data_size

    def _logged(self, values: dict[str, Tensor], share: Tensor | int) -> list[Tensor]:
        """What to log of each objective."""
        if is_replay():
            return [value * share for value in values.values()]
        return [
            self._logged_means[name].add(value * share, share, self.objectives.has_effect(name))
            for name, value in values.items()
        ]

    def forward(
        self,
        scores_TE: Tensor,
        routing_map_TE: Tensor,
        *,
        carrier: Tensor,
        padding_mask_T: Tensor | None = None,
        denominator: Tensor,
    ) -> Tensor:
        """Injects the gradient.

        Args:
            scores_TE (Tensor[T, E]): scores of all experts.
            routing_map_TE (Tensor[T, E]): not 0 where an expert was chosen.
            carrier (Tensor[T, K]): top-k scores.
            padding_mask_T (Tensor[T], optional): True = padding.
            denominator (Tensor): a scalar, the tokens of the step over all ranks.

        Returns:
            The carrier.
        """
        if self.also is not None:
            carrier = self.also(
                scores_TE, routing_map_TE, carrier=carrier, padding_mask_T=padding_mask_T, denominator=denominator
            )
        with no_typecheck():
            weights, experts = None, None
            if self.objectives.needs & {"weights", "experts"}:
                weights, experts = _choices(scores_TE, routing_map_TE, carrier)
            losses = self.objectives(scores_TE, weights, experts, padding_mask_T, self.training)
            if losses is None:
                return carrier
            total, values = losses
            share = self._share_of_tokens(scores_TE.shape[0], padding_mask_T, total.dtype)
            total = total * share
            first, *others = self._logged(values, share)
            first = first + (total - total.detach())  # the value that is logged, the gradient of the total
        carrier = self.inject(first, carrier=carrier, denominator=denominator)
        for place, logged in enumerate(others, start=1):
            metric = self.get_submodule(f"metric_{place}")
            carrier = metric.inject(logged, carrier=carrier, denominator=denominator)
        return carrier

    def _reset_accumulators(self) -> None:
        super()._reset_accumulators()
        self.objectives.end_step()
        for mean in self._logged_means.values():
            mean.end_step()


def _choices(scores: Tensor, routing_map: Tensor, top_scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, experts), [T, K] each, best first: the more an expert scores, the more it weighs."""
    chosen = scores.detach().masked_fill(routing_map == 0, -torch.inf)
    experts = chosen.topk(top_scores.shape[-1], dim=-1).indices
    return top_scores.sort(dim=-1, descending=True).values, experts

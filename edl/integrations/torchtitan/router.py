"""torchtitan's router up to 0.3.0, with objectives in its place, and the end of its steps."""

import dataclasses
from typing import Any

import torch
from spmd_types import no_typecheck
from torch import Tensor, nn
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from edl.integrations.torchtitan.router_objectives import RouterObjectives
from edl.objectives import Objectives
from edl.ops import checks, inject


class ObjectivesRouter(TokenChoiceTopKRouter):
    """torchtitan's router up to 0.3.0, with objectives.

    Args:
        config (Config): coeff, the factor of this router's total: 1 by the number of layers; objectives, memory
            and micro_batches, as `add_objectives` takes them; the rest as `TokenChoiceTopKRouter.Config`.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        coeff: float
        objectives: Objectives
        memory: bool = False
        micro_batches: int = 1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.micro_batches = checks.as_integer("torchtitan", "micro_batches", config.micro_batches, lowest=1)
        self.coeff = config.coeff
        self.objectives = RouterObjectives(
            config.objectives, config.memory, shares_tokens=False, passes_of_step=self.micro_batches
        )

    def forward(
        self,
        x_BLD: Tensor,
        expert_bias_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `TokenChoiceTopKRouter.forward`; the top-k scores carry the gradient of the total."""
        topk_scores, topk_expert_ids, scores = super().forward(x_BLD, expert_bias_E)
        with no_typecheck():
            losses = self.objectives(scores, topk_scores, topk_expert_ids, training=self.training)
            if losses is not None:
                topk_scores = inject(topk_scores, losses[0] * (self.coeff / self.micro_batches))
        return topk_scores, topk_expert_ids, scores


def register_step_hook(
    optimizers: torch.optim.Optimizer, model_parts: list[nn.Module], parallel_dims: Any = None
) -> None:
    """Ends the step of all routers after each optimizer step: a `post_optimizer_build_fn` of `ModelSpec`.

    Without it a step ends when the first of `micro_batches` further passes begins. It also makes every step check
    that it had `micro_batches` of them.

    Args:
        optimizers (Optimizer): torchtitan's container, or any optimizer.
        model_parts (list[Module]): the parts of the model on this rank.
        parallel_dims: not used.
    """
    for router in _routers(model_parts):
        router.objectives.passes_of_step = None
    optimizers.register_step_post_hook(lambda *arguments: _end_step(model_parts))


def _routers(model_parts: list[nn.Module]) -> list[ObjectivesRouter]:
    modules = [module for part in model_parts for module in part.modules()]
    return [module for module in modules if isinstance(module, ObjectivesRouter)]


def _end_step(model_parts: list[nn.Module]) -> None:
    routers = _routers(model_parts)
    passes = [(router.objectives.passes, router.micro_batches) for router in routers]
    for router in routers:
        router.objectives.end_step()
    for counted, micro_batches in passes:
        if counted not in (0, micro_batches):
            raise ValueError(
                "edl::torchtitan: micro_batches must be the number of labelled forward passes of a step, "
                f"{counted} (got {micro_batches})"
            )

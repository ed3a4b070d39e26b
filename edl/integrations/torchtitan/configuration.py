"""Objectives in the configuration of a torchtitan model, before it is built."""

import dataclasses
from typing import Any

from torchtitan.models.common.moe import TokenChoiceTopKRouter

from edl.integrations.torchtitan.interface import HAS_AUX_LOSS
from edl.integrations.torchtitan.router_objectives import for_routers
from edl.objectives import ExpertDivergence, Objectives
from edl.ops import checks

if HAS_AUX_LOSS:
    from edl.integrations.torchtitan.aux_loss import ObjectivesAuxLoss
else:
    from edl.integrations.torchtitan.router import ObjectivesRouter


def add_objectives(model_config: Any, objectives: Objectives, *, micro_batches: int = 1, memory: bool = False) -> None:
    """Gives every router of a model objectives; what else its configuration says stays.

    Call it before the model is built. A step then has the total of `edl.objectives.Objectives`: for each objective its
    weight times the mean over layers, of the tokens of all data and context ranks, averaged over micro-batches. Each
    router has a copy of the objectives, and one all-reduce for all of them. Not for tensor parallelism, torch.compile
    or CUDA graphs.

    Routers hand over scores, as distributions over experts, and the chosen experts with their weights, but no logits.
    `ExpertDivergence` therefore reads the scores of the router's own function, whatever its `input` and `scores` say.
    Labels, `domain_ids` and other sets by name, come from an `edl.domain_scope` around each forward pass; under context
    parallelism labels per token are those of the rank's slice. Outside any scope objectives that name labels do
    nothing, and the others act.

    Args:
        model_config (Configurable.Config): of a torchtitan model; changed in place.
        objectives (Objectives): not bound to ranks or a memory.
        micro_batches (int): forward passes of a step on one rank: gradient accumulation steps times micro-batches of
            the pipeline. Up to torchtitan 0.3.0; later versions count tokens and it is not looked at. Default: 1.
        memory (bool): carry the sums over the micro-batches of a step (`edl.DomainMemory`), which under activation
            checkpointing needs a scope around every pass. Default: False.

    Statistics of the objectives (`Objectives({...}, statistics=...)`) need `number_layers(model)` once it is built, and
    count each rank's own tokens: `reduce(group=…, sequence_group=…)` adds them over the mesh's dp and cp.

    Raises:
        ValueError: objectives that are bound or need logits; no router, a router of another class (up to 0.3.0), or one
            that has objectives already.
    """
    checks.check_flags("torchtitan", memory=memory)
    micro_batches = checks.as_integer("torchtitan", "micro_batches", micro_batches, lowest=1)
    objectives = for_routers(objectives)
    if HAS_AUX_LOSS and not objectives.objectives:
        raise ValueError(
            "edl::torchtitan: statistics alone need an objective, of weight 0, which torchtitan's auxiliary loss logs "
            "(got none)"
        )
    if HAS_AUX_LOSS and objectives.evaluation_statistics is not None:
        raise ValueError(
            "edl::torchtitan: statistics must be those of training, in which alone torchtitan calls auxiliary losses "
            "(got evaluation_statistics)"
        )
    found = list(model_config.traverse(TokenChoiceTopKRouter.Config))
    if not found:
        raise ValueError(f"edl::torchtitan: a model must have routers (got {type(model_config).__qualname__})")
    if any(_has_objectives(router) for _, router, _, _ in found):
        raise ValueError(
            "edl::torchtitan: add_objectives or add_expert_divergence must be called once for a model (got a router "
            "that has the loss)"
        )
    if not HAS_AUX_LOSS:
        for name, router, _, _ in found:
            if type(router) is not TokenChoiceTopKRouter.Config:
                raise ValueError(
                    f"edl::torchtitan: {name} must be a TokenChoiceTopKRouter, derive from ObjectivesRouter for others "
                    f"(got {type(router).__qualname__})"
                )
    added: dict[str, Any] = {"coeff": 1.0 / len(found), "objectives": objectives, "memory": memory}
    for _, router, parent, field in found:
        if not HAS_AUX_LOSS:
            same = {entry.name: getattr(router, entry.name) for entry in dataclasses.fields(router)}
            setattr(parent, field, ObjectivesRouter.Config(**same, **added, micro_batches=micro_batches))
        elif not _has_objectives(router):  # layers may share one configuration
            router.aux_loss = ObjectivesAuxLoss.Config(**added, also=router.aux_loss)


def add_expert_divergence(
    model_config: Any, *, num_domains: int, coeff: float, micro_batches: int = 1, memory: bool = False, **options: Any
) -> None:
    """`add_objectives` of the Expert Divergence loss (arXiv 2603.00054) alone, under the name "expert_divergence".

    Args:
        model_config (Configurable.Config): of a torchtitan model; changed in place.
        num_domains (int): D, at least 2.
        coeff (float): weight of the loss (beta of the paper).
        micro_batches, memory: as `add_objectives` takes them.
        **options: eps, sequence_reduction, pair_reduction, bias_correction of `edl.objectives.ExpertDivergence`.

    Raises:
        ValueError: options outside their range or unknown, and what `add_objectives` raises.
    """
    known = [field.name for field in dataclasses.fields(ExpertDivergence)]
    for option in options:
        if option not in known:
            raise ValueError(f"edl::torchtitan: the options of ExpertDivergence must be among {known} (got {option!r})")
    divergence = ExpertDivergence(num_domains=num_domains, **options)
    objectives = Objectives({"expert_divergence": (divergence, coeff)})
    add_objectives(model_config, objectives, micro_batches=micro_batches, memory=memory)


def _has_objectives(router: Any) -> bool:
    if not HAS_AUX_LOSS:
        return isinstance(router, ObjectivesRouter.Config)
    return isinstance(router.aux_loss, ObjectivesAuxLoss.Config)

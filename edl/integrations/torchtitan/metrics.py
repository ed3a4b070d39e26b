"""What to log of the objectives of all routers."""

import torch
from torch import Tensor, nn

from edl.integrations.torchtitan.router_objectives import objectives_of_routers


def layer_losses(model: nn.Module, objective: str = "expert_divergence") -> dict[str, Tensor]:
    """The latest value of an objective in each layer, for logging.

    Args:
        model (Module): a model, or a part of one.
        objective (str): its name. Default: that of `add_expert_divergence`.

    Returns:
        Name of the router or auxiliary loss → a scalar without weight, the loss of all ranks' tokens in its latest pass
        that had an effect, for the divergence one that held a pair of domains; NaN where none did.

    Raises:
        ValueError: no such objective.
    """
    found = objectives_of_routers(model)
    for each in found.values():
        if objective not in each.objectives.objectives:
            raise ValueError(
                f"edl::torchtitan: objective must be one of {list(each.objectives.objectives)} (got {objective!r})"
            )
    return {name: each.values[objective] for name, each in found.items() if objective in each.values}


def objective_metrics(model: nn.Module) -> dict[str, Tensor]:
    """What to log of the losses of all layers since the last call; nothing waits for the device.

    Args:
        model (Module): a model, or a part of one.

    Returns:
        Float64 scalars, means over layers and passes with an effect, NaN where none had one: for each objective
        `<name>_loss`, without its weight; what it measures, of `add_expert_divergence` `expert_divergence/nats`, the
        Jensen-Shannon divergence itself (higher is better), and `expert_divergence/pairs`, the number of pairs of
        domains, of all passes; `<name>/<name of the router or auxiliary loss>`, the loss of one layer;
        `<name>/steps_without_effect` since the last call, and `<name>/weight`. Nothing before the first pass.
    """
    entries: dict[str, list[Tensor]] = {}
    for router, each in objectives_of_routers(model).items():
        of_layer = {f"{name}/layer_0": f"{name}/{router}" for name in each.objectives.objectives}
        for entry, value in each.objectives.log().items():
            entries.setdefault(of_layer.get(entry, entry), []).append(value.double())
    return {entry: torch.stack(values).nanmean() for entry, values in entries.items()}

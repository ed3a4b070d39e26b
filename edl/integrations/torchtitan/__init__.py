"""Objectives of the routing in torchtitan: each router gets a copy, whose gradient enters through the top-k scores.

torchtitan has two interfaces, told apart by what is there. Its development version has `AuxLoss`, a module that the
configuration of a router names: `ObjectivesAuxLoss` is one. Up to 0.3.0 there is none, and `ObjectivesRouter` takes the
router's place. Either way `add_objectives(model_config, ...)` sets it up, or `add_expert_divergence(model_config, ...)`
for the divergence alone, and labels come from `edl.domain_scope`. The router is tested on torchtitan 0.3.0 itself, the
auxiliary loss on a stand-in for its interface.

Which factor makes the gradient right. torchtitan adds gradients up, over data and context ranks and over micro-batches,
and averages nothing; its losses are sums over tokens, divided by N, the tokens of the step. A micro-batch m, of T_m
tokens over all ranks, therefore counts T_m / N, and a step has the gradient Σ_m (T_m / N) ∇L_m: that of the mean loss
of its micro-batches, where L_m is the total of all ranks' tokens, the mean over layers of each objective times its
weight. Rank r contributes ∇_r L_m, its own part of it (`edl.objectives.Objectives`), and these add up to ∇L_m.
"""

from edl.integrations.torchtitan.configuration import add_expert_divergence, add_objectives
from edl.integrations.torchtitan.interface import HAS_AUX_LOSS
from edl.integrations.torchtitan.metrics import layer_losses, objective_metrics
from edl.integrations.torchtitan.router_objectives import number_layers, set_step

__all__ = ["add_expert_divergence", "add_objectives", "layer_losses", "number_layers", "objective_metrics", "set_step"]

if HAS_AUX_LOSS:
    from edl.integrations.torchtitan.aux_loss import ObjectivesAuxLoss

    __all__ += ["ObjectivesAuxLoss"]
else:
    from edl.integrations.torchtitan.router import ObjectivesRouter, register_step_hook

    __all__ += ["ObjectivesRouter", "register_step_hook"]

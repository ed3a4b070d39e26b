"""Expert Divergence Learning for Mixture-of-Experts language models."""

from edl import _extension

_extension.load()

from edl import flops, objectives, ops, reference  # noqa: E402, F401  (flops registers formulas)
from edl._build import version as __version__  # noqa: E402  (load() turns a missing build into a sentence)
from edl.diagnostics.statistics import RoutingStatistics  # noqa: E402
from edl.integrations import tell_transformers  # noqa: E402
from edl.labels import segments  # noqa: E402
from edl.labels.scope import Labels, current_labels, domain_scope  # noqa: E402
from edl.moe import expert_parallel, routers  # noqa: E402
from edl.moe.layer import MoELayer, layer_listeners  # noqa: E402
from edl.objectives.expert_divergence_loss import ExpertDivergenceLoss, expert_divergence_loss  # noqa: E402
from edl.objectives.load_balancing import load_balancing_loss  # noqa: E402
from edl.objectives.router_z import router_z_loss  # noqa: E402
from edl.ops import inject  # noqa: E402
from edl.reduction.micro_batches import DomainMemory  # noqa: E402
from edl.routing import Choice, Routing, RoutingContext  # noqa: E402
from edl.training.expert_bias import update_expert_bias  # noqa: E402
from edl.training.modality_scores import GaussianModalityScores  # noqa: E402
from edl.training.router_weights import decoupled_router_step  # noqa: E402

layer_listeners.append(tell_transformers)

cmake_prefix_path = _extension.CMAKE_PREFIX_PATH

__all__ = [
    "Choice",
    "DomainMemory",
    "ExpertDivergenceLoss",
    "GaussianModalityScores",
    "Labels",
    "MoELayer",
    "Routing",
    "RoutingContext",
    "RoutingStatistics",
    "__version__",
    "cmake_prefix_path",
    "current_labels",
    "decoupled_router_step",
    "domain_scope",
    "expert_divergence_loss",
    "expert_parallel",
    "inject",
    "load_balancing_loss",
    "objectives",
    "ops",
    "reference",
    "router_z_loss",
    "routers",
    "segments",
    "update_expert_bias",
]

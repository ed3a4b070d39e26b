"""What routing can be pushed towards: each objective is a formula of sums over tokens, exact under any split."""

from edl.objectives.activation_cosine import ActivationCosine
from edl.objectives.base import Objective, Sums, available
from edl.objectives.configuration import objectives_from_file, objectives_of
from edl.objectives.cross_layer_coupling import CrossLayerCoupling
from edl.objectives.dirichlet_prior import DirichletPrior
from edl.objectives.expert_divergence import ExpertDivergence
from edl.objectives.expert_orthogonality import ExpertOrthogonality
from edl.objectives.expert_router_coupling import ExpertRouterCoupling
from edl.objectives.load_balancing import LoadBalancing
from edl.objectives.modality_divergence import ModalityDivergence
from edl.objectives.mutual_information import ModalityMutualInformation, MutualInformation
from edl.objectives.objectives import Objectives
from edl.objectives.router_entropy import RouterEntropy
from edl.objectives.router_weights import RouterOrthogonality, RouterSimilarity
from edl.objectives.router_z import RouterZ
from edl.objectives.routing_variance import RoutingVariance
from edl.objectives.schedules import linear_decay, linear_warmup, off_after

__all__ = [
    "ActivationCosine",
    "CrossLayerCoupling",
    "DirichletPrior",
    "ExpertDivergence",
    "ExpertOrthogonality",
    "ExpertRouterCoupling",
    "LoadBalancing",
    "ModalityDivergence",
    "ModalityMutualInformation",
    "MutualInformation",
    "Objective",
    "Objectives",
    "RouterEntropy",
    "RouterOrthogonality",
    "RouterSimilarity",
    "RouterZ",
    "RoutingVariance",
    "Sums",
    "available",
    "linear_decay",
    "linear_warmup",
    "objectives_from_file",
    "objectives_of",
    "off_after",
]

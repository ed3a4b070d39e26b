"""What routing can be pushed towards: each objective is a formula of sums over tokens, exact under any split."""

from edl.objectives.base import Objective, Sums
from edl.objectives.load_balancing import LoadBalancing
from edl.objectives.objectives import Objectives, linear_warmup
from edl.objectives.router_z import RouterZ

__all__ = ["LoadBalancing", "Objective", "Objectives", "RouterZ", "Sums", "linear_warmup"]

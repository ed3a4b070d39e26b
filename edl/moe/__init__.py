"""The Mixture-of-Experts layer, its routers, and experts spread over ranks."""

from edl.moe.layer import MoELayer, SharedExpert
from edl.moe.routers import Router, TopK

__all__ = ["MoELayer", "Router", "SharedExpert", "TopK"]

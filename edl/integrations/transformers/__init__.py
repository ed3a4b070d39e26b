"""edl in transformers v5: blocks as layers, experts, router logits of any model, and the Trainer."""

from typing import TYPE_CHECKING, Any

from edl import extras
from edl.integrations.transformers.blocks import block_from_layer, layer_from_block
from edl.integrations.transformers.capture import ObjectivesHandle, attach
from edl.integrations.transformers.data import DomainCollator, pack_documents
from edl.integrations.transformers.experts import register
from edl.integrations.transformers.trainer import EDTrainerMixin

if TYPE_CHECKING:
    from edl.integrations.transformers.statistics import RoutingStatisticsCallback

__all__ = [
    "DomainCollator",
    "EDTrainerMixin",
    "ObjectivesHandle",
    "RoutingStatisticsCallback",
    "attach",
    "block_from_layer",
    "layer_from_block",
    "pack_documents",
    "register",
]


def __getattr__(name: str) -> Any:
    """The callback derives from one of transformers, which is imported when it is asked for."""
    if name == "RoutingStatisticsCallback":
        extras.require("transformers", name, "transformers")
        from edl.integrations.transformers.statistics import RoutingStatisticsCallback

        return RoutingStatisticsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""edl in transformers v5: blocks as layers, experts, router logits of any model, and the Trainer."""

from edl.integrations.transformers.blocks import block_from_layer, layer_from_block
from edl.integrations.transformers.capture import ObjectivesHandle, attach
from edl.integrations.transformers.data import DomainCollator, pack_documents
from edl.integrations.transformers.experts import register
from edl.integrations.transformers.trainer import EDTrainerMixin

__all__ = [
    "DomainCollator",
    "EDTrainerMixin",
    "ObjectivesHandle",
    "attach",
    "block_from_layer",
    "layer_from_block",
    "pack_documents",
    "register",
]

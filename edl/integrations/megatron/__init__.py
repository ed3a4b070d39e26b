"""Objectives of routing in Megatron-LM and other trainers on megatron-core (0.16 or later): see docs/megatron.md."""

try:
    import megatron.core  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "edl.integrations.megatron: megatron-core 0.16 or later must be installed, "
        f"pip install 'expert-divergence[megatron]' (got {error})"
    ) from error

from edl.integrations.megatron.arguments import add_arguments, options
from edl.integrations.megatron.data import with_domain_ids
from edl.integrations.megatron.documents import label_documents
from edl.integrations.megatron.router import EDTopKRouter
from edl.integrations.megatron.spec import patch_spec
from edl.integrations.megatron.statistics import reduce_statistics

__all__ = [
    "EDTopKRouter",
    "add_arguments",
    "label_documents",
    "options",
    "patch_spec",
    "reduce_statistics",
    "with_domain_ids",
]

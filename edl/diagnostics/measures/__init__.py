"""What a routing says, as plain functions of counts and shares: float64 from any number, NaN where there is nothing to
measure.

Counts and shares may be tensors or NumPy arrays; results are tensors without gradient. Entropies and divergences are in
nats. Leading dimensions (layers, snapshots) are kept.
"""

from edl.diagnostics.measures.documents import decomposition, document_entropy, document_overlap
from edl.diagnostics.measures.domains import information, overlap, pairwise_divergence, specialisation
from edl.diagnostics.measures.load import (
    coefficient_of_variation,
    coverage,
    dead_experts,
    entropy,
    max_violation,
    partners,
    shares,
)
from edl.diagnostics.measures.tokens import saturation, top_tokens

__all__ = [
    "coefficient_of_variation",
    "coverage",
    "dead_experts",
    "decomposition",
    "document_entropy",
    "document_overlap",
    "entropy",
    "information",
    "max_violation",
    "overlap",
    "pairwise_divergence",
    "partners",
    "saturation",
    "shares",
    "specialisation",
    "top_tokens",
]

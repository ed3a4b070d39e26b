"""Typed, documented, scriptable wrappers over the operators `torch.ops.edl.*`.

Shapes: T tokens, S segments, E experts, D domains, K experts per token, N = T·K, H hidden size, I intermediate size.
Softmax, sums and logarithms are computed in float32 (float64 for float64 input), whatever the storage type; only the
products of `expert_mlp` on CUDA follow torch's switches for TF32 and for reductions in 16 bits.
"""

from edl.ops.injection import inject
from edl.ops.layer import (
    combine_tokens,
    dispatch_tokens,
    expert_mlp,
    expert_mlp_with_gram,
    mean_squared_cosine,
    route_tokens,
    sort_by_expert,
    token_gram,
)
from edl.ops.loss import aggregate_routing, domain_moments, expert_divergence, pairwise_divergence, sequence_segment_ids

__all__ = [
    "aggregate_routing",
    "combine_tokens",
    "dispatch_tokens",
    "domain_moments",
    "expert_divergence",
    "expert_mlp",
    "expert_mlp_with_gram",
    "inject",
    "mean_squared_cosine",
    "pairwise_divergence",
    "route_tokens",
    "sequence_segment_ids",
    "sort_by_expert",
    "token_gram",
]

"""Every operator again in plain torch: the definition that the kernels are held to; and that of an objective which has
no operator.

Written to be read, not to be fast: no clever order of sums. Feed float64 for a reference. Arguments
and results are those of the functions of the same name in `edl.ops`.
"""

from edl.reference.injection import inject
from edl.reference.layer import (
    combine_tokens,
    dispatch_tokens,
    expert_mlp,
    expert_mlp_with_gram,
    route_tokens,
    sort_by_expert,
    token_gram,
)
from edl.reference.loss import (
    LOWEST_LOG_RATIO,
    aggregate_routing,
    divergence_bias,
    domain_moments,
    expert_divergence,
    jensen_shannon,
    one_or_nan,
    pairwise_divergence,
    routing_scores,
    segment_spreads,
    sequence_segment_ids,
)
from edl.reference.outputs import projections_on_others

__all__ = [
    "LOWEST_LOG_RATIO",
    "aggregate_routing",
    "combine_tokens",
    "dispatch_tokens",
    "divergence_bias",
    "domain_moments",
    "expert_divergence",
    "expert_mlp",
    "expert_mlp_with_gram",
    "inject",
    "jensen_shannon",
    "one_or_nan",
    "pairwise_divergence",
    "projections_on_others",
    "route_tokens",
    "routing_scores",
    "segment_spreads",
    "sequence_segment_ids",
    "sort_by_expert",
    "token_gram",
]

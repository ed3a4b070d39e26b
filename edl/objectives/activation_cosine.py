"""The cosine of activations: the experts of a token work on it in different ways."""

import dataclasses

from torch import Tensor

from edl import ops
from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.grams import counted_grams, mean_of_pairs


@dataclasses.dataclass(frozen=True)
class ActivationCosine(Objective):
    """(1/T) Σ_t mean over pairs e < v of a token's experts of cos²(z_te, z_tv), z_te = silu(g) * u, before `down`.

    Second-hand: arXiv 2602.14159 (Hu et al.), R_sp, which adds over pairs, tokens or their mean, and layers; the means
    over pairs, tokens and layers are our choice, so that the weight depends on no size. The gradients of two experts'
    `down` for a token are products with one gradient of the output, so their cosine is that of z.

    Between 0, where all activations are orthogonal, and 1, where all are parallel. It does not change with the lengths
    of activations. Slots without an expert, with a weight of 0, or whose activation is 0 are in no pair; a token
    without any pair counts with 0. With K = 1 there is nothing to act on. There is no gradient to the router.

    It reads `activation_gram` of an observation, as `MoELayer(activation_gram=True)` gives it: not with an
    `expert_group`, whose ranks hold a token's activations apart, and not of tensor-parallel experts, both of which the
    layer refuses.

    Source: arXiv 2602.14159, second-hand. Its weight is said to be 2e-3 or 2e-4, which is unresolved, for a sum over
        pairs and L layers: times K (K - 1) L here, or half of it where the source counts a pair once.
    """

    needs = frozenset({"activation_gram"})

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        grams = counted_grams("ActivationCosine", "activation_gram", layers, segments)
        cosines = ops.mean_squared_cosine(grams.flatten(0, 1)).view(grams.shape[:2])
        return mean_of_pairs("cosines", cosines, grams.shape[-1] > 1, layers, segments)

    def formula(self, sums: Sums) -> Tensor:
        return sums["cosines"] / sums["tokens"].clamp(min=1)

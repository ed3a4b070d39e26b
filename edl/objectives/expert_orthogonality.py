"""The orthogonality of experts: what one answers to a token, no other answers too."""

import dataclasses
import math

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.objectives.grams import counted_grams, mean_of_pairs
from edl.ops import checks


@dataclasses.dataclass(frozen=True)
class ExpertOrthogonality(Objective):
    """(1/T) Σ_t Σ_j Σ_{k≠j} ‖⟨x_j, x_k⟩ / (⟨x_k, x_k⟩ + eps) x_k‖²: the squared length of the projection of each output
    of a token's experts on each other one.

    Verified: arXiv 2505.22323, Eq. 6, L_o of its text, but for the mean over tokens, where Eq. 6 has a sum. x_k is the
    output of the k-th chosen expert, not multiplied by its weight. The authors call Eq. 6 conceptual: their code
    computes something else. So there are three:

    - `variant="equation"` is Eq. 6. It grows with the squares of the outputs, and falls too where these shrink.
    - `normalize=True` puts cos²(x_j, x_k) in the place of the squared length: ours, reconstructed from no paper. It
      does not change with the lengths of outputs, and adds over ordered pairs as Eq. 6 does: between 0 and K (K - 1).
      eps has no part in it.
    - `variant="released_code"` is the authors' code: for each slot, the other K - 1 outputs in their order are made
      orthonormal (Gram and Schmidt, each divided by its length + eps), and the squared lengths of the projections of
      the slot's output on them are added; the mean over slots. It is differentiated through, which is ill-conditioned
      where outputs are nearly linearly dependent. Its K outputs are those of one token here, where the code, by a slip,
      mostly takes K tokens of one expert. It equals Eq. 6 divided by K for K = 2, eps aside, and is slow: a definition
      to compare with, computed in float64.

    All are computed from the inner products of a token's outputs. 0 for orthogonal outputs. Slots without an expert,
    with a weight of 0, or whose output is 0 add 0; a token without a pair counts with 0. With K = 1 there is nothing to
    act on. There is no gradient to the router.

    It reads `output_gram` of an observation, as `MoELayer(output_gram=True)` gives it, also with an `expert_group`;
    tensor-parallel experts the layer refuses.

    Args:
        variant (str): "equation" (default) or "released_code".
        normalize (bool): of the equation, whether its terms are squared cosines. Default: False.
        eps (float): of the equation, what is added to squared lengths; of the released code, to lengths, where it has
            1e-6. Not negative. Default: 1e-6; the paper does not say.

    Raises:
        ValueError: an unknown variant, an option outside its range, `normalize` beside the released code.

    Source: arXiv 2505.22323, whose weight is 1e-3 after a scaling to the size of the balance loss, which we do not
        have, as it reads values; its code, with 1e-4 and a sum over layers where the mean is taken here, is
        github.com/HongcanGuo/Auxloss-For-Advancing-Expert-Specialization.
    """

    variant: str = "equation"
    normalize: bool = False
    eps: float = 1e-6

    needs = frozenset({"output_gram"})

    def __post_init__(self) -> None:
        checks.check_choice("ExpertOrthogonality", "variant", self.variant, ["equation", "released_code"])
        checks.check_flags("ExpertOrthogonality", normalize=self.normalize)
        checks.check_numbers("ExpertOrthogonality", eps=self.eps)
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"edl::ExpertOrthogonality: eps must be finite and not negative (got {self.eps})")
        object.__setattr__(self, "eps", float(self.eps))
        if self.normalize and self.variant == "released_code":
            raise ValueError(
                "edl::ExpertOrthogonality: normalize is an option of variant='equation' (got variant='released_code')"
            )

    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        grams = counted_grams("ExpertOrthogonality", "output_gram", layers, segments)
        if self.variant == "released_code":
            values = _on_orthonormal_others(grams.double(), self.eps)
        else:
            values = _on_each_other(grams, None if self.normalize else self.eps)
        return mean_of_pairs("projections", values, grams.shape[-1] > 1, layers, segments)

    def formula(self, sums: Sums) -> Tensor:
        return sums["projections"] / sums["tokens"].clamp(min=1)


def _on_each_other(grams: Tensor, eps: float | None) -> Tensor:
    """Σ_j Σ_{k≠j} of the squared projections of Gram matrices [..., K, K], of squared cosines without eps."""
    squares = grams.diagonal(dim1=-2, dim2=-1)
    squares = squares.masked_fill(squares == 0, 1.0)  # of rows whose products are 0
    lengths = squares.sqrt()
    factors = 1 / lengths if eps is None else lengths / (squares + eps)
    projections = grams * factors.unsqueeze(-2)  # of j on k, over the length of k
    if eps is None:
        projections = projections * factors.unsqueeze(-1)
    is_own = torch.eye(grams.shape[-1], dtype=torch.bool, device=grams.device)
    return projections.masked_fill(is_own, 0.0).square().sum((-2, -1))


def _on_orthonormal_others(grams: Tensor, eps: float) -> Tensor:
    """(1/K) Σ_i Σ_u <u, x_i>² <u, u> of Gram matrices [..., K, K], u the orthonormal vectors that are made of all x but
    x_i.

    Vectors are rows of coefficients over the K outputs, [..., K, K]: one for each i, all of which are made together.
    """
    size = grams.shape[-1]
    identity = torch.eye(size, dtype=grams.dtype, device=grams.device)
    # The slots but i: 0 to i - 1, then i + 1 to K - 1.
    basis: list[tuple[Tensor, Tensor]] = []  # u, and <u, x> for each output x
    total = grams[..., :0].sum(-1)  # zeros with a graph, also with one output
    for place in range(size - 1):
        slots = torch.arange(size, device=grams.device)
        others = (slots <= place).long() + place
        vectors = identity[others].expand(grams.shape)
        for unit, products in basis:
            vectors = vectors - (vectors * products).sum(-1, keepdim=True) * unit
        products = vectors @ grams
        square = (vectors * products).sum(-1, keepdim=True)
        is_nothing = ~(square > 0) & ~square.isnan()  # also by rounding
        inverse = 1 / (square.masked_fill(is_nothing, 1.0).sqrt() + eps)
        inverse = inverse.masked_fill(is_nothing, 0.0)
        basis.append((vectors * inverse, products * inverse))
        on_own = (products * inverse).diagonal(dim1=-2, dim2=-1)
        total = total + on_own.square() * (square * inverse.square()).squeeze(-1)
    return total.mean(-1)

"""What the test of objectives on the rows of Megatron's routers runs on ranks of its own."""

import megatron_on_cpu
import splits
import torch

from edl.objectives import Objectives, RouterOrthogonality, RouterSimilarity

SPLITS = [each for one in (splits.ONE, splits.DP, splits.TP, splits.CP, splits.PP) for each in splits._variants(one)]


def _objectives(factor: float) -> Objectives:
    made = {"rows": (RouterOrthogonality(), 0.7 * factor), "similarity": (RouterSimilarity(), 0.2 * factor)}
    return Objectives(made)


def _wanted(name: str, shape: torch.Size) -> torch.Tensor:
    """The gradient of both, in the mean over layers, by the weight alone."""
    import small_gpt

    weight = small_gpt._full_value(name, tuple(shape)).requires_grad_(True)
    rows, identity = torch.nn.functional.normalize(weight), torch.eye(len(weight), dtype=torch.float64)
    loss = 0.7 * (rows @ rows.T - identity).square().mean() + 0.2 * (weight @ weight.T - identity).abs().mean()
    return torch.autograd.grad(loss / small_gpt.LAYERS, weight)[0]


def gradients(ranks: int) -> dict[str, list]:
    """For every split over so many ranks: what the objectives add to the gradient of each router here, and what they
    should."""
    from megatron.core import parallel_state

    megatron_on_cpu.enable()
    found = {}
    for split in SPLITS:
        if split.ranks != ranks:
            continue
        splits.initialize(split)
        with_rows, without = (splits.gradients(split, {"objectives": _objectives(factor)}) for factor in (1.0, 0.0))
        found[split.name] = [
            (gradient - without[name], _wanted(name, gradient.shape))
            for name, gradient in with_rows.items()
            if name.endswith("router.weight")
        ]
        parallel_state.destroy_model_parallel()
    return found


def patched() -> list[str]:
    """What is said where a spec is given an objective on experts, and one whose groups are many."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from router_objectives import sentence

    from edl.integrations.megatron import patch_spec
    from edl.objectives import ExpertRouterCoupling

    layer = get_gpt_layer_local_spec(num_experts=4)
    made = {"coupling": ExpertRouterCoupling(), "groups": RouterOrthogonality(groups=16)}
    return [sentence(patch_spec, layer, Objectives({name: (each, 1.0)})) for name, each in made.items()]

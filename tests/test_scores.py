"""Score functions: the operators' names are those of Python, and every one goes through everything that takes one."""

import re

import pytest
import torch

import edl
from edl import ops, reference
from edl.objectives import ExpertDivergence, LoadBalancing
from edl.ops import checks

LOGITS = torch.tensor([[0.5, -1.0, 2.0, 0.25], [-3.0, 1.5, 0.0, 1.0], [40.0, -40.0, 1.0, -2.0]], dtype=torch.float64)
IDS = torch.tensor([0, 1, 0])
SEQUENCES = LOGITS[:2].unsqueeze(1)


def known_to(call):
    """The names in the sentence that refuses another."""
    with pytest.raises(ValueError) as error:
        call("unknown")
    rule, got = str(error.value).split("\n")[0].split(" (got ")
    assert "scores must be " in rule and got == "'unknown')"
    return re.findall(r"'(\w+)'", rule)


@torch.jit.script
def scripted_loss(logits: torch.Tensor, labels: torch.Tensor, scores: str) -> torch.Tensor:
    return edl.expert_divergence_loss([logits], labels, 2, scores=scores)


TAKES_ROUTER_SCORES = {
    "route_tokens": lambda scores: ops.route_tokens(LOGITS, 2, scores),
    "route_tokens_backward": lambda scores: torch.ops.edl._route_tokens_backward(
        LOGITS[:, :2].clone(), LOGITS, torch.zeros(3, 2, dtype=torch.int64), scores, True, 1.0
    ),
    "TopK": lambda scores: edl.routers.TopK(8, 4, 2, scores=scores),
    "MoELayer": lambda scores: edl.MoELayer(8, 8, 4, 2, scores=scores),
    "LoadBalancing": lambda scores: LoadBalancing(scores=scores),
    "ExpertDivergence": lambda scores: ExpertDivergence(2, scores=scores),
    "ExpertDivergenceLoss": lambda scores: edl.ExpertDivergenceLoss(2, scores=scores),
    "expert_divergence_loss": lambda scores: edl.expert_divergence_loss(SEQUENCES, IDS[:2], 2, scores=scores),
}
TAKES_DISTRIBUTIONS_TOO = {
    "aggregate_routing": lambda scores: ops.aggregate_routing(LOGITS, IDS, 2, scores),
    "aggregate_routing_backward": lambda scores: torch.ops.edl._aggregate_routing_backward(
        LOGITS[:2], LOGITS, IDS, scores
    ),
    "aggregate_layers": lambda scores: torch.ops.edl._aggregate_layers([LOGITS], IDS, 2, scores),
    "load_balancing_loss": lambda scores: edl.load_balancing_loss(
        edl.Routing(LOGITS, LOGITS[:, :2], torch.zeros(3, 2, dtype=torch.int64), IDS), scores=scores
    ),
}


@pytest.mark.parametrize("name", TAKES_ROUTER_SCORES)
def test_all_know_the_same_score_functions(name):
    call = TAKES_ROUTER_SCORES[name]
    assert known_to(call) == checks.router_scores()
    for scores in checks.router_scores():
        call(scores)
    with pytest.raises(ValueError, match=r"scores must be .*\(got 'none'\)"):
        call("none")


@pytest.mark.parametrize("name", TAKES_DISTRIBUTIONS_TOO)
def test_what_takes_distributions_knows_none_as_well(name):
    call = TAKES_DISTRIBUTIONS_TOO[name]
    assert known_to(call) == [*checks.router_scores(), "none"]
    for scores in checks.router_scores():
        call(scores)


def test_torchscript_knows_them():
    for scores in checks.router_scores():
        torch.testing.assert_close(
            scripted_loss(SEQUENCES, IDS[:2], scores),
            edl.expert_divergence_loss([SEQUENCES], IDS[:2], 2, scores=scores),
        )
    with pytest.raises(torch.jit.Error, match=r"scores must be one of \[softmax, sigmoid.*\] \(got 'none'\)"):
        scripted_loss(SEQUENCES, IDS[:2], "none")


@pytest.mark.parametrize("scores", checks.router_scores())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_alone_is_the_definition_and_its_slope(scores, dtype):
    logits = LOGITS.to(dtype, copy=True).requires_grad_()
    expected = LOGITS.clone().requires_grad_()
    slopes = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    for found, of in ((ops, logits), (reference, expected)):
        sums, _ = found.aggregate_routing(of, torch.arange(3), 3, scores)
        weights, experts = found.route_tokens(of, 4, scores, normalize=False)
        ((sums * slopes).sum() + (weights.double() * slopes).sum()).backward()
        assert experts.tolist() == LOGITS.argsort(descending=True).tolist()
    torch.testing.assert_close(
        logits.grad.double(), expected.grad, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=1e-7
    )

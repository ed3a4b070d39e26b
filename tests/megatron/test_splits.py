"""Gradients of a real `GPTModel` under every split equal those of one process that sees the whole batch."""

import importlib.util
import math

import pytest
import splits
import torch
from ranks import on_ranks
from tolerances import tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")


@pytest.fixture(scope="module")
def references():
    return on_ranks(1, splits.references)[0]


@pytest.fixture(scope="module", params=[1, 2, 4])
def errors(references, request, tmp_path_factory):
    """Errors by split and rank, of all splits over so many ranks."""
    file = tmp_path_factory.mktemp("references") / "references.pt"
    torch.save(references, file)
    by_rank = on_ranks(request.param, splits.errors, request.param, str(file))
    return {name: [rank[name] for rank in by_rank] for name in by_rank[0]}


def _allowed(split, divergences) -> float:
    # The textbook formula of the reference takes differences of logarithms: its error grows as the divergence,
    # exp(-loss), shrinks.
    cancellation = math.exp(max(max(layers) for layers in divergences))
    in_float32 = tolerance(torch.float32, 1) if split.per_token else 0.0  # Megatron divides by the number of tokens so
    return cancellation * tolerance(torch.float64, splits.TOKENS) + in_float32


def test_gradients_are_those_of_one_process(errors, references):
    allowed = {split.name: _allowed(split, references[split.reference][1]) for split in splits.SPLITS}
    assert {name: (worst, allowed[name]) for name, worst in errors.items() if not max(worst) <= allowed[name]} == {}


def test_the_loss_makes_most_of_the_router_gradient(references):
    with_loss, _ = references[splits.Split("")]
    without, _ = references[splits.WITHOUT_LOSS]
    router = "decoder.layers.1.mlp.router.weight"
    assert (with_loss[router] - without[router]).norm() > 0.5 * with_loss[router].norm()

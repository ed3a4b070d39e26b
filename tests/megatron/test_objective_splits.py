"""Several objectives at once under every split: the gradients of a plain loop over `Objectives` in one process."""

import importlib.util

import objective_splits
import pytest
import torch
from ranks import on_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")
ROUTER = "decoder.layers.1.mlp.router.weight"


@pytest.fixture(scope="module")
def references():
    return on_ranks(1, objective_splits.references)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_those_of_a_plain_loop(references, ranks, tmp_path):
    file = tmp_path / "references.pt"
    torch.save(references, file)
    by_rank = on_ranks(ranks, objective_splits.errors, ranks, str(file))
    allowed = {
        split.name: objective_splits.allowed(split, references[split.reference][1])
        for split in objective_splits.SPLITS
        if split.ranks == ranks
    }
    worst = {name: max(errors[name] for errors in by_rank) for name in allowed}
    assert {name: (error, allowed[name]) for name, error in worst.items() if not error <= allowed[name]} == {}


@pytest.mark.parametrize("name", objective_splits.WEIGHTS)
def test_each_objective_has_a_part_in_the_router_gradient(references, name):
    with_all = references[objective_splits.splits.ONE.reference][0][ROUTER]
    assert (with_all - references[name][0][ROUTER]).norm() > 0.01 * with_all.norm()

"""A model that four ranks train with three kinds of objectives is the one that a plain loop trains in one process."""

import importlib.util

import pytest
import torch
import two_steps
from ranks import on_ranks
from tolerances import tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")
ROUTER = "decoder.layers.1.mlp.router.weight"


@pytest.fixture(scope="module")
def references():
    return on_ranks(1, two_steps.references)[0]


@pytest.fixture(scope="module")
def by_rank(references, tmp_path_factory):
    file = tmp_path_factory.mktemp("references") / "references.pt"
    torch.save(references, file)
    return on_ranks(4, two_steps.errors, str(file))


@pytest.mark.parametrize("split", two_steps.SPLITS, ids=lambda split: split.name)
def test_gradients_and_parameters_are_those_of_one_process(references, by_rank, split):
    # The second step begins with the rounding of the first.
    allowed = two_steps.STEPS * two_steps.objective_splits.allowed(split, references[split.reference].values)
    for found in by_rank:
        gradients, parameters, _ = found[split.name]
        assert gradients <= allowed and parameters <= allowed


@pytest.mark.parametrize("split", two_steps.SPLITS, ids=lambda split: split.name)
def test_logs_show_what_one_process_has(references, by_rank, split):
    for found in by_rank:
        for shown, wanted in zip(found[split.name][2], references[split.reference].values, strict=True):
            values = {name: shown[f"{name}_loss"] for name in wanted}
            assert values == pytest.approx(wanted, rel=tolerance(torch.float32, 4))


@pytest.mark.parametrize("name", two_steps.WEIGHTS)
def test_each_objective_has_a_part_in_the_router_gradient(references, name):
    trained = references[two_steps.SPLITS[0].reference], references[name]
    with_all, without = (each.gradients[-1][ROUTER] for each in trained)
    assert (with_all - without).norm() > 0.1 * with_all.norm()

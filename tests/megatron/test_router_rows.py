"""Objectives on the rows of Megatron's routers: the gradient that they add, however a step is split."""

import importlib.util

import pytest
import router_rows
import torch
from ranks import on_ranks
from tolerances import assert_close, tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_rows_add_to_the_gradient(ranks):
    for by_split in on_ranks(ranks, router_rows.gradients, ranks):
        assert len(by_split) == {1: 4, 2: 16}[ranks]
        for name, routers in by_split.items():
            assert len(routers) == (1 if name.startswith("PP") else 2)
            # Megatron divides by the number of tokens in float32.
            dtype = torch.float32 if "per token" in name else torch.float64
            for found, wanted in routers:
                assert wanted.abs().max() > 1e-3
                assert_close(found, wanted, tolerance(dtype, 1024))


def test_what_no_router_tells_is_refused():
    on_experts, of_many_groups = on_ranks(1, router_rows.patched)[0]
    assert on_experts == (
        "edl::megatron.patch_spec: objectives must do with experts, logits, router_gram, scores, weights, which is "
        "what routers hand over (got 'coupling', which needs router_responses)"
    )
    assert of_many_groups == "no error"

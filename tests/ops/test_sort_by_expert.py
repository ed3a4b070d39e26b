"""Grouping slots by expert: stable, complete, and the same for any number of threads."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from edl import ops


@hypothesis.given(st.integers(0, 300), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_every_slot_once_in_the_order_of_experts_then_slots(num_tokens, top_k, num_experts, seed, narrow):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, num_experts + 1, (num_tokens, top_k), generator=generator)
    row_order, offsets = ops.sort_by_expert(experts.int() if narrow else experts, num_experts)
    assert row_order.dtype == offsets.dtype == torch.int32
    slots = row_order.long()
    assert slots.sort().values.equal(torch.arange(num_tokens * top_k))
    keys = experts.flatten()[slots] * (num_tokens * top_k + 1) + slots
    assert (keys.diff() > 0).all()
    assert offsets[0] == 0
    counts = torch.bincount(experts.flatten(), minlength=num_experts + 1)
    assert offsets.diff().equal(counts[:num_experts].int())


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_experts", [1, 7, 4000])
def test_many_slots_on_any_number_of_threads(num_experts, num_threads):
    experts = torch.randint(0, num_experts + 1, (60_000, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        row_order, offsets = ops.sort_by_expert(experts, num_experts)
    finally:
        torch.set_num_threads(before)
    assert row_order.equal(experts.flatten().argsort(stable=True).int())
    assert offsets[-1] == (experts < num_experts).sum()


@pytest.mark.parametrize("wrong", [-1, 10, 2**40, -(2**40)])
def test_the_first_wrong_id_is_named(wrong):
    experts = torch.randint(0, 9, (30_000, 2))
    experts.view(-1)[[41_000, 59_999]] = wrong
    with pytest.raises(IndexError) as error:
        ops.sort_by_expert(experts, 9)
    assert str(error.value) == (
        "edl::sort_by_expert: experts must be at least 0 and at most 9, the number of experts, which means no expert "
        f"(got {wrong} at slot 41000)"
    )

"""What the loss gave when it had a path of its own, it gives: to 1e-12 of the largest number, however it is split."""

import pytest
import stored_losses
from ranks import on_ranks
from safetensors.torch import load_file
from tolerances import assert_close


@pytest.fixture(scope="module")
def stored():
    return load_file(stored_losses.FILE)


def check(found, stored):
    for name, value in found.items():
        # Domains that nearly agree: the divergence is a difference of logarithms of rounded means.
        assert_close(value, stored[name], 1e-12)


def test_alone_and_with_a_memory(stored):
    found = on_ranks(1, stored_losses.of_one_process)[0]
    check(found, stored)
    assert len(found) >= 2 * (11 * 11 + 3)


@pytest.mark.parametrize("split", stored_losses.SPLITS)
def test_on_ranks(stored, split):
    for found in on_ranks(split[0] * split[1], stored_losses.of_a_rank, *split):
        check(found, stored)


def test_the_file_holds_nothing_else(stored):
    ranks = sum(data * context for data, context in stored_losses.SPLITS)
    alone = 2 * (11 * (1 + 4 + 4 + 2) + 3)
    assert len(stored) == alone + 2 * 11 * 3 * ranks

"""What is known of a model's layers without its weights."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class LayerFacts(NamedTuple):
    """A Mixture-of-Experts layer.

    Attributes:
        number (int): of the layer in the model, from 0; dense layers are counted and absent.
        name (str): of its router, "model.layers.3.mlp.gate", or "" where it has none.
        num_experts (int): E.
        top_k (int): K; 0 where it is not known.
    """

    number: int
    name: str
    num_experts: int
    top_k: int


def numbers_of(names: Sequence[str]) -> list[int]:
    """The numbers of layers in their model.

    Args:
        names (sequence of str): of the modules of a model that are one in each layer, in its order.

    Returns:
        The first number in each name, "model.layers.3.mlp.gate" is 3; where one has none, or two have the same, as in
        an encoder and a decoder, their places from 0.
    """
    found = [re.search(r"(?:^|\.)(\d{1,9})(?=\.|$)", name) for name in names]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))

"""What is known of a model's layers without its weights."""

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

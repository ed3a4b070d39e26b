"""What is known of the tokens of a call, as it is given beside observations."""

from collections.abc import Mapping

from torch import Tensor

from edl.labels.batch import Batch
from edl.ops import checks
from edl.routing import Observation, tokens_seen


def batch_of(
    op: str,
    layers: list[Observation],
    attention_mask: Tensor | None,
    padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    labels: Mapping[str, Tensor],
) -> Batch:
    """The batch of these layers' tokens.

    Args:
        op (str): in whose name it refuses.
        layers (list of Observation): of all layers.
        attention_mask, padding_mask, cu_seqlens, labels: as `Batch` takes them.

    Raises:
        ValueError: nothing was observed, or no dense tensors.
    """
    seen = tokens_seen(layers, op)
    checks.check_tensors(op, observations=seen)
    size = max(layer.batch_size for layer in layers)
    num_tokens = seen.shape[0] if seen.dim() > 0 else 0
    return Batch(num_tokens, seen.device, size, attention_mask, padding_mask, cu_seqlens, labels, op)

"""What objectives on weights share: no token matters to them, and all ranks have the same, so that each is one unit."""

import torch
from torch import Tensor

from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.objectives.base import Sums


def no_tokens(batch: Batch) -> Segments:
    """Segments without a token, for which no mask or label is looked at."""
    ids = torch.zeros(0, dtype=torch.int32, device=batch.device)
    return Segments(ids, 1, torch.zeros(1, dtype=torch.int64, device=batch.device))


def one_unit(losses: Tensor) -> Sums:
    """The two sums of a mean over ranks and micro-batches, of losses [L] of the same weights in each."""
    return {"loss": losses, "ranks": torch.ones_like(losses)}


def mean_over_units(sums: Sums) -> Tensor:
    """The mean [L] of what `one_unit` gave on each rank."""
    return sums["loss"] / sums["ranks"]

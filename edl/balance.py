"""Losses and updates that keep the load of the experts even."""

from typing import List, Optional, Sequence

import torch
from torch import Tensor

from edl.moe import MoELayer, Routing
from edl import ops


def _refuse_both(attention_mask: Optional[Tensor], padding_mask: Optional[Tensor], op: str) -> None:
    if attention_mask is not None and padding_mask is not None:
        raise ValueError(f"edl.{op}: give attention_mask or padding_mask, not both (got both)")

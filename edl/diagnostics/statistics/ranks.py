"""Statistics of several ranks become one: those of a layer are added, those of several layers stand beside each
other."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.statistics.state import shapes_by_name
from edl.diagnostics.statistics.sums import OP
from edl.reduction.ranks import Group, gather, process_group


def summed(
    header: dict[str, Any], tensors: Mapping[str, Tensor], name: str, group: Group
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of all ranks of a group.

    Args:
        header, tensors: of this rank.
        name (str): of the argument that the group was given as.
        group (ProcessGroup or DeviceMesh of one dimension): all its ranks call.

    Raises:
        ValueError: no such group, ranks that do not fit together; all ranks raise.
    """
    ranks = process_group(name, group)
    assert ranks is not None
    layers = _layers_of(gather(ranks, header))
    # NCCL moves what lies on its devices alone.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(ranks) else "cpu"
    shapes = shapes_by_name(layers, len(header["domains"]), len(header["steps"]))
    whole: dict[str, Tensor] = {}
    for dtype in (torch.int64, torch.float64):
        of_type = {key: shape for key, (shape, its) in shapes.items() if its == dtype}
        parts = [tensors[key] if key in tensors else torch.zeros(shape, dtype=dtype) for key, shape in of_type.items()]
        if parts:
            row = torch.cat([part.reshape(-1) for part in parts]).to(device)
            dist.all_reduce(row, group=ranks)
            pieces = row.cpu().split([part.numel() for part in parts])
            whole |= {key: piece.view(shape) for (key, shape), piece in zip(of_type.items(), pieces)}
    return {**header, "layers": [layer._asdict() for layer in layers]}, whole


def _layers_of(headers: list[tuple[int, dict[str, Any]]]) -> list[LayerFacts]:
    """The layers of all ranks, which know the same of each.

    Raises:
        ValueError: they do not, or have other domains or snapshots.
    """
    first_rank, first = headers[0]
    layers: dict[int, LayerFacts] = {}
    for rank, header in headers:
        for name in ("domains", "steps", "scores", "labels"):
            if header[name] != first[name]:
                raise ValueError(
                    f"edl::{OP}: all ranks must have the same {name} (got {first[name]} on rank {first_rank}, "
                    f"{header[name]} on rank {rank})"
                )
        for facts in (LayerFacts(**layer) for layer in header["layers"]):
            known = layers.setdefault(facts.number, facts)
            if known[2:] != facts[2:]:
                raise ValueError(
                    f"edl::{OP}: all ranks must know the same of layer {facts.number} (got {known.num_experts} "
                    f"experts, {known.top_k} for each token, and on rank {rank} {facts.num_experts} and {facts.top_k})"
                )
    return [layers[number] for number in sorted(layers)]

"""Makes Megatron's training log reduce and show the loss beside its own auxiliary losses, whose names it lists."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

try:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker  # from 0.18 on
except ImportError:
    get_moe_metrics_tracker = None

NAME = "expert_divergence_loss"


def report_divergence() -> None:
    """Adds the loss to what the log of this process shows; called again, it changes nothing."""
    if get_moe_metrics_tracker is not None:
        tracker = get_moe_metrics_tracker()
        tracker.report = _naming_divergence(tracker)
    else:
        moe_utils.reduce_aux_losses_tracker_across_ranks = _reducing_divergence(
            moe_utils.reduce_aux_losses_tracker_across_ranks
        )


def _naming_divergence(tracker: "MoEMetricsTracker") -> Callable:
    """`tracker.report` that also names the loss."""
    report = tracker.report
    if hasattr(report, "names_divergence"):
        return report

    @functools.wraps(report)
    def naming(*args, track_names=None, **kwargs):
        if track_names is not None and NAME not in track_names:
            track_names = [*([track_names] if isinstance(track_names, str) else track_names), NAME]
            num_layers = kwargs.get("num_layers")
            if num_layers is not None:  # a stage without MoE layer has none yet, and would keep the others waiting
                tracker.ensure_initialized(NAME, num_layers + (kwargs.get("mtp_num_layers") or 0))
        return report(*args, track_names=track_names, **kwargs)

    named: Any = naming
    named.names_divergence = True
    return named


def _reducing_divergence(reduce: Callable) -> Callable:
    """`reduce_aux_losses_tracker_across_ranks` that also adds the loss over the pipeline stages.

    Megatron shows every loss in its tracker but adds up over the stages only those it lists.
    """
    if hasattr(reduce, "names_divergence"):
        return reduce

    @functools.wraps(reduce)
    def reducing(track_names=None, **kwargs):
        if track_names is not None and NAME not in track_names and _initialize_on_all_stages(**kwargs):
            track_names = [*track_names, NAME]
        return reduce(track_names, **kwargs)

    named: Any = reducing
    named.names_divergence = True
    return named


def _initialize_on_all_stages(pg_collection=None) -> bool:
    """Gives a stage without MoE layer a tracker of zeros, without which the reduction would hang; False = no stage has
    one."""
    stages = parallel_state.get_pipeline_model_parallel_group() if pg_collection is None else pg_collection.pp
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    device = torch.cuda.current_device()
    num_layers = torch.tensor(tracker[NAME]["values"].numel() if NAME in tracker else 0, device=device)
    torch.distributed.all_reduce(num_layers, op=torch.distributed.ReduceOp.MAX, group=stages)
    if NAME not in tracker and num_layers > 0:
        tracker[NAME] = {"values": torch.zeros(int(num_layers), device=device), "reduce_group": None, "avg_group": None}
    return bool(num_layers > 0)

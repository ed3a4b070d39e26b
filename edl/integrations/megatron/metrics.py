"""Makes Megatron's training log show the loss, its pairs and its divergence beside its own auxiliary losses.

Megatron adds up the entries of its log by layer, over the micro-batches of a step and over pipeline stages, of which it
lists the names. A micro-batch without a pair of domains has the loss 0, which would look perfect: what is shown is the
mean of the micro-batches with a pair, and of a step without any that of the last step that had one (NaN before it), so
that means over steps are not pulled down.
"""

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from edl.divergence_log import DivergenceLog, PairWatch, warn_of_no_pair
from edl.reduction.micro_batches import Moments

try:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker  # from 0.18 on
except ImportError:
    get_moe_metrics_tracker = None

if TYPE_CHECKING:
    from edl.integrations.megatron.router import EDTopKRouter

NAME = "expert_divergence_loss"
NAMES = (NAME, "expert_divergence/nats", "expert_divergence/pairs")


class RouterLog:
    """What Megatron's log says of the losses of a router in the running step.

    Args:
        router (EDTopKRouter): with its layer number.
    """

    def __init__(self, router: "EDTopKRouter") -> None:
        self._sums = DivergenceLog()
        self._last_means: Tensor | None = None
        config = router.config
        is_prediction = getattr(router, "is_mtp_layer", False)  # such layers are told apart from 0.18 on
        self.place = -1 if router.layer_number is None else router.layer_number - 1
        self.place += config.num_layers if is_prediction else 0
        is_repeated = is_prediction and getattr(config, "mtp_use_repeated_layer", False)
        self.repeats = (config.mtp_num_layers or 1) if is_repeated else 1

    def add(self, loss: Tensor, moments: Moments) -> None:
        """Notes the loss of a micro-batch, a scalar."""
        _logs.add(self)  # of routers that live and train
        self._sums.add(loss, moments)

    def end_step(self) -> tuple[list[Tensor], Tensor] | None:
        """What to add to the entries `NAMES`, whose first has the losses already, and whether there was a pair; None
        without a loss."""
        sums = self._sums.sums()
        if sums is None:
            return None
        self._sums.clear()
        losses, _, pairs, with_pair, count = sums.unbind()
        last = torch.full_like(sums[:2], torch.nan) if self._last_means is None else self._last_means
        self._last_means = torch.where(with_pair > 0, sums[:2] / with_pair, last)
        loss, nats = (self._last_means * count).unbind()
        return [number / self.repeats for number in (loss - losses, nats, pairs)], with_pair > 0


_logs: "weakref.WeakSet[RouterLog]" = weakref.WeakSet()
_watch = PairWatch()


def report_divergence() -> None:
    """Adds the loss to what the log of this process shows; called again, it changes nothing."""
    if get_moe_metrics_tracker is not None:
        tracker = get_moe_metrics_tracker()
        tracker.report = _reporting_divergence(tracker)
    else:
        moe_utils.reduce_aux_losses_tracker_across_ranks = _reducing_divergence(
            moe_utils.reduce_aux_losses_tracker_across_ranks
        )


def _reporting_divergence(tracker: "MoEMetricsTracker") -> Callable:
    """`tracker.report` that also shows the loss."""
    report = tracker.report
    if hasattr(report, "shows_divergence"):
        return report

    @functools.wraps(report)
    def reporting(*args, track_names=None, **kwargs):
        num_layers = kwargs.get("num_layers")
        if track_names is not None and num_layers is not None:
            # A stage without MoE layer has no entries yet, and would keep the others waiting.
            _ensure_entries(tracker, num_layers + (kwargs.get("mtp_num_layers") or 0), None)
        values = {name: entry.values for name, entry in tracker.metrics.items()}
        if NAME in values:
            _ensure_entries(tracker, values[NAME].numel(), values[NAME].device)
            values = {name: entry.values for name, entry in tracker.metrics.items()}
        _end_step(values)
        return report(*args, track_names=_with_names(track_names), **kwargs)

    shown: Any = reporting
    shown.shows_divergence = True
    return shown


def _ensure_entries(tracker: "MoEMetricsTracker", num_layers: int, device: Any) -> None:
    for name in NAMES:
        tracker.ensure_initialized(name, num_layers, device)


def _reducing_divergence(reduce: Callable) -> Callable:
    """`reduce_aux_losses_tracker_across_ranks` that also adds the loss over the pipeline stages.

    Megatron shows every loss in its tracker but adds up over the stages only those it lists.
    """
    if hasattr(reduce, "shows_divergence"):
        return reduce

    @functools.wraps(reduce)
    def reducing(track_names=None, **kwargs):
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        # Without a list only a stage that has all of Megatron's own entries can be among the others.
        if NAME in tracker if track_names is None else _is_on_any_stage(tracker, **kwargs):
            for name in NAMES:
                _add_entry(tracker, name)
            _end_step({name: tracker[name]["values"] for name in NAMES})
            track_names = _with_names(track_names)
        return reduce(track_names, **kwargs)

    shown: Any = reducing
    shown.shows_divergence = True
    return shown


def _is_on_any_stage(tracker: dict[str, dict], pg_collection=None) -> bool:
    """Whether a stage has the loss; this one then has an entry of zeros, without which the reduction would hang."""
    stages = parallel_state.get_pipeline_model_parallel_group() if pg_collection is None else pg_collection.pp
    device = torch.cuda.current_device()
    num_layers = torch.tensor(tracker[NAME]["values"].numel() if NAME in tracker else 0, device=device)
    torch.distributed.all_reduce(num_layers, op=torch.distributed.ReduceOp.MAX, group=stages)
    if NAME not in tracker and num_layers > 0:
        tracker[NAME] = {"values": torch.zeros(int(num_layers), device=device), "reduce_group": None, "avg_group": None}
    return bool(num_layers > 0)


def _add_entry(tracker: dict[str, dict], name: str) -> None:
    if name not in tracker:
        tracker[name] = {**tracker[NAME], "values": torch.zeros_like(tracker[NAME]["values"])}


def _with_names(track_names: Any) -> Any:
    if track_names is None:
        return None
    names = [track_names] if isinstance(track_names, str) else list(track_names)
    return names + [name for name in NAMES if name not in names]


def _end_step(values: dict[str, Tensor]) -> None:
    """Adds what the routers of this process noted to the entries of the log."""
    for log in _logs:
        noted = log.end_step()
        if noted is None or log.place < 0 or NAME not in values:
            continue
        for name, number in zip(NAMES, noted[0]):
            values[name][log.place] += number
        _watch.see(noted[1])
    if _watch.end_step():
        _warn_of_no_pair()


@functools.cache
def _warn_of_no_pair() -> None:
    warn_of_no_pair("EDTopKRouter")

"""Makes Megatron's training log show the objectives and what they measure beside its own auxiliary losses.

Megatron adds up the entries of its log by layer, over the micro-batches of a step and over pipeline stages, of which it
lists the names. A micro-batch with nothing to act on, for a divergence one without a pair of domains, has the loss 0,
which would look perfect: what is shown is the mean of the others, and of a step without any that of the last step that
had one (NaN before it), so that means over steps are not pulled down.
"""

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from edl.objectives import Objectives
from edl.routing import Observation

try:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker  # from 0.18 on
except ImportError:
    get_moe_metrics_tracker = None

_names: dict[str, None] = {}  # of the entries, in their order; the same on all pipeline stages


class RouterLog:
    """What Megatron's log says of the objectives of a router in the running step.

    Args:
        router (TopKRouter): with its layer number.
        objectives (Objectives): of the router.
    """

    def __init__(self, router: TopKRouter, objectives: Objectives) -> None:
        self._objectives = objectives
        self._num_losses = 0
        self._last: dict[str, Tensor] = {}  # means of the latest step that had any
        config = router.config
        self.place = place_of(router)
        is_prediction = getattr(router, "is_mtp_layer", False)
        is_repeated = is_prediction and getattr(config, "mtp_use_repeated_layer", False)
        self._repeats = (config.mtp_num_layers or 1) if is_repeated else 1

    @property
    def first_name(self) -> str:
        """Of the entries, the one that Megatron makes."""
        return f"{next(iter(self._objectives.objectives))}_loss"

    def count_loss(self) -> None:
        """Notes that a micro-batch had its losses."""
        _logs.add(self)  # of routers that live and train
        self._num_losses += 1

    def end_step(self) -> dict[str, Tensor]:
        """What to add to the entries, by name; nothing without a loss."""
        numbers = {}
        for name, (total, count) in _by_entry(self._objectives).items():
            last = self._last.get(name, torch.nan)
            self._last[name] = torch.where(count > 0, total / count, last)
            numbers[name] = self._last[name] * self._num_losses / self._repeats
        self._num_losses = 0
        return numbers


def place_of(router: TopKRouter) -> int:
    """The layer of a router among those of the model, from 0, multi-token prediction last; below 0 where it is not
    known."""
    if router.layer_number is None:
        return -1
    is_prediction = getattr(router, "is_mtp_layer", False)  # such layers are told apart from 0.18 on
    return router.layer_number - 1 + (router.config.num_layers if is_prediction else 0)


_logs: "weakref.WeakSet[RouterLog]" = weakref.WeakSet()


def _by_entry(objectives: Objectives) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and numbers by the names of the log's entries, of objectives of one layer."""
    return {
        f"{name}_loss" if entry == "loss" else f"{name}/{entry}": sums
        for name, entries in objectives.take_sums().items()
        for entry, sums in entries.items()
        if entry != "layer_0"
    }


def _entries_of(objectives: Objectives) -> list[str]:
    """The names of the log's entries, told by the losses of two tokens: a stage without MoE layer has no others."""
    probe = objectives.bind()
    probe.statistics = probe.evaluation_statistics = None
    # An option may have to divide the number of experts, which is not known here, and leave no expert alone.
    options = [x for objective in objectives.objectives.values() for x in vars(objective).values() if type(x) is int]
    num_experts = math.lcm(8, *[2 * x for x in options if x > 0])
    label_sets = {objective.labels for objective in objectives.objectives.values()}
    with torch.enable_grad():
        logits = torch.zeros(2, num_experts, device="cpu", requires_grad=True)
        scores = logits.softmax(dim=1)
        experts = torch.arange(2, device="cpu").expand(2, 2).contiguous()
        probe(
            Observation(logits, scores, scores[:, :2], experts, batch_size=1, router_gram=logits.T @ logits),
            **{name: torch.zeros(1, dtype=torch.long, device="cpu") for name in label_sets if name is not None},
        )
    return list(_by_entry(probe))


def report(objectives: Objectives) -> None:
    """Adds the objectives to what the log of this process shows; called again, it changes nothing."""
    if not objectives.objectives:
        return
    _names.update(dict.fromkeys(_entries_of(objectives)))
    if get_moe_metrics_tracker is not None:
        tracker = get_moe_metrics_tracker()
        tracker.report = _reporting_objectives(tracker)
    else:
        moe_utils.reduce_aux_losses_tracker_across_ranks = _reducing_objectives(
            moe_utils.reduce_aux_losses_tracker_across_ranks
        )


def _reporting_objectives(tracker: "MoEMetricsTracker") -> Callable:
    """`tracker.report` that also shows the objectives."""
    report = tracker.report
    if hasattr(report, "shows_objectives"):
        return report

    @functools.wraps(report)
    def reporting(*args, track_names=None, **kwargs):
        num_layers = kwargs.get("num_layers")
        if track_names is not None and num_layers is not None:
            # A stage without MoE layer has no entries yet, and would keep the others waiting.
            _ensure_entries(tracker, num_layers + (kwargs.get("mtp_num_layers") or 0), None)
        values = {name: entry.values for name, entry in tracker.metrics.items()}
        known = _known(values)
        if known is not None:
            _ensure_entries(tracker, values[known].numel(), values[known].device)
            values = {name: entry.values for name, entry in tracker.metrics.items()}
        _end_step(values)
        return report(*args, track_names=_with_names(track_names), **kwargs)

    shown: Any = reporting
    shown.shows_objectives = True
    return shown


def _known(entries: dict[str, Any]) -> str | None:
    """An entry that is there, as of all objectives or none."""
    return next((name for name in _names if name in entries), None)


def _ensure_entries(tracker: "MoEMetricsTracker", num_layers: int, device: Any) -> None:
    for name in _names:
        tracker.ensure_initialized(name, num_layers, device)


def _reducing_objectives(reduce: Callable) -> Callable:
    """`reduce_aux_losses_tracker_across_ranks` that also adds the objectives over the pipeline stages.

    Megatron shows every loss in its tracker but adds up over the stages only those it lists.
    """
    if hasattr(reduce, "shows_objectives"):
        return reduce

    @functools.wraps(reduce)
    def reducing(track_names=None, **kwargs):
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        # Without a list only a stage that has all of Megatron's own entries can be among the others.
        if _known(tracker) if track_names is None else _is_on_any_stage(tracker, **kwargs):
            for name in _names:
                _add_entry(tracker, name)
            _end_step({name: tracker[name]["values"] for name in _names})
            track_names = _with_names(track_names)
        return reduce(track_names, **kwargs)

    shown: Any = reducing
    shown.shows_objectives = True
    return shown


def _is_on_any_stage(tracker: dict[str, dict], pg_collection=None) -> bool:
    """Whether a stage has objectives; this one then has an entry of zeros, without which the reduction would hang."""
    stages = parallel_state.get_pipeline_model_parallel_group() if pg_collection is None else pg_collection.pp
    device = torch.cuda.current_device()
    known = _known(tracker)
    num_layers = torch.tensor(0 if known is None else tracker[known]["values"].numel(), device=device)
    torch.distributed.all_reduce(num_layers, op=torch.distributed.ReduceOp.MAX, group=stages)
    if known is None and num_layers > 0:
        values = torch.zeros(int(num_layers), device=device)
        tracker[next(iter(_names))] = {"values": values, "reduce_group": None, "avg_group": None}
    return bool(num_layers > 0)


def _add_entry(tracker: dict[str, dict], name: str) -> None:
    if name not in tracker:
        known = tracker[str(_known(tracker))]
        tracker[name] = {**known, "values": torch.zeros_like(known["values"])}


def _with_names(track_names: Any) -> Any:
    if track_names is None:
        return None
    names = [track_names] if isinstance(track_names, str) else list(track_names)
    return names + [name for name in _names if name not in names]


def _end_step(values: dict[str, Tensor]) -> None:
    """Adds what the routers of this process noted to the entries of the log."""
    for log in _logs:
        for name, number in log.end_step().items():
            if log.place >= 0 and name in values:
                values[name][log.place] += number

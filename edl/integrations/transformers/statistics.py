"""The routing of a model in transformers' `Trainer`: what each domain chooses, in training and in evaluation."""

import os
from typing import Any

import torch
from transformers import TrainerCallback

from edl.diagnostics.statistics import RoutingStatistics
from edl.ops import checks

NAME = "routing_statistics"


class RoutingStatisticsCallback(TrainerCallback):
    """Counts, logs and saves what the experts of a model do, for a Trainer with `EDTrainerMixin`.

        class EDTrainer(EDTrainerMixin, Trainer): ...

        EDTrainer(model, args, train_dataset=dataset, eval_dataset=held_out, callbacks=[
            RoutingStatisticsCallback(RoutingStatistics(["code", "news"]), per_layer=True),
        ])

    Objectives may stand beside it or not. Data sets need a column of labels, as for objectives; evaluation without one
    is not counted, which is warned of once. Every `snapshot_steps` optimizer steps the sums since the last time become
    a snapshot, whose measures (`moe/cv_mean`, …: `RoutingStatistics.measures`) stand in the next log of the training
    loss. Every evaluation logs its measures as `eval_moe/cv_mean`, …, of its own tokens; where the examples do not
    divide among processes, Trainer evaluates some twice, and they count twice. All are those of all processes together.

    The sums of the training are saved in every checkpoint and at the end in the output folder, as
    `routing_statistics.safetensors`, those of the latest evaluation beside it as `routing_statistics_eval.safetensors`.
    A training that resumes goes on with those of its checkpoint; any other begins without.

    Args:
        statistics (RoutingStatistics): of the training, which begins with none of its sums.
        snapshot_steps (int): at least 1. Default: 500, as often as Trainer logs by default.
        per_layer, per_pair (bool): what to log, as `RoutingStatistics.measures` takes them. Default: False.

    Attributes:
        statistics (RoutingStatistics): of the training, on this process.
        evaluation (RoutingStatistics): of the latest evaluation, on this process.

    Raises:
        ValueError: no such statistics or options; at the begin of a training, a Trainer without `EDTrainerMixin`.
    """

    def __init__(
        self,
        statistics: RoutingStatistics,
        snapshot_steps: int = 500,
        per_layer: bool = False,
        per_pair: bool = False,
    ) -> None:
        if not isinstance(statistics, RoutingStatistics):
            raise ValueError(
                "edl::RoutingStatisticsCallback: statistics must be edl.RoutingStatistics (got "
                f"{type(statistics).__name__})"
            )
        checks.check_flags("RoutingStatisticsCallback", per_layer=per_layer, per_pair=per_pair)
        self.snapshot_steps = checks.as_integer("RoutingStatisticsCallback", "snapshot_steps", snapshot_steps, lowest=1)
        self.statistics, self.evaluation = statistics, statistics.emptied()
        self.is_bound = False  # by the mixin
        self._shown = {"per_layer": per_layer, "per_pair": per_pair}
        self._to_log: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_bound:
            raise ValueError(
                "edl::RoutingStatisticsCallback: the Trainer must derive from EDTrainerMixin and be given the callback "
                "in callbacks (got another one)"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.snapshot_steps == 0:
            self.statistics.snapshot(state.global_step)
            whole = self.statistics.reduce(_all_processes(args), only_latest=True)
            self._to_log = whole.measures(**self._shown, snapshot=-1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.snapshot_steps:
            self.statistics.snapshot(state.global_step)
        self.save(args, args.output_dir)

    def take_log(self) -> dict[str, float]:
        """The measures of the latest snapshot, once."""
        taken, self._to_log = self._to_log, {}
        return taken

    def begin_training(self) -> None:
        """Forgets what another training counted."""
        self.statistics.reset()
        self._to_log = {}

    def end_evaluation(self, args: Any, prefix: str) -> dict[str, float]:
        """The measures of an evaluation, by the names of its metrics; saves its sums.

        Args:
            args (TrainingArguments): of the Trainer.
            prefix (str): of metrics.
        """
        whole = self.evaluation.reduce(_all_processes(args))
        if args.should_save and whole.layers:
            os.makedirs(args.output_dir, exist_ok=True)
            name = f"{NAME}_{prefix}".replace("/", "_")  # a data set may be called so
            whole.save(os.path.join(args.output_dir, f"{name}.safetensors"))
        return {f"{prefix}_{name}": value for name, value in whole.measures(**self._shown).items()}

    def save(self, args: Any, folder: str) -> None:
        """Writes the sums of all processes into a folder; all processes call it."""
        whole = self.statistics.reduce(_all_processes(args))
        if args.should_save:
            os.makedirs(folder, exist_ok=True)
            whole.save(os.path.join(folder, f"{NAME}.safetensors"))

    def load(self, args: Any, folder: str) -> None:
        """Goes on with the sums in a folder, where it has some. One process takes them up, whatever the number of
        processes was; the others begin with none of them."""
        path = os.path.join(folder, f"{NAME}.safetensors")
        if os.path.exists(path):
            loaded = RoutingStatistics.load(path).state_dict()
            if args.process_index > 0:
                loaded |= {name: torch.zeros_like(x) for name, x in loaded.items() if name != "header"}
            self.statistics.load_state_dict(loaded)


def _all_processes(args: Any) -> Any:
    return torch.distributed.group.WORLD if args.world_size > 1 else None

"""Measures in the log of a loop of one's own."""

from typing import Any

from edl.diagnostics.statistics.routing_statistics import RoutingStatistics


def write_measures(
    writer: Any, statistics: RoutingStatistics, step: int, per_layer: bool = False, per_pair: bool = False
) -> None:
    """Writes what statistics measure into TensorBoard.

        writer = torch.utils.tensorboard.SummaryWriter("runs/first")
        write_measures(writer, statistics.reduce(group), step)

    Args:
        writer (SummaryWriter): or what else has `add_scalar(name, value, step)`.
        statistics (RoutingStatistics): of all ranks; ranks beside the one that writes have no writer.
        step (int): of the training.
        per_layer, per_pair (bool): as `RoutingStatistics.measures` takes them.

    Raises:
        ValueError: something that cannot write.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise ValueError(
            f"edl::write_measures: writer must have add_scalar, as a SummaryWriter (got {type(writer).__name__})"
        )
    for name, value in statistics.measures(per_layer, per_pair).items():
        whole = name.encode("utf-8", "replace").decode("utf-8")  # a domain's name may hold half a character
        writer.add_scalar(whole, value, step)

"""Sums of a routing over training or evaluation, of any framework."""

from edl.diagnostics.statistics.routing_statistics import RoutingStatistics, Snapshot
from edl.diagnostics.statistics.sums import CourseSums, LayerSums
from edl.diagnostics.statistics.tensorboard import write_measures

__all__ = ["CourseSums", "LayerSums", "RoutingStatistics", "Snapshot", "write_measures"]

"""Findings for other programs: tables, JSON, MoELens and TensorBoard."""

from edl.diagnostics.exports.moelens import write_moelens
from edl.diagnostics.exports.numbers import write_json
from edl.diagnostics.exports.tables import write_csv
from edl.diagnostics.exports.tensorboard import write_tensorboard

__all__ = ["write_csv", "write_json", "write_moelens", "write_tensorboard"]

"""Statements with an interval: what of a routing's differences is more than chance, and more than the token."""

from edl.diagnostics.cells import certain_cells
from edl.diagnostics.changes import compare_runs
from edl.diagnostics.choices import compare
from edl.diagnostics.information import information
from edl.diagnostics.standardised import beyond_token

__all__ = ["beyond_token", "certain_cells", "compare", "compare_runs", "information"]

"""Choices that other programs have recorded, as a record: a file per format."""

from edl.diagnostics.traces.reading import read_trace

__all__ = ["read_trace"]

"""The runs that a report is about: files and folders, read and looked at."""

import dataclasses
import pathlib
from collections.abc import Sequence

from edl.diagnostics import looking
from edl.diagnostics.files import header_of
from edl.diagnostics.findings import Findings, Interventions
from edl.diagnostics.interventions import FILE, read_interventions
from edl.diagnostics.record import KIND as RECORD_KIND
from edl.diagnostics.record import Record
from edl.diagnostics.statistics import RoutingStatistics
from edl.diagnostics.statistics.state import KIND as STATISTICS_KIND


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What is known of a run.

    Attributes:
        title (str): its folder's name.
        statistics (RoutingStatistics, optional): sums.
        record (Record, optional): of documents.
        interventions (Interventions, optional): what experts are needed for.
    """

    title: str
    statistics: RoutingStatistics | None
    record: Record | None
    interventions: Interventions | None

    def findings(self, examples: int, progress: looking.Progress) -> Findings:
        """Measures, tests and intervals."""
        return looking.findings_of(
            self.statistics, self.record, self.title, self.interventions, examples, progress=progress
        )


def read_runs(paths: Sequence[str], titles: Sequence[str] | None = None) -> list[Run]:
    """The runs that files belong to: those of one folder are one, and a folder stands for the files in it.

    Args:
        paths: folders that `edl observe` has written, or files of statistics and records.
        titles: of the runs, in their order. Default: the names of their folders.

    Raises:
        ValueError: a file that is none of ours, a folder without one, two of a kind in a folder.
    """
    files: dict[pathlib.Path, dict[str, pathlib.Path]] = {}
    for path in map(pathlib.Path, paths):
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"edl::report: a folder must hold statistics or a record (got {path} without)")
        for file in found:
            kind = header_of(file, "report")["kind"]
            run = files.setdefault(file.resolve().parent, {})
            if kind not in (STATISTICS_KIND, RECORD_KIND):
                raise ValueError(f"edl::report: files must be statistics or a record (got {file}, a {kind})")
            if run.setdefault(kind, file) != file:
                raise ValueError(f"edl::report: a run must have one {kind} (got {run[kind]} and {file})")
    if titles and len(titles) != len(files):
        raise ValueError(f"edl::report: there must be a title for each of {len(files)} runs (got {len(titles)})")
    names = titles or _different([folder.name or "routing" for folder in files])
    return [_read(name, folder, run) for name, (folder, run) in zip(names, files.items())]


def _different(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} {place}" for place, name in enumerate(names, 1)]


def _read(title: str, folder: pathlib.Path, run: dict[str, pathlib.Path]) -> Run:
    statistics = RoutingStatistics.load(run[STATISTICS_KIND]) if STATISTICS_KIND in run else None
    record = Record.load(run[RECORD_KIND]) if RECORD_KIND in run else None
    path = folder / FILE
    return Run(title, statistics, record, read_interventions(path) if path.is_file() else None)

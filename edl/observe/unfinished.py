"""What a run has done so far, in files: a run that is killed goes on there, with the same result."""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from edl.corpus.parts import lock
from edl.diagnostics.files import header_of, write_whole
from edl.diagnostics.interventions import FILE as INTERVENTIONS
from edl.diagnostics.record import Record, joined
from edl.diagnostics.statistics import RoutingStatistics

STATISTICS, RECORD = "statistics.safetensors", "record.safetensors"
_STATE = "state.json"


class Unfinished:
    """The folder of a run: what is in it belongs to it, and one process at a time has it.

    A step is written in three files, of which the last one counts: the documents since the step before, the sums of all
    documents so far, and how many these are.

    Args:
        output: folder of the run; new, or empty, or of a run like this one.
        run: a word that is another one for another model, text or options.

    Attributes:
        done (int): how many documents were looked at.
        is_finished (bool): whether all were, and the results are in place.

    Raises:
        ValueError: the folder is of another run, or in use.
    """

    def __init__(self, output: str | os.PathLike[str], run: str) -> None:
        self.output, self.run = pathlib.Path(output), run
        self.folder = self.output / "unfinished"
        self.output.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.output, os.O_RDONLY)
        try:
            lock(self._descriptor, self.output)
            self._take_up()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def _take_up(self) -> None:
        self.done, self._parts = 0, 0
        results = [path for path in (self.output / STATISTICS, self.output / RECORD) if path.exists()]
        are_own = [header_of(path, "observe").get("facts", {}).get("run") == self.run for path in results]
        self.is_finished = len(results) == 2 and all(are_own)
        state = self._state()
        if self.is_finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif state is not None and state["run"] == self.run and all(are_own):
            self.done, self._parts = state["done"], state["parts"]
        elif results or self._holds_something() or (self.output / INTERVENTIONS).exists():
            raise ValueError(
                "edl::observe: output must be empty, or of a run with the same model, text and options (got "
                f"{self.output} of another one: remove it, or name another folder)"
            )

    def _holds_something(self) -> bool:
        """Whether there is more than what a run leaves that ended before its first step."""
        return any(not path.name.lstrip(".").startswith(_STATE) for path in self.folder.glob("*"))

    def _state(self) -> dict[str, Any] | None:
        """What the last step says; None without one that is whole."""
        try:
            state = json.loads((self.folder / _STATE).read_text())
            return {name: state[name] for name in ("run", "done", "parts")}
        except (KeyError, OSError, TypeError, ValueError):
            return None

    def _part(self, number: int) -> pathlib.Path:
        return self.folder / f"part-{number:05}.safetensors"

    def _sums(self, number: int) -> pathlib.Path:
        return self.folder / f"sums-{number:05}.safetensors"

    def statistics(self) -> RoutingStatistics | None:
        """The sums so far; None at the beginning."""
        return RoutingStatistics.load(self._sums(self._parts)) if self._parts else None

    def step(self, record: Record, statistics: RoutingStatistics) -> None:
        """Keeps what was seen since the step before, and the sums so far."""
        record.save(self._part(self._parts))
        statistics.save(self._sums(self._parts + 1))
        self._write_state(self.done + len(record), self._parts + 1)
        self._sums(self._parts - 1).unlink(missing_ok=True)

    def begin(self) -> None:
        """Makes the folder, so that another run keeps out of it from here on."""
        self.folder.mkdir(exist_ok=True)
        self._write_state(self.done, self._parts)

    def _write_state(self, done: int, parts: int) -> None:
        write_whole(self.folder / _STATE, json.dumps({"run": self.run, "done": done, "parts": parts}).encode())
        self.done, self._parts = done, parts

    def finish(self, order: Sequence[int], facts: dict[str, Any], token_texts: dict[int, str]) -> None:
        """Puts the results in place and removes the parts.

        Args:
            order: of the documents in the record, by their places in the run.
            facts: of model, text and sample.
            token_texts: by token id.
        """
        statistics = self.statistics()
        assert statistics is not None
        parts = [Record.load(self._part(number)) for number in range(self._parts)]
        facts = {**facts, "run": self.run}
        joined(parts, order, facts, token_texts).save(self.output / RECORD)
        statistics.facts = facts
        statistics.save(self.output / STATISTICS)
        shutil.rmtree(self.folder)
        self.is_finished = True

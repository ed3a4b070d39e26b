"""What a run has done so far, in files: a run that is killed goes on there, with the same result."""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from edl.corpus.parts import lock
from edl.diagnostics.files import write_whole
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
        self.done, self.is_finished, self._parts = 0, False, 0
        finished = [path for path in (self.output / STATISTICS, self.output / RECORD) if path.exists()]
        state = self._state()
        if state is not None and state.get("run") == self.run:
            self.is_finished = bool(state["finished"]) and len(finished) == 2
            self.done, self._parts = state["done"], state["parts"]
        elif finished or state is not None:
            raise ValueError(
                "edl::observe: output must be empty, or of a run with the same model, text and options (got "
                f"{self.output} of another one: remove it, or name another folder)"
            )

    def _state(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.folder / _STATE).read_text())
            return state if isinstance(state, dict) and {"run", "done", "parts", "finished"} <= state.keys() else {}
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _part(self, number: int) -> pathlib.Path:
        return self.folder / f"part-{number:05}.safetensors"

    def statistics(self) -> RoutingStatistics | None:
        """The sums so far; None at the beginning."""
        return RoutingStatistics.load(self.folder / f"sums-{self._parts:05}.safetensors") if self._parts else None

    def step(self, record: Record, statistics: RoutingStatistics) -> None:
        """Keeps what was seen since the step before, and the sums so far."""
        self.folder.mkdir(exist_ok=True)
        record.save(self._part(self._parts))
        statistics.save(self.folder / f"sums-{self._parts + 1:05}.safetensors")
        self._write_state(self.done + len(record), self._parts + 1, False)
        (self.folder / f"sums-{self._parts - 1:05}.safetensors").unlink(missing_ok=True)

    def _write_state(self, done: int, parts: int, finished: bool) -> None:
        state = {"run": self.run, "done": done, "parts": parts, "finished": finished}
        write_whole(self.folder / _STATE, json.dumps(state).encode())
        self.done, self._parts, self.is_finished = done, parts, finished

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
        joined(parts, order, facts, token_texts).save(self.output / RECORD)
        statistics.facts = facts
        statistics.save(self.output / STATISTICS)
        self._write_state(self.done, self._parts, True)
        for path in self.folder.iterdir():
            if path.name != _STATE:
                path.unlink()

    def remove(self) -> None:
        """Forgets what was done."""
        shutil.rmtree(self.folder, ignore_errors=True)

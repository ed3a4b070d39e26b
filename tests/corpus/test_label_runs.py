"""Runs that are interrupted anywhere, repeated or spread over processes leave the same bytes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ENVIRONMENT, ROOT
from corpora import ROWS, content, index_of, label, labels_of, lines, random_rows, refused, write

from edl.corpus import labelling, models
from edl.corpus.parts import Part
from edl.corpus.readers import shards_of


@dataclasses.dataclass(frozen=True)
class Hashes:
    """A labeller that takes any text, and notes in a file what it was asked."""

    domains: tuple[str, ...] = ("a", "b", "c")
    hash: str = "1"
    threshold: float | None = None
    notes: str = os.devnull

    def label(self, documents):
        assert all(document.text and not document.problem for document in documents)
        with open(self.notes, "a") as notes:
            notes.writelines(f"{document.text}\n" for document in documents)
        return np.array([hashlib.sha256(document.text.encode()).digest()[0] % 4 - 1 for document in documents])


@pytest.fixture
def corpus(tmp_path):
    rows = {f"{number}.jsonl": lines(random_rows(number, 8000 // (number + 1))) for number in range(3)}
    return write(tmp_path / "in", rows)


def kill_after(seconds: float, function, *arguments) -> bool:
    """Runs a function in a process that is killed after a while; whether it was."""
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException):
            function(*arguments)
        os._exit(0)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_kills_at_random_moments_do_not_change_a_byte(corpus, tmp_path):
    shards = shards_of([corpus], label_column="source")
    labelling.apply(shards, None, tmp_path / "whole")
    began = time.monotonic()
    labelling.apply(shards, None, tmp_path / "again")
    took = time.monotonic() - began
    chance = random.Random(0)
    killed = 0
    for number in range(8):
        output = tmp_path / f"{number}"
        while not (output / "domains.json").exists():
            killed += kill_after(chance.random() * took, labelling.apply, shards, None, output)
            for path in output.rglob("*.npy"):
                assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), "no half file has its name"
        labelling.apply(shards, None, output)
        assert content(output) == content(tmp_path / "whole")
    assert killed, "no run was long enough to be killed"


@pytest.mark.timeout(600)
def test_a_command_that_is_killed_takes_its_processes_along_and_goes_on(corpus, tmp_path):
    label(corpus, "--column", "source", "--output", tmp_path / "whole")
    output = tmp_path / "out"
    arguments = [corpus, "--column", "source", "--output", output, "--quiet", "--processes", "2"]
    command = [sys.executable, "-m", "edl", "label", "apply", *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)
    while process.poll() is None and not list(output.glob("*.part")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode == 0
    assert content(output) == content(tmp_path / "whole")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("labeller", [None, Hashes()])
def test_a_stop_after_any_write_changes_nothing(labeller, tmp_path, monkeypatch):
    """Every write, rename and deletion of a run is the last of one run, whole or in part; the next goes on."""
    monkeypatch.setattr(labelling, "_BATCH_DOCUMENTS", 7)
    write(tmp_path / "in", {f"{number}.jsonl": lines(random_rows(number, 20)) for number in range(3)})
    shards = shards_of([tmp_path / "in"], label_column="source")
    labelling.apply(shards, labeller, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    stops = 0
    for last in range(200):
        count = 0

        def stopping(original, last=last):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count > last:
                    raise Killed
                return original(*arguments, **options)

            return call

        output = tmp_path / f"out {last}"
        with monkeypatch.context() as context:
            context.setattr(Part, "append", stopping(Part.append))
            context.setattr(os, "replace", stopping(os.replace))
            context.setattr(type(output), "unlink", stopping(type(output).unlink))
            try:
                labelling.apply(shards, labeller, output)
            except Killed:
                stops += 1
        half = sorted(output.glob("*.part"))
        if half and last % 2:
            with open(half[-1], "r+b") as file:  # the last block is not whole
                file.truncate(max(0, half[-1].stat().st_size - last % 11))
        if half and last % 3 == 0:
            with open(half[-1], "ab") as file:
                file.write(b"\0" * 100)  # as a power failure may leave it
        labelling.apply(shards, labeller, output)
        assert {name: data for name, data in content(output).items() if ".unfinished" not in name} == whole
        if count <= last:
            break
    assert 15 < stops < 200


def test_what_was_labelled_is_not_labelled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "_BATCH_DOCUMENTS", 5)
    write(tmp_path / "in", {"a.jsonl": lines({"text": f"{number}", "source": "a"} for number in range(17))})
    shards = shards_of([tmp_path / "in"])
    notes = tmp_path / "notes"
    labeller = Hashes(notes=str(notes))

    def stop(part):
        raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Part, "finish", stop)
        labelling.apply(shards, labeller, tmp_path / "out")
    with pytest.raises(ValueError, match="of another one"):
        labelling.apply(shards, dataclasses.replace(labeller, hash="2"), tmp_path / "out")
    os.truncate(tmp_path / "out/a.part", (tmp_path / "out/a.part").stat().st_size - 1)
    labelling.apply(shards, labeller, tmp_path / "out")
    labelling.apply(shards, labeller, tmp_path / "out")
    assert notes.read_text().split() == [*map(str, range(17)), "15", "16"]


def test_processes_and_repetition_change_nothing(corpus, tmp_path):
    shards = shards_of([corpus], label_column="source")
    outputs = [tmp_path / f"{number}" for number in range(3)]
    for output, processes in zip(outputs, (1, 1, 2)):
        labelling.apply(shards, Hashes(), output, processes=processes)
    assert content(outputs[0]) == content(outputs[1]) == content(outputs[2])


def test_a_model_labels_what_has_a_text(tmp_path):
    write(tmp_path / "in", {"a.jsonl": lines(ROWS)})
    summary = labelling.apply(shards_of([tmp_path / "in"]), Hashes(threshold=0.5, hash="x"), tmp_path / "out")
    texts = ["one", "twö", "", None, "five", "six"]
    expected = [hashlib.sha256(text.encode()).digest()[0] % 4 - 1 if text else -1 for text in texts]
    assert labels_of(tmp_path / "out") == {"a": expected}
    index = index_of(tmp_path / "out")
    assert (index["domains"], index["model"], index["threshold"]) == (["a", "b", "c"], "x", 0.5)
    below = sum(label == -1 for label in expected) - 2
    assert index["unlabelled"] == {"empty": 1, "no text": 1, **({"no probable domain": below} if below else {})}
    assert dataclasses.asdict(summary).items() <= index.items()


@pytest.mark.parametrize("given", [[0], [0, 1, 2, 3], [0, 1, -2, 0], [0, 1, 3, 0]])
def test_a_model_that_does_not_do_its_part_is_a_sentence(given, tmp_path):
    class Broken(Hashes):
        def label(self, documents):
            return np.array(given)

    write(tmp_path / "in", {"a.jsonl": lines(ROWS)})
    with pytest.raises(ValueError, match=r"a model must give a label in \[-1, 3\)"):
        labelling.apply(shards_of([tmp_path / "in"]), Broken(), tmp_path / "out")


def test_a_model_is_loaded_in_each_process_and_its_threshold_kept(tmp_path, monkeypatch):
    class Fake:
        domains, hash = ["x", "y"], "abc"

        def predict(self, texts):
            return np.arange(len(texts), dtype=np.int16) % 2, np.linspace(0, 1, len(texts), dtype=np.float32)

    monkeypatch.setattr(models, "_load", lambda path: Fake())
    write(tmp_path / "in", {"a.jsonl": lines(ROWS)})
    for threshold, expected in ((None, [0, 1, -1, -1, 0, 1]), (0.5, [-1, -1, -1, -1, 0, 1]), (1.0, [-1] * 5 + [1])):
        options = [] if threshold is None else ["--threshold", threshold]
        output = tmp_path / f"{threshold}"
        label(tmp_path / "in", "--model", tmp_path / "model", *options, "--output", output)
        assert labels_of(output) == {"a": expected}
        assert (index_of(output)["model"], index_of(output)["threshold"]) == ("abc", threshold)


def test_one_failure_ends_all_processes_with_its_sentence(corpus, tmp_path):
    write(corpus, {"broken.jsonl.gz": b"\x1f\x8b no"})
    with pytest.raises(ValueError, match=r"files that are whole \(got .*broken"):
        labelling.apply(shards_of([corpus], label_column="source"), None, tmp_path / "out", processes=2)


@dataclasses.dataclass(frozen=True)
class Deadly(Hashes):
    def label(self, documents):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_sentence(corpus, tmp_path):
    with pytest.raises(ValueError, match="processes must not be killed"):
        labelling.apply(shards_of([corpus]), Deadly(), tmp_path / "out", processes=2)


def test_two_runs_do_not_write_one_output(tmp_path, capsys, monkeypatch):
    text = write(tmp_path / "in", {"English/a": b"a"})
    monkeypatch.setattr("edl.corpus.parts._PATIENCE", 0.3)
    with labelling._held(tmp_path / "out"):
        assert "one run at a time" in refused(capsys, text, "--output", tmp_path / "out")
    with Part(tmp_path / "part/English.part", "x"):
        assert "one run at a time" in refused(capsys, text, "--output", tmp_path / "part")


def test_a_changed_input_is_noticed(tmp_path, capsys):
    write(tmp_path, {"a.jsonl": lines(ROWS)})
    arguments = tmp_path / "a.jsonl", "--column", "source", "--output", tmp_path / "out"
    label(*arguments)
    before = content(tmp_path / "out")
    label(*arguments)
    write(tmp_path, {"a.jsonl": lines(ROWS[::-1])})
    later = (tmp_path / "out/domains.json").stat().st_mtime_ns + 1
    os.utime(tmp_path / "a.jsonl", ns=(later, later))
    assert "an input that has changed" in refused(capsys, *arguments)
    assert content(tmp_path / "out") == before


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Twenty times the documents, 80 MB more: the most that the process ever held differs by a fifth of that."""
    script = """
import sys
from edl import cli
cli.main(["label", "apply", *sys.argv[1:], "--quiet"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peaks = []
    row = json.dumps({"text": "some words " * 400, "source": "web"}).encode() + b"\n"
    for count in (1_000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(row * count)
        command = [sys.executable, "-c", script, path, "--column", "source", "--output", tmp_path / f"{count}"]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT, cwd=ROOT).stdout))
    assert peaks[1] - peaks[0] < 0.2 * 19_000 * len(row) / 1024, peaks

"""What is broken, or made to break a reader, ends in a sentence or a count: no crash, hang or endless memory."""

import gzip
import json
import os
import random
import shutil
import socket

import pytest
from corpora import ROWS, index_of, label, labels_of, lines, refused, write

from edl.corpus import documents
from edl.corpus.readers import folder, jsonl, streams

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.timeout(120)
BROKEN_LINES = {
    b"": None,
    b" \t": None,
    b'{"text": "x", "source": "a"': documents.NOT_JSON,
    b"[" * 200_000: documents.NOT_JSON,
    b'["text"]': documents.NOT_JSON,
    b'{"text": "x", "source": "a", "n": ' + b"9" * 10_000 + b"}": documents.NOT_JSON,
    b"\xff": documents.BAD_UTF8,
    b'{"text": "\\udc00", "source": "a"}': documents.BAD_UTF8,
    b'{"text": ["x"], "source": "a"}': documents.NO_TEXT,
    b'{"source": "a"}': documents.NO_TEXT,
    b'{"text": " \\n", "source": "a"}': documents.EMPTY,
    b'{"text": "x", "source": ""}': documents.NO_LABEL,
    b'{"text": "x", "source": {"a": 1}}': documents.NO_LABEL,
    b'{"text": "x", "source": 1.5}': documents.NO_LABEL,
    b'{"text": "x", "source": "' + b"a" * 300 + b'"}': documents.NO_LABEL,
}


def test_broken_lines_are_counted(tmp_path):
    sound = b'{"text": "x", "source": "a"}'
    rows = [line for broken in BROKEN_LINES for line in (broken, sound)]
    write(tmp_path, {"in.jsonl": b"\xef\xbb\xbf" + sound + b"\r\n" + b"\n".join(rows)})  # no newline at the end
    label(tmp_path / "in.jsonl", "--column", "source", "--output", tmp_path / "out")
    expected = [0]
    for problem in BROKEN_LINES.values():
        expected += [0] if problem is None else [-1, 0]
    assert labels_of(tmp_path / "out")["in"] == expected
    problems = [problem for problem in BROKEN_LINES.values() if problem]
    assert index_of(tmp_path / "out")["unlabelled"] == {problem: problems.count(problem) for problem in problems}


def test_lines_that_are_too_long_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    sound = b'{"text": "x", "source": "a"}'
    edge = sound + b" " * (99 - len(sound))
    content = [sound, b"x" * 100, sound, b"x" * 250, edge, edge + b" ", b"y" * 1000, sound]
    write(tmp_path, {"in.jsonl": b"\n".join(content), "in2.jsonl": b"z" * 100_000})
    label(tmp_path, "--column", "source", "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"in": [0, -1, 0, -1, 0, -1, -1, 0], "in2": [-1]}
    assert index_of(tmp_path / "out")["unlabelled"] == {"too long": 5}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_rows_that_are_cut_off_are_a_sentence(suffix, tmp_path, capsys):
    path = tmp_path / f"in.jsonl.{suffix}"
    with pyarrow.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[suffix]) as stream:
        stream.write(lines({"text": f"{number * number}", "source": "a"} for number in range(3000)))
    whole = path.read_bytes()
    chance = random.Random(0)
    for damage in range(12):
        path.write_bytes(whole[: chance.randrange(1, len(whole))] if damage else b"no such format")
        sentence = refused(capsys, path, "--column", "source", "--output", tmp_path / "out")
        assert "in.jsonl" in sentence
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_bombs_are_a_sentence_or_a_count(suffix, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(streams, "HARMLESS_SIZE", 2**20)
    monkeypatch.setattr(streams, "LARGEST_EXPANSION", 500)
    monkeypatch.setattr(folder, "LONGEST_UNPACKED", 2**20)
    bomb = tmp_path / "bomb"
    with pyarrow.CompressedOutputStream(str(bomb), {"gz": "gzip", "zst": "zstd"}[suffix]) as stream:
        for _ in range(64):
            stream.write(b"\n" * 2**20)
    assert bomb.stat().st_size < 100_000
    shutil.copy(bomb, tmp_path / f"in.jsonl.{suffix}")
    sentence = refused(capsys, tmp_path / f"in.jsonl.{suffix}", "--column", "source", "--output", tmp_path / "a")
    assert "expands to more than 500 times its size" in sentence
    write(tmp_path / "in/English", {f"a.txt.{suffix}": bomb.read_bytes(), "b.txt": b"text"})
    label(tmp_path / "in", "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"English": [-1, 0]}
    assert sum(index_of(tmp_path / "out")["unlabelled"].values()) == 1


def test_damaged_tables_are_a_sentence_or_read_the_same_twice(tmp_path, capsys):
    table = pyarrow.Table.from_pylist(ROWS * 50)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=40)
    chance = random.Random(0)
    refusals = 0
    for kind in ("parquet", "arrow"):
        path = tmp_path / f"a.{kind}"
        whole = path.read_bytes()
        damages = [whole[: chance.randrange(len(whole))] for _ in range(10)] + [b"", b"PAR1", b"no table" * 10]
        damages += [whole[:at] + chance.randbytes(8) + whole[at + 8 :] for at in chance.sample(range(len(whole)), 40)]
        for number, content in enumerate(damages):
            path.write_bytes(content)
            try:
                label(path, "--column", "source", "--output", tmp_path / "out")
            except SystemExit as end:
                printed = capsys.readouterr().err
                assert end.code == 2 and "a." in printed and printed.count("\n") == 1, printed
                refusals += 1
            else:
                assert number >= 13, "what is cut off is never taken for whole"
                assert len(labels_of(tmp_path / "out")["a"]) == 300
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refusals >= 26


def test_columns_that_are_not_there_are_a_sentence(tmp_path, capsys):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for options in (["--column", "domain"], ["--column", "meta.x"], ["--text-column", "body", "--column", "source"]):
        sentence = refused(capsys, tmp_path, *options, "--output", tmp_path / "out")
        assert f"must have the column {options[1]}" in sentence
        shutil.rmtree(tmp_path / "out")


def test_pipes_sockets_and_devices_are_never_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.jsonl"))
    for path in (tmp_path / "pipe.jsonl", tmp_path / "socket.jsonl", "/dev/zero", tmp_path, tmp_path / "missing"):
        refused(capsys, path, "--kind", "jsonl", "--column", "source", "--output", tmp_path / "out")
    text = write(tmp_path / "text", {"English/a.txt": b"a"})
    os.mkfifo(text / "English/b.txt")
    os.symlink("/dev/zero", text / "English/c.txt")
    os.symlink("nowhere", text / "English/d.txt")
    label(text, "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"English": [0, -1, -1, -1]}
    assert index_of(tmp_path / "out")["unlabelled"] == {"unreadable": 3}


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    os.mkfifo(path)
    monkeypatch.setattr(streams, "check_regular", lambda path: None)
    with streams.reading(path) as (stream, _):
        assert stream.read() == b""


def test_links_in_a_circle_end(tmp_path):
    text = write(tmp_path / "text", {"English/a.txt": b"a", "English/b/c.txt": b"c"})
    os.symlink("..", text / "English/b/up")
    os.symlink(".", text / "maths")  # a sub-folder of the input may be a link
    os.symlink("English", text / "also English")
    label(text, "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"English": [0, 0], "also English": [1, 1], "maths": [2, 2]}


def test_ambiguous_inputs_are_a_sentence(tmp_path, capsys):
    mixed = write(tmp_path / "mixed", {"English/a.txt": b"a", "English/b.jsonl": lines(ROWS), "c.json.gz": b""})
    sentence = refused(capsys, mixed, "--output", tmp_path / "out")
    assert "one kind of input" in sentence and "c.json.gz" in sentence and "English" in sentence
    label(mixed, "--kind", "text", "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"English": [0, 0], "mixed": [-1]}
    twice = write(tmp_path / "twice", {"a.jsonl": lines(ROWS), "a.jsonl.gz": gzip.compress(lines(ROWS))})
    assert "names of shards must differ" in refused(capsys, twice, "--column", "source", "--output", tmp_path / "no")
    for empty in (tmp_path / "empty", tmp_path / "empty/inner"):
        empty.mkdir()
        assert "must hold documents" in refused(capsys, tmp_path / "empty", "--output", tmp_path / "no")
    loose = write(tmp_path / "loose", {"a.txt": b"a"})
    assert "labels must come from" in refused(capsys, loose, "--output", tmp_path / "no")
    assert "must be one of .jsonl.gz" in refused(capsys, loose / "a.txt", "--output", tmp_path / "no")
    assert "--threshold" in refused(capsys, mixed, "--kind", "text", "--threshold", "0.5", "--output", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_names_that_a_terminal_would_obey_are_kept_and_not_shown(tmp_path, capsys):
    names = ["a\x1b[2J", os.fsdecode(b"\xff"), "b\nc", "../d"]
    write(tmp_path, {"in.jsonl": lines({"text": "x", "source": name} for name in names if name.isascii())})
    from edl import cli

    cli.main(["label", "apply", str(tmp_path), "--column", "source", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("\n") == 4
    assert index_of(tmp_path / "out")["domains"] == sorted(name for name in names if name.isascii())
    write(tmp_path / "text", {f"{names[1]}/a": b"x", "b\nc/a": b"y"})
    label(tmp_path / "text", "--output", tmp_path / "out2")
    assert labels_of(tmp_path / "out2") == {"b\nc": [0], names[1]: [1]}


def test_a_disk_that_is_full_or_read_only_is_a_sentence(tmp_path, capsys):
    write(tmp_path / "in", {"English/a": b"a"})
    for output in ("/proc/nowhere", tmp_path / "in/English/a"):
        assert "output writable" in refused(capsys, tmp_path / "in", "--output", output)


def test_nothing_is_written_over(tmp_path, capsys):
    text = write(tmp_path / "in", {"English/a": b"a"})
    write(tmp_path / "out", {"English.npy": b"mine"})
    assert "no files of the same names" in refused(capsys, text, "--output", tmp_path / "out")
    assert (tmp_path / "out/English.npy").read_bytes() == b"mine"
    write(tmp_path / "other", {"domains.json": json.dumps({"run": 1}).encode()})
    assert "another one" in refused(capsys, text, "--output", tmp_path / "other")
    write(tmp_path / "part", {"English.part": b"not ours"})
    assert "another one" in refused(capsys, text, "--output", tmp_path / "part")
    assert (tmp_path / "part/English.part").read_bytes() == b"not ours"

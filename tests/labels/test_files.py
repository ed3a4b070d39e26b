"""`edl.labels.read`: what `edl label` wrote comes back as it was, and what is broken is a sentence."""

import json
import os
import subprocess
import sys

import numpy
import pytest
import torch

import edl

SHARDS = {"part/00": [0, 2, -1, 1], "part/01": [], "last": [2, 2]}
INDEX = {
    "version": 1,
    "domains": ["code", "news", "prose"],
    "counts": {"code": 1, "news": 1, "prose": 3},
    "unlabelled": {"empty": 1},
    "threshold": None,
    "model": None,
    "shards": [{"name": name, "documents": len(labels)} for name, labels in SHARDS.items()],
}


@pytest.fixture
def folder(tmp_path):
    for name, labels in SHARDS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        numpy.save(tmp_path / f"{name}.npy", numpy.array(labels, numpy.int16))
    (tmp_path / "domains.json").write_text(json.dumps(INDEX))
    return tmp_path


def rewrite(folder, **changes):
    (folder / "domains.json").write_text(json.dumps({**INDEX, **changes}))


@pytest.mark.parametrize("as_given", [str, lambda path: path])
def test_labels_come_back_as_they_were_written(folder, as_given):
    labels = edl.labels.read(as_given(folder))
    assert labels.domains == ("code", "news", "prose")
    assert labels.counts == INDEX["counts"]
    assert labels.shards == ("part/00", "part/01", "last")
    assert len(labels) == 6
    for shard, written in SHARDS.items():
        assert labels[shard].dtype == torch.int16
        assert labels[shard].tolist() == written
    assert labels.all().dtype == torch.int16
    assert labels.all().tolist() == [0, 2, -1, 1, 2, 2]


def test_a_shard_is_a_view_whose_changes_stay_here(folder):
    labels = edl.labels.read(folder)
    labels["last"][:] = 0
    assert labels["last"].tolist() == [2, 2]
    assert numpy.load(folder / "last.npy").tolist() == [2, 2]


def test_domains_without_documents_count_none(folder):
    rewrite(folder, counts={"prose": 3})
    assert edl.labels.read(folder).counts == {"code": 0, "news": 0, "prose": 3}


def test_a_corpus_without_shards_has_no_labels(folder):
    rewrite(folder, shards=[])
    assert edl.labels.read(folder).all().tolist() == []


BROKEN = {
    "a list": "[1]",
    "no JSON": "{",
    "cut": json.dumps(INDEX)[:-5],
    "deep": "[" * 100_000,
    "another version": json.dumps({**INDEX, "version": 2}),
    "a true version": json.dumps({**INDEX, "version": True}),
    "no domains": json.dumps({**INDEX, "domains": None}),
    "a name twice": json.dumps({**INDEX, "domains": ["a", "a"]}),
    "names that are none": json.dumps({**INDEX, "domains": [["a"], 3]}),
    "counts of others": json.dumps({**INDEX, "counts": {"verse": 3}}),
    "counts that are none": json.dumps({**INDEX, "counts": {"code": "many"}}),
    "negative documents": json.dumps({**INDEX, "shards": [{"name": "last", "documents": -1}]}),
    "no documents": json.dumps({**INDEX, "shards": [{"name": "last"}]}),
    "shards of numbers": json.dumps({**INDEX, "shards": [1]}),
    "a shard twice": json.dumps({**INDEX, "shards": [{"name": "last", "documents": 2}] * 2}),
    "a shard elsewhere": json.dumps({**INDEX, "shards": [{"name": "../last", "documents": 2}]}),
    "a shard of the root": json.dumps({**INDEX, "shards": [{"name": "/last", "documents": 2}]}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_index_is_a_sentence(folder, content):
    (folder / "domains.json").write_text(content)
    with pytest.raises(ValueError, match=r"^edl::labels: [^\n]* must [^\n]*\(got [^\n]*\)$"):
        edl.labels.read(folder)


def test_bytes_that_are_no_text_are_a_sentence(folder):
    (folder / "domains.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be JSON that can be read"):
        edl.labels.read(folder)


@pytest.mark.parametrize("given", ["nowhere", 3, None, b"bytes"])
def test_what_is_no_folder_with_labels_is_a_sentence(given):
    with pytest.raises(ValueError, match="^edl::labels: .* must be a"):
        edl.labels.read(given)


def write_pickle(path):
    numpy.save(path, numpy.array([{}, {}]), allow_pickle=True)


def write_half(path):
    path.write_bytes(path.read_bytes()[:-1])


ARRAYS = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "empty": lambda path: path.write_bytes(b""),
    "half": write_half,
    "text": lambda path: path.write_text("0, 1"),
    "a pickle": write_pickle,
    "int64": lambda path: numpy.save(path, numpy.array([2, 2])),
    "two dimensions": lambda path: numpy.save(path, numpy.array([[2, 2]], numpy.int16)),
    "another length": lambda path: numpy.save(path, numpy.array([2], numpy.int16)),
    "a label of no domain": lambda path: numpy.save(path, numpy.array([2, 3], numpy.int16)),
    "a label below -1": lambda path: numpy.save(path, numpy.array([2, -2], numpy.int16)),
}


@pytest.mark.parametrize("spoil", ARRAYS.values(), ids=ARRAYS.keys())
def test_a_broken_array_is_a_sentence_and_spares_the_others(folder, spoil):
    labels = edl.labels.read(folder)
    spoil(folder / "last.npy")
    for ask in (lambda: labels["last"], labels.all):
        with pytest.raises(ValueError, match=r"^edl::labels: [^\n]* must [^\n]*\(got [^\n]*\)$"):
            ask()
    assert labels["part/00"].tolist() == SHARDS["part/00"]


def test_an_unknown_shard_is_a_sentence(folder):
    with pytest.raises(ValueError, match=r"must be one of the 3 that were read \(got 'first'\)"):
        edl.labels.read(folder)["first"]


def test_numpy_is_asked_for_where_an_array_is_read(folder):
    code = f"""
import sys
sys.modules["numpy"] = None  # not installed
import edl
labels = edl.labels.read({str(folder)!r})
assert labels.domains[0] == "code"
try:
    labels["last"]
except ImportError as error:
    assert str(error).startswith("edl::labels: numpy must be installed"), error
else:
    raise SystemExit("numpy was not asked for")
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

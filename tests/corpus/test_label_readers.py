"""Every kind of input gives the labels that its rows say, in their order."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from corpora import BY_COLUMN, ROWS, index_of, label, labels_of, lines, refused, write

from edl.corpus import weborganizer
from edl.corpus.readers import shards_of

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

UNLABELLED = {"empty": 1, "no text": 1}


def as_zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def save_jsonl(folder):
    write(folder, {"rows.jsonl": lines(ROWS)})


def save_gzip(folder):
    write(folder, {"rows.json.gz": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:]))})


def save_zst(folder):
    write(folder, {"rows.jsonl.zst": as_zst(lines(ROWS[:2])) + as_zst(lines(ROWS[2:]))})


def save_parquet(folder):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=2)


def save_strings_of_other_kinds(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    table = table.set_column(0, "text", table["text"].cast(pyarrow.large_string()))
    table = table.set_column(1, "source", table["source"].dictionary_encode())
    parquet.write_table(table, folder / "rows.parquet")


def save_dataset(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)


def save_arrow_file(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(folder / "rows.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)


SAVE = [save_jsonl, save_gzip, save_zst, save_parquet, save_strings_of_other_kinds, save_dataset, save_arrow_file]


@pytest.mark.parametrize("column", BY_COLUMN)
@pytest.mark.parametrize("save", SAVE)
def test_rows_have_the_labels_of_a_column(save, column, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in")
    label(tmp_path / "in", "--column", column, "--output", tmp_path / "out")
    domains, labels = BY_COLUMN[column]
    index = index_of(tmp_path / "out")
    assert list(labels_of(tmp_path / "out").values()) == [labels]
    assert index["domains"] == domains
    missing = sum(label == -1 for label in labels) - 2
    assert index["unlabelled"] == {**UNLABELLED, **({"no label": missing} if missing else {})}
    assert (index["version"], index["threshold"], index["model"]) == (1, None, None)


@pytest.mark.parametrize("save", SAVE)
def test_documents_from_any_of_them_on_are_the_rest(save, tmp_path):
    save(tmp_path)
    [shard] = shards_of([tmp_path], label_column="source")
    documents = list(shard.documents())
    assert [document.text for document in documents] == [row["text"] or None for row in ROWS]
    assert 0 < shard.position <= shard.num_bytes
    for start in range(len(ROWS) + 1):
        assert list(shard.documents(start)) == documents[start:]


def test_folders_have_the_labels_of_their_names(tmp_path):
    files = {
        "English/b.txt": b"one",
        "English/a/c": gzip.compress(b"two"),
        "English/a.txt": b"\xef\xbb\xbfthree",
        "English/.hidden": b"no",
        "中文/1": "你好".encode(),
        "中文/2": "你好".encode("gb18030"),
        "maths/blank.txt": b" \n\n",
        "maths/empty.txt.zst": as_zst(b""),
        "maths/x.zst": as_zst(b"x" * 3_000_000),
    }
    files["English/a/c.gz"] = files.pop("English/a/c")
    folder = write(tmp_path / "in", files)
    label(folder, "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"English": [0, 0, 0], "maths": [-1, -1, 1], "中文": [2, -1]}
    assert index_of(tmp_path / "out")["domains"] == ["English", "maths", "中文"]
    assert index_of(tmp_path / "out")["unlabelled"] == {"bad UTF-8": 1, "empty": 2}
    [english, maths, _] = shards_of([folder])
    assert [document.text for document in english.documents()] == ["three", "one", "two"]
    assert [document.text for document in english.documents(2)] == ["two"]
    assert len(list(maths.documents())[2].text) == 2**20, "the beginning is kept"


def test_rows_in_folders_have_their_labels_and_keep_their_names(tmp_path):
    files = {"code/a/0.jsonl": ROWS[:1], "code/a/1.jsonl": [], "web/0.jsonl": ROWS[:2], "2.jsonl": ROWS[:1]}
    folder = write(tmp_path / "in", {name: lines(rows) for name, rows in files.items()})
    label(folder, "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"2": [-1], "code/a/0": [0], "code/a/1": [], "web/0": [1, 1]}
    label(folder, folder / "2.jsonl", "--column", "source", "--output", tmp_path / "two")
    assert list(labels_of(tmp_path / "two")) == ["2", "in/2", "in/code/a/0", "in/code/a/1", "in/web/0"]


def test_numbers_of_a_class_label_are_its_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": list("abc"), "label": [1, 0, 1]}, features=features)
    rows.save_to_disk(tmp_path / "in" / "data", num_shards=2)
    rows.to_parquet(tmp_path / "rows.parquet")
    label(tmp_path / "in", "--column", "label", "--output", tmp_path / "out")
    assert list(labels_of(tmp_path / "out").values()) == [[1, 0], [1]]
    label(tmp_path / "rows.parquet", "--column", "label", "--output", tmp_path / "out2")
    assert index_of(tmp_path / "out2")["domains"] == ["no", "yes"]


def test_splits_of_a_dataset_are_shards(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "in")
    label(tmp_path / "in", "--column", "source", "--output", tmp_path / "out")
    test, train = labels_of(tmp_path / "out").items()
    assert (test, train) == (
        ("test/data-00000-of-00001", [2]),
        ("train/data-00000-of-00001", BY_COLUMN["source"][1]),
    )


def test_text_that_is_no_utf8_is_counted_row_by_row(tmp_path):
    column = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"text": column, "source": ["a", "a", "b"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"text": "good", "source": "a"}\n{"text": "\xff", "source": "a"}\n{"text": "fine", "source": "b"}\n'
        b'{"text": "\\ud800", "source": "b"}\n'
    )
    for kind, bad in (("parquet", 1), ("arrow", 1), ("jsonl", 2)):
        output = tmp_path / f"of {kind}"
        label(tmp_path / f"rows.{kind}", "--column", "source", "--output", output)
        assert labels_of(output)["rows"] == [0, -1, 1, -1][: 2 + bad]
        assert index_of(output)["unlabelled"] == {"bad UTF-8": bad}


def test_rows_without_text_are_labelled_where_nobody_asks_for_it(tmp_path):
    rows = [{"input_ids": [1, 2], "source": "a"}, {"input_ids": [3], "source": "b"}]
    write(tmp_path, {"rows.jsonl": lines(rows)})
    label(tmp_path, "--column", "source", "--output", tmp_path / "a")
    assert index_of(tmp_path / "a")["unlabelled"] == {"no text": 2}
    label(tmp_path / "rows.jsonl", "--column", "source", "--no-text", "--output", tmp_path / "b")
    assert labels_of(tmp_path / "b") == {"rows": [0, 1]}


def write_megatron(prefix, documents):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True, parents=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_megatrons_documents_have_the_labels_of_their_folders(tmp_path, capsys):
    pytest.importorskip("megatron.core")
    write_megatron(tmp_path / "in/code/a", [[[1, 2], [3]], [[4]], []])
    write_megatron(tmp_path / "in/web/b", [[[5, 6, 7]]])
    label(tmp_path / "in", "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"code/a": [0, 0, -1], "web/b": [1]}
    assert index_of(tmp_path / "out")["unlabelled"] == {"empty": 1}
    np.save(tmp_path / "a.npy", np.array([0, 1, 0]))
    label(tmp_path / "in/code/a.idx", "--lists", tmp_path, "--output", tmp_path / "listed")
    assert labels_of(tmp_path / "listed") == {"a": [0, 1, -1]}
    sentence = refused(capsys, tmp_path / "in", "--model", tmp_path, "--output", tmp_path / "no")
    assert "must be labelled by folder, column or list" in sentence
    content = (tmp_path / "in/code/a.idx").read_bytes()
    for broken in (
        content[:50],
        content[:20],
        b"",
        content[:17] + b"\x63" + content[18:],
        content[:34] + b"\xff" * 12 + content[46:],
        content[:-8] + b"\x09" + content[-7:],
    ):
        (tmp_path / "in/code/a.idx").write_bytes(broken)
        assert "a.idx" in refused(capsys, tmp_path / "in", "--output", tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")
    (tmp_path / "in/code/a.idx").write_bytes(content)
    for tokens in (b"", b"\0" * 8):
        (tmp_path / "in/code/a.bin").write_bytes(tokens)
        assert "a.idx" in refused(capsys, tmp_path / "in", "--output", tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")


def test_lists_of_numbers_are_labels(tmp_path, capsys):
    write(tmp_path / "in", {"a/x.jsonl": lines(ROWS), "y.jsonl": lines(ROWS[:2])})
    (tmp_path / "lists/a").mkdir(parents=True)
    np.save(tmp_path / "lists/a/x__choice.npy", np.array([5, 23, 0, 0, -1, 24]))
    np.save(tmp_path / "lists/y.npy", np.array([0, 5], np.uint8))
    arguments = (tmp_path / "in", "--lists", tmp_path / "lists", "--domains", "weborganizer-topics")
    label(*arguments, "--output", tmp_path / "out")
    assert labels_of(tmp_path / "out") == {"a/x": [5, 23, -1, -1, -1, -1], "y": [0, 5]}
    index = index_of(tmp_path / "out")
    assert index["domains"] == list(weborganizer.TOPICS) and len(set(index["domains"])) == 24
    assert index["domains"][5] == "Hardware" and index["domains"][23] == "Travel"
    assert index["unlabelled"] == {"empty": 1, "no text": 1, "no label": 1, "unknown label": 1}
    label(*arguments[:3], "--output", tmp_path / "numbers")
    assert index_of(tmp_path / "numbers")["domains"] == ["0", "5", "23", "24"]
    for numbers, rule in (
        (np.zeros(3, int), "for each document (got 3 in"),
        (np.zeros(1, int), "for each document (got 1 in"),
        (np.zeros(2), "integers"),
        (np.zeros((2, 1), int), "integers"),
        (np.array([{}, {}]), "an .npy file"),
    ):
        np.save(tmp_path / "lists/y.npy", numbers, allow_pickle=True)
        assert rule in refused(capsys, *arguments, "--output", tmp_path / "no")
        shutil.rmtree(tmp_path / "no")
    (tmp_path / "lists/y.npy").unlink()
    assert "y__choice.npy" in refused(capsys, *arguments, "--output", tmp_path / "no")


def test_domains_can_be_given(tmp_path, capsys):
    write(tmp_path, {"rows.jsonl": lines(ROWS), "names": "web\n\n Bücher \ncode\n".encode()})
    arguments = (tmp_path / "rows.jsonl", "--column", "source")
    label(*arguments, "--domains", tmp_path / "names", "--output", tmp_path / "a")
    label(*arguments, "--domains", tmp_path / "a/domains.json", "--output", tmp_path / "b")
    for output in (tmp_path / "a", tmp_path / "b"):
        assert labels_of(output) == {"rows": [0, -1, -1, -1, -1, 2]}
        assert index_of(output)["counts"] == {"web": 1, "Bücher": 0, "code": 1}
        assert index_of(output)["unlabelled"]["unknown label"] == 1
    for content in ("a\na\n", "\n".join(map(str, range(2**15 + 1)))):
        (tmp_path / "names").write_text(content)
        assert "must differ" in refused(capsys, *arguments, "--domains", tmp_path / "names", "--output", tmp_path / "c")
    for path in ("missing", "rows.jsonl/x", "names.json"):
        (tmp_path / "names.json").write_text(json.dumps([1]))
        assert "--domains" in refused(capsys, *arguments, "--domains", tmp_path / path, "--output", tmp_path / "c")


def test_more_domains_than_int16_has_are_refused(tmp_path, capsys):
    rows = [{"text": "x", "source": f"{number}"} for number in range(2**15 + 1)]
    write(tmp_path, {"a.jsonl": lines(rows)})
    assert "at most 32768" in refused(capsys, tmp_path, "--column", "source", "--output", tmp_path / "out")
    write(tmp_path / "two", {"a.jsonl": lines(rows[:-1]), "b.jsonl": lines(rows[1:])})
    assert "at most 32768" in refused(capsys, tmp_path / "two", "--column", "source", "--output", tmp_path / "out2")
    label(tmp_path / "two/a.jsonl", "--column", "source", "--output", tmp_path / "out3")
    assert labels_of(tmp_path / "out3")["a"] == list(range(2**15))

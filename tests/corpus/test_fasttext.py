"""fastText models, made here byte by byte, by numbers that are known and with damage that the library does not see."""

import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("fasttext")

from edl import cli
from edl.corpus.fasttext import FastText

WORDS = ["</s>", "the", "cat", "数学"]
LABELS = ["__label__English", "__label__mathematics", "plain"]
INPUTS, OUTPUTS = (np.random.default_rng(seed).normal(size=(rows, 3)).astype("<f4") for seed, rows in ((0, 4), (1, 3)))
SOFTMAX, SUPERVISED = 3, 3


def model_of(
    words=WORDS,
    labels=LABELS,
    inputs=INPUTS,
    outputs=OUTPUTS,
    version=12,
    kind=SUPERVISED,
    buckets=0,
    longest=0,
    quantised=False,
):
    """A file as fastText 0.9 writes it: sizes, words and labels, two matrices."""
    options = (3, 5, 5, 1, 5, 1, SOFTMAX, kind, buckets, 0, longest, 100, 1e-4)
    parts = [struct.pack("<2i12id", 793712314, version, *options)]
    parts.append(struct.pack("<3i2q", len(words) + len(labels), len(words), len(labels), 99, -1))
    for names, is_label in ((words, 0), (labels, 1)):
        parts += [name.encode() + b"\0" + struct.pack("<qb", 7, is_label) for name in names]
    for matrix in (inputs, outputs):
        parts += [struct.pack("<?2q", False, *matrix.shape), matrix.tobytes()]
    if quantised:
        parts[-4:-2] = [struct.pack("<2?2qi", True, False, 4, 3, 8), CODES.tobytes(), QUANTISER, CENTROIDS.tobytes()]
    return b"".join(parts)


# Rows of 3 numbers in two parts, of 2 and 1, each one of 256.
CODES = np.random.default_rng(2).integers(256, size=(4, 2), dtype=np.uint8)
CENTROIDS = np.random.default_rng(3).normal(size=256 * 3).astype("<f4")
QUANTISER = struct.pack("<4i", 3, 2, 2, 1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(model_of())
    return path


def by_hand(rows, inputs=INPUTS):
    """Softmax of the mean of rows, as the library has it."""
    scores = OUTPUTS.astype(np.float64) @ inputs[rows].astype(np.float64).mean(0)
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def test_labels_are_those_of_the_formula(path):
    model = FastText.load(path)
    assert model.domains == ["English", "mathematics", "plain"]
    ids, probabilities = model.predict(["the cat", "数学", "the\nthe cat", "unknown"])
    expected = [by_hand(rows) for rows in ([1, 2, 0], [3, 0], [1, 1, 2, 0], [0])]
    assert (ids.dtype, probabilities.dtype) == (np.int16, np.float32)
    assert ids.tolist() == [np.argmax(row) for row in expected]
    np.testing.assert_allclose(probabilities, [row.max() for row in expected], atol=3e-5)


def test_a_quantised_model(tmp_path):
    path = tmp_path / "model.ftz"
    path.write_bytes(model_of(quantised=True))
    pairs, singles = CENTROIDS[:512].reshape(256, 2), CENTROIDS[512:, None]
    inputs = np.concatenate([pairs[CODES[:, 0]], singles[CODES[:, 1]]], 1)
    ids, probabilities = FastText.load(path).predict(["the cat", "数学"])
    expected = [by_hand(rows, inputs) for rows in ([1, 2, 0], [3, 0])]
    assert ids.tolist() == [np.argmax(row) for row in expected]
    np.testing.assert_allclose(probabilities, [row.max() for row in expected], atol=3e-5)
    for size in range(0, path.stat().st_size, 7):
        path.write_bytes(model_of(quantised=True)[:size])
        with pytest.raises(ValueError, match="edl::label: a fastText model must be a whole file"):
            FastText.load(path)


def test_only_the_beginning_counts(path):
    model = FastText.load(path)
    assert model.predict(["数学 " * 1000])[1] == model.predict(["数学 " * 667 + "the " * 99])[1]


def test_a_text_that_says_nothing_has_no_label(tmp_path):
    (tmp_path / "model.bin").write_bytes(model_of(words=["a"], inputs=INPUTS[:1]))
    ids, probabilities = FastText.load(tmp_path / "model.bin").predict(["unknown", "", "a"])
    assert ids[:2].tolist() == [-1, -1] and probabilities[:2].tolist() == [0, 0] and ids[2] >= 0


def test_hostile_texts_are_no_error(path):
    ids, probabilities = FastText.load(path).predict(["\ud800", "\0", "a" * 10**6, "\r\n\v", "\u2028"])
    assert ids.min() >= -1 and np.isfinite(probabilities).all()


def test_the_hash_is_that_of_the_file(path):
    before = FastText.load(path).hash
    assert before == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]


CUTS = """
import sys
from edl.corpus.fasttext import FastText
whole = open(sys.argv[1], "rb").read()
for size in range(len(whole)):
    with open(sys.argv[2], "wb") as file:
        file.write(whole[:size])
    try:
        FastText.load(sys.argv[2])
    except ValueError as error:
        assert str(error).startswith("edl::label: a fastText model must be a whole file of a supervised model (got ")
        continue
    raise SystemExit(f"{size} bytes were taken")
"""


def test_a_model_cut_anywhere_is_a_sentence(path, tmp_path):
    """In a process of its own: the library alone hangs or crashes."""
    result = subprocess.run([sys.executable, "-c", CUTS, path, tmp_path / "cut.bin"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_sizes_that_are_changed_are_a_sentence_or_a_model(path, tmp_path):
    """Every integer of the header and the dictionary, replaced by one that is not so."""
    command = """
import sys
from edl.corpus.fasttext import FastText
whole, taken = open(sys.argv[1], "rb").read(), 0
for place in range(0, whole.index(b"</s>")):
    for value in (b"\\x00", b"\\x7f", b"\\xff"):
        with open(sys.argv[2], "wb") as file:
            file.write(whole[:place] + value + whole[place + 1 :])
        try:
            FastText.load(sys.argv[2]).predict(["the cat", "数学"])
            taken += 1
        except ValueError as error:
            assert str(error).startswith("edl::label: a fastText model must be ")
print(taken)
"""
    result = subprocess.run(
        [sys.executable, "-c", command, path, tmp_path / "changed.bin"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"version": 13}, "no fastText model"),
        ({"kind": 1}, "not supervised"),
        ({"longest": 3}, "sizes that are not positive"),
        ({"buckets": 2}, "a matrix of another size"),
        ({"labels": ["a", "a", "b"]}, "labels of one name"),
        ({"outputs": OUTPUTS[:2]}, "a matrix of another size"),
        ({"labels": [], "outputs": OUTPUTS[:0]}, "0 labels"),
    ],
)
def test_models_that_would_crash_are_refused(tmp_path, options, reason):
    (tmp_path / "model.bin").write_bytes(model_of(**options))
    with pytest.raises(ValueError, match=reason):
        FastText.load(tmp_path / "model.bin")


def test_no_file_and_other_files(tmp_path):
    (tmp_path / "text.bin").write_text("this is text")
    (tmp_path / "empty.bin").touch()
    for name in ("none.bin", "text.bin", "empty.bin"):
        with pytest.raises(ValueError, match="edl::label: a fastText model must be a whole file"):
            FastText.load(tmp_path / name)


def test_the_command_labels_with_it(path, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "the cat"}\n{"text": "数学"}\n')
    command = ["label", "apply", str(tmp_path / "text.jsonl"), "--model", str(path), "--output", str(tmp_path / "out")]
    cli.main(command)
    expected = [int(np.argmax(by_hand(rows))) for rows in ([1, 2, 0], [3, 0])]
    labels = np.load(pathlib.Path(tmp_path / "out" / "text.npy"))
    assert labels.tolist() == expected
    assert "2  documents, labels in" in capsys.readouterr().out

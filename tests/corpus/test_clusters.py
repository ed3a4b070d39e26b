"""`edl label cluster`: groups that are there are found, and are a classifier."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from corpus_texts import WORDS, documents

from edl import cli
from edl.corpus.classifier import Classifier
from edl.corpus.clusters import cluster
from edl.corpus.features import Features
from edl.corpus.telling import beginning, telling_words

SMALL = Features(hash_bits=12)


@pytest.fixture(scope="module")
def model():
    return cluster(documents(40)[0], 3, SMALL)


def test_clusters_are_the_domains(model):
    texts, labels = documents(30, seed=1)
    ids, probabilities = model.predict(texts)
    pairs = {(label, int(group)) for label, group in zip(labels, ids)}
    assert len(pairs) == 3 == len({group for _, group in pairs})
    assert [row["name"] for row in model.rows] == ["cluster-0", "cluster-1", "cluster-2"]
    assert probabilities.min() > 0.5


def test_the_largest_comes_first():
    texts = documents(40)[0]
    model = cluster(texts[:15] + texts[40:80] + texts[80:105], 3, SMALL)
    assert [row["documents"] for row in model.rows] == [40, 25, 15]
    assert model.measured == {"documents": 80}


def test_the_odds_of_the_median_document_are_9_to_1():
    texts = documents(41, seed=2)[0][:82]
    model = cluster(texts, 2, SMALL)
    assert np.median(model.predict(texts)[1]) == pytest.approx(0.9, abs=0.01)


def test_a_cluster_has_words_of_its_domain_and_examples(model):
    for row, ids in zip(model.rows, (0, 1, 2)):
        [example, *_] = row["examples"]
        assert model.predict([example.removesuffix("…")])[0] == [ids] and len(row["examples"]) == 3
    of_words = [row["telling"] for row in model.rows]
    for name in ("English", "mathematics"):
        vocabulary = set(re.findall("[a-z]+", " ".join(WORDS[name])))
        assert any(len(found) >= 3 and set(found) <= vocabulary for found in of_words)
    assert any("工具" in found for found in of_words)


def test_telling_words_are_those_of_odds_ratios():
    texts = ["both mine"] * 9 + ["both"] + ["both other"] * 6 + ["both mine"] * 2
    groups = np.array([0] * 10 + [1] * 8)
    # mine: 9 of 10 and 2 of 8: log(9.5 * 6.5 / (1.5 * 2.5)) is 2.80, its error 1.17.
    assert telling_words(texts, groups, 2, 100) == [["mine"], ["other"]]
    assert telling_words(texts, groups, 2, 4) == [[], []]


def test_scripts_without_blanks_have_pairs_of_letters():
    found = telling_words(["选择 命令"] * 9 + ["数学"] * 9, np.array([0] * 9 + [1] * 9), 2, 100)
    assert found == [["命令", "选择"], ["数学"]]


def test_a_beginning_is_one_line_that_no_terminal_obeys():
    assert beginning("a\n\tb \x1b[31m red") == "a b \ufffd[31m red"
    assert beginning("word " * 99) == ("word " * 16)[:79] + "…"


CLUSTER = """
import sys
sys.path.insert(0, sys.argv[1])
from corpus_texts import documents
from edl.corpus.clusters import cluster
cluster(documents(40, words=3)[0], 5).save(sys.argv[2])
"""


def test_the_same_bits_with_any_number_of_threads(tmp_path):
    files = []
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        folder = tmp_path / threads
        subprocess.run([sys.executable, "-c", CLUSTER, os.path.dirname(__file__), folder], env=environment, check=True)
        files.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(files[0]) == 2 and files[0] == files[1]


@pytest.mark.parametrize("number", [1, 7])
def test_numbers_of_clusters_that_cannot_be(number):
    with pytest.raises(ValueError) as error:
        cluster(documents(2)[0], number, SMALL)
    assert str(error.value) == f"edl::label: clusters must be from 2 to 6, of 6 documents (got {number})"


@pytest.mark.parametrize("texts", [["the same"] * 5, [""] * 5, ["", "a"]])
def test_documents_without_difference_are_no_error(texts):
    model = cluster(texts, 2, SMALL)
    assert np.isfinite(model.probabilities(texts)).all()


def test_the_command_prints_what_tells_clusters_apart(tmp_path, capsys):
    for text, label, number in zip(*documents(20), range(60)):
        (tmp_path / "text" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / label / f"{number}.txt").write_text(text)
    options = ["--clusters", "3", "--documents", "50", "--output", str(tmp_path / "groups")]
    cli.main(["label", "cluster", str(tmp_path / "text"), *options])
    printed = capsys.readouterr().out
    assert "cluster-0, " in printed and " of 50 documents\n" in printed
    assert f'To name them, change each "name" in {tmp_path / "groups"}/model.json.' in printed
    assert Classifier.load(tmp_path / "groups").domains == ["cluster-0", "cluster-1", "cluster-2"]
    cli.main(
        [
            "label",
            "apply",
            str(tmp_path / "text"),
            "--model",
            str(tmp_path / "groups"),
            "--output",
            str(tmp_path / "labels"),
        ]
    )
    assert "20  cluster-0\n" in capsys.readouterr().out

"""The classifier of `edl label train`: what it learns, how good it says it is, and what is kept of it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from corpus_texts import WORDS, documents
from safetensors.numpy import load_file, save

from edl import cli
from edl.corpus.classifier import Classifier
from edl.corpus.features import Features
from edl.corpus.training import share, train

SMALL = Features(hash_bits=10, longest=3)


@pytest.fixture(scope="module")
def model():
    return train(*documents(12), SMALL)


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def test_it_learns_domains_that_differ(model):
    texts, labels = documents(40, seed=1)
    ids, probabilities = model.predict(texts)
    assert (ids.dtype, probabilities.dtype, model.domains) == (np.int16, np.float32, sorted(WORDS))
    assert [model.domains[place] for place in ids] == labels
    assert probabilities.min() > 0.5 and probabilities.max() <= 1


def test_probabilities_are_a_softmax_of_sums_over_n_grams(model):
    texts = documents(2, seed=2)[0] + [""]
    vectors = SMALL.of(texts).toarray().astype(np.float64)
    odds = np.exp(vectors @ model.weights.astype(np.float64) + model.bias.astype(np.float64))
    np.testing.assert_allclose(model.probabilities(texts), odds / odds.sum(1, keepdims=True), rtol=1e-4)


def test_a_text_has_the_same_probabilities_in_any_company(model):
    texts = documents(30, seed=3)[0]
    together = model.probabilities(texts)
    alone = np.concatenate([model.probabilities([text]) for text in texts])
    assert together.tobytes() == alone.tobytes()
    assert model.predict([])[0].shape == (0,)


def test_two_domains_have_probabilities_of_both():
    texts, labels = documents(12)
    two = train(texts[:24], labels[:24], SMALL)
    assert two.weights.shape == (SMALL.buckets, 2)
    ids, probabilities = two.predict(documents(10, seed=4)[0][:20])
    assert ids.tolist() == [0] * 10 + [1] * 10 and probabilities.min() > 0.5


def test_what_is_measured_was_not_seen():
    """Labels that mean nothing are found right as often as chance has it, though the model knows its own examples."""
    letters = np.random.default_rng(0).choice([*"abcdefghijklmnop    "], (120, 60))
    texts = ["".join(row) for row in letters]
    labels = ["first", "second"] * 60
    random_model = train(texts, labels, SMALL)
    assert (random_model.predict(texts)[0] == [0, 1] * 60).mean() > 0.95
    low, high = random_model.measured["held_out"]["interval"]
    assert low < 0.5 < high


def test_what_is_measured_adds_up(model):
    measured = model.measured
    assert np.sum(measured["confusion"], 1).tolist() == [12, 12, 12]
    assert np.trace(measured["confusion"]) == measured["held_out"]["correct"]
    assert [line["examples"] for line in measured["curve"]] == [5, 9]
    assert measured["curve"][-1]["correct"] == measured["held_out"]["correct"]
    assert all(line["documents"] == round(36 * line["labelled"]) for line in measured["thresholds"])


def test_more_examples_are_better():
    curve = train(*documents(100, words=2), SMALL).measured["curve"]
    assert [line["examples"] for line in curve] == [5, 10, 20, 50, 80]
    assert curve[-1]["accuracy"] > curve[0]["accuracy"] + 0.02


def test_intervals_are_those_of_wilson():
    z, n, p = 1.959963984540054, 40, 30 / 40
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    np.testing.assert_allclose(share(np.arange(n) < 30)["interval"], expected, rtol=1e-12)
    assert share(np.zeros(0, bool))["interval"] == [0.0, 1.0]


@pytest.mark.parametrize(
    "counts, sentence",
    [
        ({"English": 9, "mathematics": 4}, "a domain must have at least 5 examples (got 4 of mathematics)"),
        ({"English": 9}, "examples must be of 2 to 32768 domains (got English)"),
        ({}, "examples must be of 2 to 32768 domains (got none)"),
    ],
)
def test_too_little_is_refused(counts, sentence):
    labels = [name for name, count in counts.items() for _ in range(count)]
    with pytest.raises(ValueError) as error:
        train(["some text"] * len(labels), labels, SMALL)
    assert str(error.value) == f"edl::label: {sentence}"


TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from corpus_texts import documents
from edl.corpus.training import train
train(*documents(30, words=3)).save(sys.argv[2])
"""


def test_the_same_bits_with_any_number_of_threads(tmp_path):
    files = []
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        folder = tmp_path / threads
        command = [sys.executable, "-c", TRAIN, os.path.dirname(__file__), folder]
        subprocess.run(command, env=environment, check=True)
        files.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(files[0]) == 2 and files[0] == files[1]


def test_what_is_saved_is_what_is_loaded(model, folder):
    loaded = Classifier.load(folder)
    texts = documents(3, seed=5)[0]
    assert loaded.probabilities(texts).tobytes() == model.probabilities(texts).tobytes()
    assert (loaded.rows, loaded.features, loaded.measured) == (model.rows, model.features, model.measured)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert {name: array.shape for name, array in load_file(folder / "model.safetensors").items()} == {
        "weights": (SMALL.buckets, 3),
        "bias": (3,),
    }


def test_the_hash_tells_models_apart(model, folder, tmp_path):
    again = model.save(tmp_path / "again")
    other = train(*documents(12, seed=9), SMALL).save(tmp_path / "other")
    assert again.hash == Classifier.load(folder).hash and len(again.hash) == 64
    assert other.hash != again.hash


def test_a_model_is_not_written_over(model, folder):
    with pytest.raises(ValueError, match="a model is never written over, choose another folder \\(got "):
        model.save(folder)


def renamed(folder, *names):
    page = json.loads((folder / "model.json").read_text())
    for row, name in zip(page["domains"], names):
        row["name"] = name
    (folder / "model.json").write_text(json.dumps(page))
    return Classifier.load(folder)


def test_names_may_be_changed_in_the_file(model, folder):
    loaded = renamed(folder, "中文", "a", "b")
    assert loaded.domains == ["中文", "a", "b"]
    texts = documents(5, seed=6)[0]
    assert (loaded.predict(texts)[0] == model.predict(texts)[0]).all()
    assert loaded.hash != model.hash


def test_one_name_twice_is_one_domain(model, folder):
    texts = documents(5, seed=6)[0]
    loaded = renamed(folder, "other", "text", "other")
    before = model.probabilities(texts)
    assert loaded.domains == ["other", "text"]
    expected = np.stack([before[:, 0] + before[:, 2], before[:, 1]], 1)
    np.testing.assert_allclose(loaded.probabilities(texts), expected, rtol=1e-6)


def changed(**values):
    def change(folder):
        page = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({**page, **values}))

    return change


def exchange_weights(folder):
    arrays = {"weights": np.zeros((SMALL.buckets, 3), np.float32), "bias": np.zeros(3, np.float32)}
    (folder / "model.safetensors").write_bytes(save(arrays))


HOSTILE = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file model.safetensors"),
    "no page": (lambda folder: (folder / "model.json").unlink(), "no file model.json"),
    "a pipe": (
        lambda folder: ((folder / "model.json").unlink(), os.mkfifo(folder / "model.json")),
        "no file model.json",
    ),
    "no JSON": (lambda folder: (folder / "model.json").write_bytes(b"\xff{"), ""),
    "deep JSON": (lambda folder: (folder / "model.json").write_text("[" * 100000), ""),
    "a list": (lambda folder: (folder / "model.json").write_text("[]"), "not of version 1"),
    "a later version": (changed(version=2), "not of version 1"),
    "other weights": (exchange_weights, "model.safetensors is not the one that model.json was written with"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 100), "is not the one"),
    "no names": (changed(domains=[{}] * 3), "a domain has no name but None"),
    "an empty name": (changed(domains=[{"name": ""}] * 3), "a domain has no name but ''"),
    "names of fewer": (changed(domains=[{"name": "a"}]), "an array is not finite float32 of (1024, 1)"),
    "no domains": (changed(domains=[]), "domains are not a list"),
    "other features": (changed(features={"hash_bits": 11}), "an array is not finite float32 of (2048, 3)"),
    "unknown features": (changed(features={"words": 3}), "words"),
    "wild features": (changed(features={"hash_bits": 1000}), "hash_bits must be from 4 to 24"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_model_is_a_sentence(folder, case):
    damage, reason = HOSTILE[case]
    damage(folder)
    with pytest.raises(ValueError) as error:
        Classifier.load(folder)
    rule = f"edl::label: a model must be a folder that edl label train or edl label cluster made (got {folder}: "
    assert str(error.value).startswith(rule) and reason in str(error.value)


def test_infinite_weights_are_refused(model, folder, tmp_path):
    weights = np.full_like(model.weights, np.inf)
    with pytest.raises(ValueError, match="an array is not finite float32"):
        Classifier(model.rows, weights, model.bias, model.features, {}).save(tmp_path / "infinite")


@pytest.fixture
def labelled(tmp_path):
    """JSONL of 12 documents of each domain, with some that are of no use."""
    texts, labels = documents(12)
    rows = [{"text": text, "topic": label} for text, label in zip(texts, labels)]
    rows += [rows[0], {"text": "nobody knows what"}, {"text": "", "topic": "English"}, {"topic": "English"}]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_trains_a_model_and_says_how_good_it_is(labelled, tmp_path, capsys):
    cli.main(["label", "train", str(labelled), "--column", "topic", "--output", str(tmp_path / "topics")])
    printed = capsys.readouterr().out
    assert "left out: 1 empty, 1 no label, 1 no text, 1 the same as another" in printed
    assert "Held-out accuracy 100.0% [90.4%, 100.0%] (36 of 36)" in printed
    assert "5 examples a domain are as good as all, within the interval." in printed
    assert Classifier.load(tmp_path / "topics").domains == sorted(WORDS)


def test_the_command_takes_a_sample(labelled, tmp_path, capsys):
    options = ["--column", "topic", "--examples", "5", "--max-characters", "30", "--output", str(tmp_path / "topics")]
    cli.main(["label", "train", str(labelled), *options, "--quiet"])
    model = Classifier.load(tmp_path / "topics")
    assert [row["examples"] for row in model.rows] == [5, 5, 5] and model.features.max_characters == 30
    assert capsys.readouterr() == ("", "")


def test_the_command_ends_with_a_sentence(labelled, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["label", "train", str(labelled), "--column", "nothing", "--output", str(tmp_path / "topics")])
    assert capsys.readouterr().err == "edl::label: examples must be of 2 to 32768 domains (got none)\n"
    assert not (tmp_path / "topics").exists()

"""`edl report` and `edl trace`: runs out of files, their page and their other outputs; mistakes are sentences."""

import json
import shutil

import numpy as np
import pytest

import edl
from edl import cli
from edl.diagnostics.findings import Estimate
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import Record
from edl.report import words
from edl.report.runs import read_runs

W, NUMBER = 6, 70


def save_run(folder, seed, shift, layers=2):
    """A record of two domains that differ by `shift` in the choice of experts, and statistics of the same."""
    draw = np.random.default_rng(seed)
    labels = np.arange(NUMBER) % 2
    tokens = draw.integers(0, 5, NUMBER * W)
    of_tokens = np.repeat(labels, W)
    experts = [
        np.where(draw.random((NUMBER * W, 1)) < 0.5 + shift * (of_tokens[:, None] - 0.5), 0, 1 + tokens[:, None])
    ]
    experts = [(experts[0] + place) % 6 for place in range(layers)]
    facts = [LayerFacts(place, f"layers.{place}.gate", 6, 1) for place in range(layers)]
    record = Record(
        facts, ["code", "prose"], tokens, np.arange(NUMBER + 1) * W, labels, experts, token_texts={0: "</script>"}
    )
    folder.mkdir()
    record.save(folder / "record.safetensors")
    return record


@pytest.fixture
def runs(tmp_path):
    save_run(tmp_path / "before", 1, 0.0)
    save_run(tmp_path / "after", 1, 0.8)
    return tmp_path


def report(*arguments):
    cli.main(["report", *map(str, arguments)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1 and not printed.out
    return printed.err


def test_a_run_becomes_a_page_beside_it(runs, capsys):
    report(runs / "after")
    printed = capsys.readouterr().out
    assert printed.startswith("after\n  Averaged over layers and pairs, the choices of the 2 domains diverge by ")
    assert printed.splitlines()[-1] == f"page in {runs / 'after' / 'report.html'}"
    assert (runs / "after" / "report.html").read_text().startswith("<!doctype html>")


def test_two_runs_are_compared_and_told_as_json(runs, capsys):
    report(runs / "before", runs / "after", "--output", runs / "both.html", "--json")
    told = json.loads(capsys.readouterr().out)
    before, after = told["runs"]
    assert before["title"] == "before" and before["divergence"]["p"] > 0.05 and after["divergence"]["p"] == 0.001
    [change] = told["changes"]
    assert change["paired"] == NUMBER and change["information"]["low"] > 0
    page = (runs / "both.html").read_text()
    assert "before" in page and "after" in page


def test_what_has_changed_is_told(runs, capsys):
    report(runs / "before", runs / "after", "--output", runs / "both.html")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after less before: ")]
    assert "What an expert tells of the domain, I(E;D): 0." in line and "(95 % interval 0." in line
    assert line.endswith("One seed each: what another seed would change is not known.")


@pytest.mark.parametrize(
    "difference, text",
    [
        (Estimate(-0.2, -0.3, -0.1, 0.001), "−0.200 nats (95\u00a0% interval −0.300 to −0.100)"),
        (
            Estimate(-0.2, -0.5, 0.1, 0.3),
            "−0.200 nats (95\u00a0% interval −0.500 to 0.100, not distinguishable from chance)",
        ),
        (Estimate(0.2, np.nan, np.nan, np.nan), "0.200 nats (not tested)"),
        (Estimate(np.nan, np.nan, np.nan, np.nan), "not known"),
    ],
)
def test_a_difference_keeps_its_sign_and_its_interval(difference, text):
    assert words.changed(difference) == text


def test_nothing_is_below_0():
    assert words.estimated(Estimate(0.0, np.nan, 1e-17, 1.0)) == "not distinguishable from chance, below 0.0001 nats"


def test_a_page_is_written_anew_and_nothing_else_is_written_over(runs, capsys, monkeypatch):
    report(runs / "after", "--quiet")
    before = (runs / "after" / "report.html").read_text()
    monkeypatch.chdir(runs)
    report(runs / "before", runs / "after", "--quiet")  # of both, beside neither
    assert (runs / "after" / "report.html").read_text() == before and (runs / "comparison.html").exists()
    report(runs / "before", runs / "after", "--quiet")
    (runs / "mine.html").write_text("my page")
    assert "--output must be new" in refused(capsys, "report", runs / "after", "--output", runs / "mine.html")
    assert (runs / "mine.html").read_text() == "my page"


def test_everything_else_that_can_be_written(runs, capsys):
    arguments = ["--png", "figures", "--csv", "tables", "--data", "all.json", "--moelens", "lens.json"]
    arguments = [runs / word if place % 2 else word for place, word in enumerate(arguments)]
    report(runs / "after", *arguments, "--tensorboard", runs / "log", "--title", "mine", "--examples", 1)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" in ")[0] for line in told[-6:]] == [
        "page",
        "4 figures",
        "tables",
        "all numbers",
        "MoELens' numbers",
        "TensorBoard's log",
    ]
    assert list((runs / "figures").glob("*.png")) and list((runs / "tables").glob("*.csv"))
    assert json.loads((runs / "all.json").read_text())["title"] == "mine"
    assert json.loads((runs / "lens.json").read_text())["num_layers"] == 2
    assert list((runs / "log").glob("events*"))


def test_a_file_stands_for_itself_and_titles_differ(runs):
    shutil.copytree(runs / "after", runs / "deeper" / "after")
    files = [runs / "after" / "record.safetensors", runs / "deeper" / "after" / "record.safetensors"]
    assert [run.title for run in read_runs(map(str, files))] == ["after 1", "after 2"]


def test_mistakes_are_sentences(runs, capsys):
    (runs / "empty").mkdir()
    assert "must hold statistics or a record" in refused(capsys, "report", runs / "empty")
    assert "must be a file (got none there)" in refused(capsys, "report", runs / "nowhere")
    (runs / "foreign.safetensors").write_bytes(b"no")
    assert "must be a file that edl has written" in refused(capsys, "report", runs / "foreign.safetensors")
    sentence = refused(capsys, "report", runs / "before", runs / "after", "--csv", runs / "tables")
    assert "--csv must be of a single run (got 2)" in sentence
    assert "a title for each of 1 runs" in refused(capsys, "report", runs / "after", "--title", "a", "--title", "b")
    shutil.copy(runs / "before" / "record.safetensors", runs / "after" / "another.safetensors")
    assert "a run must have one routing_record" in refused(capsys, "report", runs / "after")


def test_runs_without_a_document_in_common_are_shown_and_not_compared(runs, capsys):
    record = Record.load(runs / "after" / "record.safetensors")
    record.keys += 1000
    other = runs / "other"
    other.mkdir()
    record.save(other / "record.safetensors")
    report(runs / "before", other, "--output", runs / "both.html")
    assert "before and other are not compared: edl::compare_runs: the two runs must have" in capsys.readouterr().out


def test_statistics_of_a_training_are_enough(tmp_path, capsys):
    import torch

    statistics = edl.RoutingStatistics(["code", "prose"])
    layer = edl.MoELayer(8, 4, 6, 2)
    for step in (1, 2):
        _, routing = layer(torch.randn(4, 10, 8))
        statistics.update([routing], torch.tensor([0, 1, 0, 1]))
        statistics.snapshot(step)
    statistics.save(tmp_path / "statistics.safetensors")
    report(tmp_path)
    assert "without a record" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_trace_becomes_a_record_and_a_page(tmp_path, capsys):
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "replay.npz", **{str(layer): draw.integers(0, 8, (12, 2)) for layer in range(3)})
    rows = [{"length": 5, "domain": "code"}, {"length": 7, "domain": "prose"}]
    (tmp_path / "documents.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["trace", tmp_path / "replay.npz", "--output", tmp_path / "out"]
    documents = ["--documents", tmp_path / "documents.jsonl", "--num-experts", "8"]
    cli.main([*map(str, [*arguments, *documents])])
    assert capsys.readouterr().out.startswith("2 documents, 12 tokens, 3 layers, 2 domains\n")
    record = Record.load(tmp_path / "out" / "record.safetensors")
    assert record.domains == ("code", "prose") and record.offsets.tolist() == [0, 5, 12]
    with np.load(tmp_path / "replay.npz") as arrays:
        assert all((record.experts(place) == arrays[str(place)]).all() for place in range(3))
    report(tmp_path / "out", "--quiet")
    assert "output must have no record yet" in refused(capsys, *arguments, *documents)

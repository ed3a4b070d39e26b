"""What is written for other programs is what was found, and empty where nothing is known."""

import csv
import dataclasses
import itertools
import json
import math
import os

import findings_by_hand as by_hand
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from edl.diagnostics.exports import write_csv, write_json, write_moelens, write_tensorboard
from edl.diagnostics.layers import LayerFacts

TABLES = ("layers", "domains", "pairs", "cells")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(text):
    return float(text) if text else math.nan


def column(rows, name):
    return np.array([number(row[name]) for row in rows])


def load_of(layer):
    """The share of all choices by expert, domains weighing as their tokens."""
    load = np.nansum(by_hand.TOKENS[:, None] * layer.usage, axis=0)
    return load / load.sum()


def test_csv(tmp_path):
    found = by_hand.findings()
    write_csv(found, tmp_path / "new" / "folder")
    layers, domains, pairs, cells = (rows_of(tmp_path / "new" / "folder" / f"{name}.csv") for name in TABLES)
    num_layers, num_domains = len(found.layers), len(found.domains)

    assert [row["layer"] for row in layers] == ["1", "3"] and layers[0]["name"] == "model.layers.1.gate"
    np.testing.assert_array_equal(column(layers, "max_violation"), found.load_violation)
    np.testing.assert_array_equal(column(layers, "information"), found.information)
    np.testing.assert_array_equal(column(layers, "within_documents"), found.decomposition[:, 3])
    np.testing.assert_array_equal(column(layers, "divergence_low"), found.compared.layer_low)
    np.testing.assert_array_equal(column(layers, "beyond_token_p"), found.beyond_token.standardised.layer_p)
    for row, layer in zip(layers, found.layers):
        load = load_of(layer)
        assert number(row["coefficient_of_variation"]) == pytest.approx(load.std() / load.mean())
        assert number(row["min_violation"]) == pytest.approx(load.min() / load.mean() - 1) == -1
        assert number(row["mean_violation"]) == pytest.approx(np.abs(load / load.mean() - 1).mean())
        assert number(row["dead_expert_fraction"]) == 1 / len(load) and row["dead_experts"] == "1"
        entropy = -sum(p * math.log(p) for p in load if p > 0)
        assert number(row["expert_diversity"]) == pytest.approx(math.exp(entropy) / len(load))

    assert [row["domain"] for row in domains] == list(found.domains) * num_layers  # commas, quotes, lines and all
    np.testing.assert_array_equal(column(domains, "coverage_90"), found.coverage.ravel())
    np.testing.assert_array_equal(column(domains, "tokens"), np.tile(found.tokens, num_layers))
    assert {row["margin"] for row in domains} == {""} and domains[2]["token_entropy"] == ""

    names = list(itertools.combinations(found.domains, 2))
    assert [(row["domain"], row["other_domain"]) for row in pairs] == names * num_layers
    np.testing.assert_array_equal(column(pairs, "divergence"), found.divergence.ravel())
    np.testing.assert_array_equal(column(pairs, "overlap"), found.overlap.ravel())
    np.testing.assert_array_equal(column(pairs, "divergence_of_documents_plain"), found.compared.plain.ravel())
    np.testing.assert_array_equal(column(pairs, "covered"), np.tile(found.beyond_token.covered, num_layers))
    np.testing.assert_array_equal(column(pairs, "beyond_token_p"), found.beyond_token.standardised.p.ravel())

    assert len(cells) == num_domains * sum(layer.facts.num_experts for layer in found.layers)
    usage = np.concatenate([layer.usage.ravel() for layer in found.layers])
    np.testing.assert_array_equal(column(cells, "share"), usage)
    first = cells[2]
    mean = np.nanmean(found.layers[0].usage, axis=0)[2]
    assert (first["domain"], first["expert"]) == ("code", "2")
    assert number(first["specialisation"]) == pytest.approx(math.log2(found.layers[0].usage[0, 2] / mean))
    assert {row["specialisation"] for row in cells if row["expert"] == "1"} == {""}
    assert first["is_certain"] == str(bool(found.layers[0].is_certain[0, 2]))


def test_csv_without_a_record(tmp_path):
    write_csv(by_hand.without_record(), tmp_path)
    for name in TABLES:
        with open(tmp_path / f"{name}.csv", encoding="utf-8") as file:
            text = file.read()
        assert "nan" not in text.lower() and "None" not in text
    assert {row["beyond_token_p"] for row in rows_of(tmp_path / "pairs.csv")} == {""}
    assert {row["is_certain"] for row in rows_of(tmp_path / "cells.csv")} == {""}


def strictly(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def assert_same(read, given):
    """What was read is what was given, null for what is no number."""
    if dataclasses.is_dataclass(given):
        for field in dataclasses.fields(given):
            assert_same(read[field.name], getattr(given, field.name))
    elif isinstance(given, LayerFacts):
        assert read == given._asdict()
    elif isinstance(given, np.ndarray):
        got = np.array(read, dtype=object)
        assert got.shape == given.shape
        for one, other in zip(got.ravel(), given.ravel().tolist()):
            assert (one is None) if isinstance(other, float) and math.isnan(other) else one == other
    elif isinstance(given, dict):
        assert read == {str(name): value for name, value in given.items()}
    elif isinstance(given, (list, tuple)):
        assert len(read) == len(given)
        for one, other in zip(read, given):
            assert_same(one, other)
    else:
        assert read == given


@pytest.mark.parametrize("found", [by_hand.findings(), by_hand.without_record()], ids=["all", "without a record"])
def test_json(tmp_path, found):
    write_json(found, tmp_path / "findings.json")
    read = strictly((tmp_path / "findings.json").read_text())
    assert_same(read, found)
    assert read["kind"] == "edl findings" and read["version"] == 1
    load = load_of(found.layers[1])
    assert read["load"][1]["coefficient_of_variation"] == pytest.approx(load.std() / load.mean())


def test_json_of_tensors_and_numbers_of_numpy(tmp_path):
    found = by_hand.findings(information=torch.tensor([0.1, math.inf], dtype=torch.float64), dead=[[np.int64(1)], []])
    write_json(found, tmp_path / "findings.json")
    read = strictly((tmp_path / "findings.json").read_text())
    assert read["information"] == [0.1, None] and read["dead"] == [[1], []]


def alike(**changes):
    """Findings whose layers have one E and K, as MoELens wants it; in the second, a domain has no choice."""
    found = by_hand.findings(**changes)
    usage = found.layers[0].usage.copy()
    usage[3] = math.nan
    second = dataclasses.replace(found.layers[0], facts=LayerFacts(3, "", 4, 2), usage=usage)
    return dataclasses.replace(found, layers=[found.layers[0], second])


def test_moelens(tmp_path):
    found = alike()
    write_moelens(found, tmp_path / "domain_specialization.json")
    read = strictly((tmp_path / "domain_specialization.json").read_text())
    kept = [0, 1, 3]
    names = [found.domains[domain] for domain in kept]
    assert read["domains"] == names
    assert (read["num_layers"], read["num_experts"], read["top_k_experts"]) == (4, 4, 2)
    assert read["dense_layers"] == [0, 2]
    assert read["token_counts"] == {names[0]: 1000, names[1]: 3000, names[2]: 500}
    rates = found.layers[0].usage[kept] * 2
    for place, name in enumerate(names):
        np.testing.assert_allclose(read["activation_rate"][name][1], rates[place])
        np.testing.assert_allclose(read["avg_prob"][name][1], found.layers[0].scores[kept[place]])
        score = np.log2((rates[place] + 1e-4) / (rates.mean(0) + 1e-4))
        np.testing.assert_allclose(read["specialization_score"][name][1], score, atol=1e-12)
        distance = np.abs(rates[place] - rates.mean(0)).sum() / 4
        assert read["layer_divergence"][name][1] == pytest.approx(distance)
        assert read["domain_rate"][name][1] == pytest.approx(np.sort(rates[place])[-2:].mean())
        assert read["activation_rate"][name][0] == [0] * 4
        assert read["expert_token_idx"][name] == [[[]] * 4] * 4
        top = read["top_specialists"][name]
        assert len(top) == 12 and top[0]["activation_rate"] == pytest.approx(rates[place].max())
        assert top[0]["layer"] == 1 and top[0]["expert"] == rates[place].argmax()
    assert read["activation_rate"][names[2]][3] == [None] * 4
    assert read["expert_token_count"][names[1]][1] == (rates[1] * 3000).round().tolist()
    assert read["example_prompts"][names[0]] == ["a b"] and read["domain_tokens"][names[0]] == ["a", " b"]
    assert read["example_prompts"][names[1]] == []


def test_moelens_has_one_number_of_experts(tmp_path):
    with pytest.raises(ValueError, match="^edl::write_moelens: layers must be alike"):
        write_moelens(by_hand.findings(), tmp_path / "x.json")
    unknown = alike()
    layers = [dataclasses.replace(layer, facts=layer.facts._replace(top_k=0)) for layer in unknown.layers]
    with pytest.raises(ValueError, match="K must be known"):
        write_moelens(dataclasses.replace(unknown, layers=layers), tmp_path / "x.json")
    with pytest.raises(ValueError, match="must be alike"):
        write_moelens(dataclasses.replace(unknown, layers=[]), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def written(folder, found, step=7):
    with SummaryWriter(folder) as writer:
        write_tensorboard(found, writer, step)
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard(tmp_path):
    found = by_hand.findings()
    events = written(tmp_path, found)
    scalars = {name: events.Scalars(name)[0] for name in events.Tags()["scalars"]}
    assert {event.step for event in scalars.values()} == {7}
    value = {name: event.value for name, event in scalars.items()}
    loads = [load_of(layer) for layer in found.layers]
    cv = [load.std() / load.mean() for load in loads]
    ratios = np.concatenate([load * len(load) for load in loads])
    wanted = {
        "moe/cv_mean": np.mean(cv),
        "moe/cv_median": np.median(cv),
        "moe/cv_max": max(cv),
        "moe/layer_3/cv": cv[1],
        "moe/layer_1/dead_expert_frac": 1 / 4,
        "moe/dead_expert_frac_mean": (1 / 4 + 1 / 6) / 2,
        "moe/expert_utilization_min": 0,
        "moe/expert_utilization_p75": np.quantile(ratios, 0.75),
        "moe/max_vio_mean": found.load_violation.mean(),
        "moe/layer_3/information": 0.2,
        "moe/layer_1/token_entropy": 0.7,
        "moe/divergence_corrected": 0.02,
        "moe/divergence_beyond_token": 0.02,
    }
    assert wanted == {name: pytest.approx(value[name], rel=1e-6) for name in wanted}
    assert "moe/layer_1/margin" not in value  # it is not known
    assert all(map(math.isfinite, value.values()))
    images = {name: events.Images(name)[0] for name in events.Tags()["images"]}
    assert set(images) == {"moe/load", "moe/layer_1/usage", "moe/layer_3/usage"}
    assert (images["moe/layer_3/usage"].height, images["moe/layer_3/usage"].width) == (4 * 6, 6 * 6)
    (tag,) = events.Tags()["tensors"]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "p = 0.001" in text and "0.01 to 0.03" in text and found.notes[0] in text
    assert "=empty\\|" in text


def test_tensorboard_without_a_record(tmp_path):
    events = written(tmp_path, by_hand.without_record())
    names = events.Tags()["scalars"]
    assert "moe/layer_1/information" in names and "moe/divergence_corrected" not in names


def test_tensorboard_of_nothing(tmp_path):
    found = by_hand.without_record()
    nothing = [dataclasses.replace(layer, usage=np.full_like(layer.usage, np.nan)) for layer in found.layers]
    unknown = np.full(len(nothing), np.nan)
    found = dataclasses.replace(
        found, layers=nothing, tokens=np.zeros(4), load_violation=unknown, information=unknown, notes=()
    )
    events = written(tmp_path, found)
    assert not [name for name in events.Tags()["scalars"] if "cv" in name or "vio" in name or "utilization" in name]
    write_csv(found, tmp_path)
    assert rows_of(tmp_path / "layers.csv")[0]["coefficient_of_variation"] == ""


class Images:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.images, self.texts = {}, {}

    def add_scalar(self, name, value, step):
        pass

    def add_image(self, name, image, step, dataformats):
        self.images[name] = image

    def add_text(self, name, text, step):
        self.texts[name] = text


def test_heat_maps_are_light_for_little_dark_for_much_and_grey_for_nothing():
    found, writer = by_hand.findings(), Images()
    write_tensorboard(found, writer, 0)
    image = writer.images["moe/layer_1/usage"][::6, ::6].astype(int)
    usage = found.layers[0].usage
    assert (image[2] == 128).all()  # the absent domain
    assert (image[0, 1] == (245, 248, 251)).all()  # the dead expert
    assert (image[np.unravel_index(np.nanargmax(usage), usage.shape)] == (8, 48, 107)).all()
    load = writer.images["moe/load"][::6, ::6]
    assert load.shape == (2, 6, 3) and (load[0, 4:] == 128).all()  # this layer has four experts


def test_tensorboard_says_what_was_not_tested():
    found, writer = by_hand.findings(), Images()
    unsure = dataclasses.replace(found.compared.whole, low=math.nan, p=0.3)
    untested = dataclasses.replace(unsure, high=math.nan, p=math.nan)
    beyond = dataclasses.replace(
        found.beyond_token, standardised=dataclasses.replace(found.beyond_token.standardised, whole=untested)
    )
    compared = dataclasses.replace(found.compared, whole=unsure)
    write_tensorboard(dataclasses.replace(found, compared=compared, beyond_token=beyond), writer, 0)
    text = writer.texts["moe/findings"]
    assert "no more than chance would, below 0.03 nats (p = 0.3)" in text
    assert "too few documents for a test" in text and "nan" not in text


def test_tensorboard_takes_names_with_half_a_character(tmp_path):
    found = by_hand.findings()
    names = ["half \ud800", *found.domains[1:]]
    events = written(tmp_path, dataclasses.replace(found, title="\ud800", domains=names, notes=["\udfff"]))
    (text,) = events.Tensors("moe/findings/text_summary")
    assert b"half ?" in text.tensor_proto.string_val[0]


WRITERS = {
    "write_csv": write_csv,
    "write_json": write_json,
    "write_moelens": write_moelens,
    "write_tensorboard": lambda found, path: write_tensorboard(found, Images(), 0),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("found", [None, {}, "findings"])
def test_what_is_no_finding_is_refused(tmp_path, name, found):
    with pytest.raises(ValueError, match=rf"^edl::{name}: findings must be Findings \(got \w+\)$"):
        WRITERS[name](found, tmp_path / "x")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("writer, step", [(None, 0), (Images, "a"), (Images, -1), (object, 0)])
def test_what_is_no_writer_or_step_is_refused(writer, step):
    with pytest.raises(ValueError, match=r"^edl::write_tensorboard: (writer|step) must"):
        write_tensorboard(by_hand.findings(), writer and writer(), step)


@pytest.mark.parametrize("write", [write_json, lambda found, path: write_moelens(alike(), path)])
def test_files_are_whole_or_as_before(tmp_path, monkeypatch, write):
    path = tmp_path / "findings.json"
    path.write_text("before")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write(by_hand.findings(), path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["findings.json"]

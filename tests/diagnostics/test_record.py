"""The record keeps what it was given, or says in a sentence why it cannot."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import MOST_EXPERTS, Record

FIELDS = {
    "layers": [LayerFacts(0, "", 4, 1)],
    "domains": ["a", "b"],
    "token_ids": [5, 7],
    "offsets": [0, 1, 2],
    "labels": [0, 1],
    "experts": [[[0], [3]]],
}

MISTAKES = {
    "token ids that do not fit": (
        {"token_ids": [5, 2**31]},
        "token_ids must be from -2147483648 to 2147483647 (got 5 ",
    ),
    "token ids that are no integers": ({"token_ids": [5.5, 7]}, "token_ids must be integers in one row (got float64"),
    "token ids that are texts": ({"token_ids": ["a", "b"]}, "token_ids must be integers in one row"),
    "token ids of two rows": ({"token_ids": [[5, 7]]}, "token_ids must be integers in one row"),
    "labels that would wrap to right ones": ({"labels": [0, 2**32]}, "labels must be from "),
    "labels that are no integers": ({"labels": [0.0, 0.7]}, "labels must be integers in one row"),
    "a single label": ({"labels": 0}, "labels must be integers in one row"),
    "keys that do not fit": ({"keys": np.array([0, 2**63], np.uint64)}, "keys must be from "),
    "sources that are names": ({"groups": ["x", "y"]}, "groups must be integers in one row"),
    "more experts than can be written": (
        {"layers": [LayerFacts(0, "", MOST_EXPERTS + 1, 1)]},
        "a layer must have at most 65535 experts (got 65536)",
    ),
    "choices of too few layers": ({"experts": []}, "experts must be of each of 1 layers (got 0)"),
    "weights of too many layers": ({"weights": [[[1.0], [1.0]]] * 2}, "weights must be of each of 1 layers (got 2)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_it_cannot_keep_is_a_sentence(name):
    change, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match="^edl::Record: ") as error:
        Record(**FIELDS | change)
    assert sentence in str(error.value)


@pytest.mark.parametrize("weights", [[[1.0]], [[1.0, 0.0]] * 2, [["a"], ["b"]]])
def test_weights_are_as_many_numbers_as_choices(weights):
    record = Record(**FIELDS, weights=[weights])
    with pytest.raises(ValueError, match=r"^edl::Record: weights of a layer must be numbers \[2, 1\]"):
        record.weights(0)


def test_the_most_experts_come_back_with_none_beside_them(tmp_path):
    chosen = [[MOST_EXPERTS - 1], [MOST_EXPERTS]]
    Record(**FIELDS | {"layers": [LayerFacts(0, "", MOST_EXPERTS, 1)], "experts": [chosen]}).save(tmp_path / "record")
    assert Record.load(tmp_path / "record").experts(0).tolist() == chosen


@pytest.mark.parametrize("number", ["9" * 5000, "\u0663", "-1", "x"])
def test_texts_stand_by_token_ids(number, tmp_path):
    Record(**FIELDS).save(tmp_path / "record")
    with safe_open(tmp_path / "record", "numpy") as file:
        header = json.loads(file.metadata()["edl"])
    arrays = load_file(tmp_path / "record")
    header["token_texts"] = {number: "text"}
    (tmp_path / "record").write_bytes(save(arrays, {"edl": json.dumps(header)}))
    with pytest.raises(ValueError, match="^edl::routing_record: .* must have facts, and texts by token id"):
        Record.load(tmp_path / "record")

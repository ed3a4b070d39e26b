"""Traces of other programs become records; what is broken, foreign or hostile ends in a sentence."""

import base64
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch

from edl.diagnostics.traces import read_trace

LAYERS, TOKENS, TOP_K, EXPERTS = 3, 24, 2, 8
SENTENCE = r"^edl::read_trace: [^\n]* must [^\n]*\(got [^\n]*\)$"


def choices(seed=0, tokens=TOKENS):
    """[L, T, K], different experts for each token, some without a choice."""
    scores = np.random.default_rng(seed).random((LAYERS, tokens, EXPERTS))
    experts = np.argsort(scores, axis=-1)[..., :TOP_K].astype(np.int16)
    experts[0, 1] = -1
    experts[1, 0, 0] = EXPERTS - 1
    return experts


def assert_is(record, experts, lengths, numbers=range(LAYERS)):
    """The record has these choices [L, T, K], and documents of these lengths."""
    assert [layer.number for layer in record.layers] == list(numbers)
    assert {(layer.num_experts, layer.top_k) for layer in record.layers} == {(EXPERTS, TOP_K)}
    assert np.diff(record.offsets).tolist() == list(lengths)
    for place, layer in enumerate(experts):
        assert (record.experts(place) == np.where(layer < 0, EXPERTS, layer)).all()


def is_unknown(token_ids):
    return (token_ids < 0).all() and len(set(token_ids.tolist())) == len(token_ids)


def save_list(path, experts, numbers=range(LAYERS)):
    named = {f"model.layers.{number}.experts": layer for number, layer in zip(numbers, experts)}
    if path.suffix == ".npz":
        np.savez_compressed(path, **named)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(named, path)
    else:
        torch.save({name: torch.from_numpy(layer) for name, layer in named.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_list_of_layers(tmp_path, suffix):
    experts, numbers = choices(), [2, 10, 11]  # by number, not by letter
    path = tmp_path / f"replay{suffix}"
    save_list(path, experts, numbers)
    record = read_trace(path)
    assert_is(record, experts, [TOKENS], numbers)
    assert record.domains == ("all",) and record.labels.tolist() == [0]
    assert is_unknown(record.token_ids)
    assert record.facts["format"] == "router_replay" and "chosen" in record.facts["experts"]


def test_lists_of_megatron_and_nemo(tmp_path):
    experts = choices()
    torch.save([torch.from_numpy(layer).long() for layer in experts], tmp_path / "list.pt")
    assert_is(read_trace(tmp_path / "list.pt"), experts, [TOKENS])
    torch.save([None, *map(torch.from_numpy, experts[1:])], tmp_path / "dense.pt")
    assert_is(read_trace(tmp_path / "dense.pt"), experts[1:], [TOKENS], [1, 2])
    np.save(tmp_path / "whole.npy", np.asfortranarray(experts))
    assert_is(read_trace(tmp_path / "whole.npy", kind="router_replay"), experts, [TOKENS])


def test_sequences_that_alternate(tmp_path):
    experts = choices()
    save_list(tmp_path / "replay.npz", experts)
    record = read_trace(tmp_path / "replay.npz", micro_batch_size=3)
    assert_is(record, np.concatenate([experts[:, first::3] for first in range(3)], axis=1), [TOKENS // 3] * 3)


def test_documents_beside_a_trace(tmp_path):
    experts = choices()
    save_list(tmp_path / "replay.npz", experts)
    rows = [
        {"token_ids": list(range(10)), "domain": "code"},
        {"token_ids": list(range(100, 109)), "domain": "news", "title": "what else there is"},
        {"token_ids": [7] * 5, "domain": "code"},
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for documents in (
        tmp_path / "documents.jsonl",
        rows,
        [{**row, "token_ids": np.array(row["token_ids"])} for row in rows],
    ):
        record = read_trace(tmp_path / "replay.npz", documents=documents)
        assert_is(record, experts, [10, 9, 5])
        assert record.domains == ("code", "news") and record.labels.tolist() == [0, 1, 0]
        assert record.token_ids.tolist() == [token for row in rows for token in row["token_ids"]]
    record = read_trace(tmp_path / "replay.npz", documents=[{"length": 20}, {"length": 4, "domain": "news"}])
    assert_is(record, experts, [20, 4])
    assert record.domains == ("all", "news") and is_unknown(record.token_ids)


def test_a_record_of_a_trace_is_saved_and_loaded(tmp_path):
    save_list(tmp_path / "replay.npz", choices())
    record = read_trace(tmp_path / "replay.npz")
    record.save(tmp_path / "record.safetensors")
    again = type(record).load(tmp_path / "record.safetensors")
    assert_is(again, choices(), [TOKENS])
    assert again.facts == record.facts


def test_number_of_experts(tmp_path):
    save_list(tmp_path / "replay.npz", choices())
    record = read_trace(tmp_path / "replay.npz", num_experts=12)
    assert {layer.num_experts for layer in record.layers} == {12} and "experts" not in record.facts
    assert record.counts(0).shape == (1, 12)
    for wrong in (EXPERTS - 1, 0, 2**16, "8"):
        with pytest.raises(ValueError, match=SENTENCE):
            read_trace(tmp_path / "replay.npz", num_experts=wrong)


def line(step, layer, experts, **more):
    row = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
    return json.dumps({**row, "num_tokens": len(experts), "topk": TOP_K, "top_indices": experts.tolist(), **more})


def write_rank(folder, rank, parts, more=()):
    """Writes (step, [L, T, K]) of one rank, layers numbered 1, 3, 5."""
    lines = [line(step, 1 + 2 * place, layer, rank=rank) for step, part in parts for place, layer in enumerate(part)]
    (folder / f"router_trace_rank{rank}.jsonl").write_text("\n".join([*lines, *more]) + "\n")


def test_megatron(tmp_path):
    parts = [choices(seed, tokens=6) for seed in range(4)]
    extra = [line(1, 1, parts[0][0], block="mtp", mtp_idx=0)]
    write_rank(tmp_path, 0, [(0, parts[0]), (1, parts[1])], extra)
    write_rank(tmp_path, 1, [(0, parts[2]), (1, parts[3])])
    record = read_trace(tmp_path)
    assert_is(record, np.concatenate(parts, axis=1), [6] * 4, [1, 3, 5])
    assert record.facts["ranks"] == 2 and record.facts["repeated_parts_left_out"] == 0
    one = read_trace(tmp_path / "router_trace_rank1.jsonl")
    assert_is(one, np.concatenate(parts[2:], axis=1), [6, 6], [1, 3, 5])
    two = read_trace(tmp_path / "router_trace_rank1.jsonl", micro_batch_size=2)
    wanted = [part[:, first::2] for part in parts[2:] for first in range(2)]
    assert_is(two, np.concatenate(wanted, axis=1), [3] * 4, [1, 3, 5])


def test_megatron_counts_what_is_repeated_once(tmp_path):
    first, second = choices(0, tokens=6), choices(1, tokens=6)
    recomputed = [(0, first), (0, first), (0, second), (0, second), (1, first)]
    write_rank(tmp_path, 0, recomputed)
    write_rank(tmp_path, 1, recomputed)  # a tensor rank
    record = read_trace(tmp_path)
    assert_is(record, np.concatenate([first, second, first], axis=1), [6, 6, 6], [1, 3, 5])
    assert record.facts["repeated_parts_left_out"] == 7  # 2 of rank 0, all 5 of rank 1


def test_ranks_and_layers_are_in_the_order_of_their_numbers(tmp_path):
    parts = {rank: choices(rank, tokens=6) for rank in (2, 10)}
    for rank, part in parts.items():
        write_rank(tmp_path, rank, [(0, part)])
    assert_is(read_trace(tmp_path), np.concatenate([parts[2], parts[10]], axis=1), [6, 6], [1, 3, 5])
    experts = choices()
    np.savez(tmp_path / "x.npz", **{"z.0": experts[0], "a.2": experts[2], "m.1": experts[1]})
    assert_is(read_trace(tmp_path / "x.npz"), experts, [TOKENS])


def test_megatron_without_tokens_in_a_step(tmp_path):
    part = choices(0, tokens=6)
    write_rank(tmp_path, 0, [(0, part[:, :0]), (1, part)])
    assert_is(read_trace(tmp_path), part, [6], [1, 3, 5])


def encoded(experts):
    stream = io.BytesIO()
    np.save(stream, experts)
    return base64.b64encode(stream.getvalue()).decode()


def responses():
    """Choices [T, L, K] of two requests, token ids, and the responses."""
    requests = [choices(seed, tokens).swapaxes(0, 1) for seed, tokens in ((0, 7), (1, 5))]
    ids = [list(range(7)), list(range(50, 55))]
    rows = [
        {"prompt_routed_experts": requests[0].tolist(), "prompt_token_ids": ids[0], "choices": [{"text": "…"}]},
        {"choices": [{"routed_experts": encoded(np.concatenate([requests[1]] * 2)), "prompt_token_ids": ids[1]}]},
    ]
    return requests, ids, rows


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_vllm_responses(tmp_path, suffix):
    requests, ids, rows = responses()
    path = tmp_path / f"responses{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    record = read_trace(path)
    assert_is(record, np.concatenate(requests).swapaxes(0, 1), [7, 5])
    assert record.token_ids.tolist() == ids[0] + ids[1]
    labelled = read_trace(path, documents=[{"length": 7, "domain": "a"}, {"length": 5, "domain": "b"}])
    assert labelled.labels.tolist() == [0, 1] and labelled.token_ids.tolist() == ids[0] + ids[1]
    with pytest.raises(ValueError, match="token_ids of documents must be those"):
        read_trace(path, documents=[{"token_ids": ids[1] + ids[0]}])


def test_vllm_arrays(tmp_path):
    requests, _, _ = responses()
    np.savez(tmp_path / "requests.npz", request_10=requests[1], request_9=requests[0])
    assert_is(read_trace(tmp_path / "requests.npz"), np.concatenate(requests).swapaxes(0, 1), [7, 5])
    np.save(tmp_path / "one.npy", requests[0])
    assert_is(read_trace(tmp_path / "one.npy", kind="vllm"), requests[0].swapaxes(0, 1), [7])
    with pytest.raises(ValueError, match="kind must be given"):
        read_trace(tmp_path / "one.npy")


def test_vllm_fillers_are_no_choices(tmp_path):
    experts = choices(0, 6).swapaxes(0, 1).copy()
    experts[:, 0] = 0  # a dense layer
    experts[5, 2] = 0  # a token without a pass
    (tmp_path / "response.json").write_text(json.dumps({"routed_experts": experts.tolist()}))
    wanted = experts[:, 1:].swapaxes(0, 1).copy()
    wanted[1, 5] = -1
    assert_is(read_trace(tmp_path / "response.json"), wanted, [6], [1, 2])


# What must not be believed.


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def npy(dtype, shape, content=b""):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(content, method=zipfile.ZIP_STORED, name="a.npy"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        file.writestr(name, content)
    return stream.getvalue()


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def packed(content):
    """An archive of torch as torch never writes it, and reads it nevertheless."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as given, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in given.infolist():
            file.writestr(entry.filename, given.read(entry))
    return stream.getvalue()


def pickled_array():
    stream = io.BytesIO()
    np.save(stream, np.array([[Executed()]], dtype=object), allow_pickle=True)
    return stream.getvalue()


def old_torch():
    stream = io.BytesIO()
    torch.save([torch.zeros(3, 2, dtype=torch.int64)], stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def safetensors_of(header, content=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


WHOLE_ZIP = archive(npy("<i2", (3, 2), bytes(12)))
GOOD_LINE = {"step": 0, "layer": 0, "top_indices": [[0, 1]]}
VLLM = {"prompt_routed_experts": [[[0, 1]]]}
HOSTILE = {
    "a pickle in an array": ("x.npy", pickled_array()),
    "a pickle in an archive": ("x.npz", archive(pickled_array())),
    "a pickle as an array": ("x.npy", pickle.dumps(Executed())),
    "a pickle as a tensor": ("x.pt", pickle.dumps(Executed())),
    "a pickle among tensors": ("x.pt", saved([torch.zeros(3, 2, dtype=torch.int64), Executed()])),
    "an old pickle": ("x.pt", old_torch()),
    "a huge array": ("x.npy", npy("<i2", (2**40, 2))),
    "a huge archived array": ("x.npz", archive(npy("<i2", (2**40, 2)))),
    "a size that overflows": ("x.npy", npy("<i2", (2**62, 8))),
    "a negative size": ("x.npy", npy("<i2", (-2, -3), bytes(12))),
    "a size that is left open": ("x.npy", npy("<i2", (-1, 2), bytes(12))),
    "a size that is no number": ("x.npy", npy("<i2", ("a", 2))),
    "a shape too small": ("x.npy", npy("<i2", (1, 2), bytes(400))),
    "a cut array": ("x.npy", npy("<i2", (3, 2), bytes(11))),
    "a cut archive": ("x.npz", WHOLE_ZIP[:-10]),
    "a damaged archive": ("x.npz", WHOLE_ZIP[:60] + b"\xff" * 30 + WHOLE_ZIP[90:]),
    "a bomb": ("x.npz", archive(npy("<i2", (2**28, 1), bytes(2**29)), zipfile.ZIP_DEFLATED)),
    "a packed tensor": ("x.pt", packed(saved([torch.zeros(2**22, 2, dtype=torch.int64)]))),
    "one number as if many": ("x.pt", saved([torch.zeros(1, dtype=torch.int64).expand(2**40, 2)])),
    "a sparse tensor": ("x.pt", saved([torch.eye(3, dtype=torch.int64).to_sparse()])),
    "words": ("x.pt", saved(["a", "b"])),
    "a number": ("x.pt", saved(3)),
    "numbers with a point": ("x.pt", saved([torch.full((3, 2), float("nan"))])),
    "bits": ("x.npz", archive(npy("|b1", (3, 2), bytes(6)))),
    "an archive of nothing": ("x.npz", archive(b"", name="a.txt")),
    "an empty archive": ("x.npz", b"PK\x05\x06" + bytes(18)),
    "an empty list": ("x.pt", saved([])),
    "a huge safetensors": (
        "x.safetensors",
        safetensors_of({"a": {"dtype": "I64", "shape": [2**40, 2], "data_offsets": [0, 2**44]}}),
    ),
    "a huge header": ("x.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "halves": (
        "x.safetensors",
        safetensors_of({"a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}, bytes(4)),
    ),
    "another type of integer": ("x.npz", archive(npy("<u8", (1, 2), b"\xff" * 16))),
    "an expert below none": ("x.npz", archive(npy("<i2", (1, 2), b"\xfe\xff\x00\x00"))),
    "an expert far away": ("x.npz", archive(npy("<i8", (1, 2), (10**9).to_bytes(8, "little") * 2))),
    "no tokens": ("x.npz", archive(npy("<i2", (0, 2)))),
    "no experts": ("x.npz", archive(npy("<i2", (3, 0)))),
    "one dimension": ("x.npz", archive(npy("<i2", (3,), bytes(6)))),
    "nothing": ("x.npy", b""),
    "nothing in lines": ("x.jsonl", b""),
    "nothing in JSON": ("x.json", b""),
    "a text": ("x.txt", b"hello"),
    "a cut line": ("x.jsonl", json.dumps(GOOD_LINE).encode() + b'\n{"step": 0, "top_ind'),
    "bytes in lines": ("x.jsonl", bytes(range(256))),
    "NaN": ("x.jsonl", b'{"step": 0, "layer": 0, "top_indices": [[NaN, 1]]}'),
    "an endless number": ("x.jsonl", b'{"step": 0, "layer": 0, "top_indices": [[%s, 1]]}' % (b"9" * 5000)),
    "a large number": ("x.jsonl", b'{"step": 0, "layer": 0, "top_indices": [[%s, 1]]}' % (b"9" * 50)),
    "uneven rows": ("x.jsonl", json.dumps({**GOOD_LINE, "top_indices": [[0, 1], [2]]}).encode()),
    "no rows": ("x.jsonl", json.dumps({**GOOD_LINE, "top_indices": None}).encode()),
    "a layer in words": ("x.jsonl", json.dumps({**GOOD_LINE, "layer": "first"}).encode()),
    "a layer below 0": ("x.jsonl", json.dumps({**GOOD_LINE, "layer": -1}).encode()),
    "no step": ("x.jsonl", json.dumps({"layer": 0, "top_indices": [[0, 1]]}).encode()),
    "deep": ("x.json", b"[" * 100000),
    "deep lines": ("x.jsonl", b"[" * 100000),
    "a list in lines": ("x.jsonl", b"[1]"),
    "a number in JSON": ("x.json", b"3"),
    "no responses": ("x.json", b"[]"),
    "a response of nothing": ("x.json", b"{}"),
    "choices that are none": ("x.json", b'{"choices": [3], "prompt_token_ids": 4}'),
    "no base64": ("x.json", b'{"routed_experts": "!!!"}'),
    "a pickle in base64": (
        "x.json",
        json.dumps({"routed_experts": base64.b64encode(pickled_array()).decode()}).encode(),
    ),
    "token ids in words": ("x.json", json.dumps({**VLLM, "prompt_token_ids": ["a"]}).encode()),
    "token ids below 0": ("x.json", json.dumps({**VLLM, "prompt_token_ids": [-4]}).encode()),
    "too many token ids": ("x.json", json.dumps({**VLLM, "prompt_token_ids": [1, 2]}).encode()),
    "token ids of some": ("x.json", json.dumps([VLLM, {**VLLM, "prompt_token_ids": [1]}]).encode()),
    "other layers": ("x.json", json.dumps([VLLM, {"routed_experts": [[[0, 1], [1, 2]]]}]).encode()),
    "nothing but fillers": ("x.json", b'{"routed_experts": [[[-1, -1]]]}'),
}


@pytest.mark.parametrize("name, content", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_trace_is_refused_in_a_sentence(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=SENTENCE):
        read_trace(tmp_path / name)
    assert os.listdir(tmp_path) == [name]  # nothing was executed


def test_layers_of_other_tokens(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((3, 2), int), b=np.zeros((4, 2), int))
    with pytest.raises(ValueError, match="must have the same tokens"):
        read_trace(tmp_path / "x.npz")


MEGATRON = {
    "other layers": ([line(0, 0, choices()[0]), line(1, 1, choices()[0])], "must have the same layers"),
    "other tokens": ([line(0, 0, choices()[0]), line(0, 1, choices()[0, :3])], "must have the same tokens"),
    "other micro-batches": ([line(0, 0, choices()[0]), line(0, 1, choices()[0]), line(0, 1, choices()[1])], "as many"),
    "another K": ([line(0, 0, choices()[0]), line(1, 0, choices()[0, :, :1])], "one number of experts a token"),
    "prediction alone": ([line(0, 0, choices()[0], block="mtp")], "must hold choices"),
}


@pytest.mark.parametrize("lines, rule", MEGATRON.values(), ids=MEGATRON.keys())
def test_traces_of_megatron_that_do_not_fit(tmp_path, lines, rule):
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=SENTENCE) as caught:
        read_trace(tmp_path)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    "documents",
    [
        [],
        [{"length": TOKENS + 1}],
        [{"length": -1}, {"length": TOKENS + 1}],
        [{"length": True}],
        [{"length": 2.0}],
        [{"length": 10**30}],
        [{}],
        [{"token_ids": [1, 2], "length": 3}],
        [{"token_ids": [1.5]}],
        [{"token_ids": "abc"}],
        [{"token_ids": [2**31]}],
        [{"token_ids": [0] * 4}, {"length": TOKENS - 4}],
        [{"length": TOKENS, "domain": 3}],
        [3],
        3,
        {"length": TOKENS},
        "missing.jsonl",
    ],
)
def test_documents_that_do_not_fit(tmp_path, documents):
    save_list(tmp_path / "replay.npz", choices())
    with pytest.raises(ValueError, match=SENTENCE):
        read_trace(tmp_path / "replay.npz", documents=documents)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors", ".json", ".jsonl"])
def test_a_pipe_is_no_trace(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    for path in (tmp_path / f"pipe{suffix}", tmp_path / f"missing{suffix}"):
        for kind in (None, "megatron", "vllm", "router_replay"):
            with pytest.raises(ValueError, match="must be a file"):
                read_trace(path, kind)


def test_a_pipe_among_ranks(tmp_path):
    os.mkfifo(tmp_path / "router_trace_rank0.jsonl")
    with pytest.raises(ValueError, match="must be a file"):
        read_trace(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="must be a folder with"):
        read_trace(tmp_path / "folder")
    with pytest.raises(ValueError, match="must be a file"):
        read_trace(tmp_path / "folder", "vllm")


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": 3},
        {"path": b"x"},
        {"kind": "olmoe"},
        {"micro_batch_size": 0},
        {"micro_batch_size": 5},
        {"micro_batch_size": None},
        {"path": "x" * 5000},
        {"path": "a\0b.npz"},
    ],
)
def test_arguments(tmp_path, arguments):
    save_list(tmp_path / "replay.npz", choices())
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=SENTENCE):
        read_trace(**{"path": tmp_path / "replay.npz", **arguments})


BOUNDED = """
import re, sys
from edl.diagnostics.traces import read_trace
most = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = most()
for path in sys.argv[1:]:
    try:
        read_trace(path, "router_replay" if path.endswith("npy") else None)
    except ValueError as error:
        assert str(error).startswith("edl::read_trace"), error
    else:
        raise AssertionError(path)
print(most() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux, which tells a process's memory")
def test_what_a_file_says_of_its_size_is_not_believed(tmp_path):
    names = [name for name in HOSTILE if "huge" in name or "bomb" in name or "many" in name or "packed" in name]
    paths = []
    for place, name in enumerate(names):
        suffix, content = HOSTILE[name]
        paths.append(tmp_path / f"{place}{suffix[1:]}")
        paths[-1].write_bytes(content)
    done = subprocess.run([sys.executable, "-c", BOUNDED, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 2**10  # KiB

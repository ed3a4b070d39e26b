"""From a trace to a record."""

import os
import pathlib
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import MOST_EXPERTS, Record
from edl.diagnostics.traces import documents as described
from edl.diagnostics.traces import megatron, router_replay, vllm
from edl.diagnostics.traces.arrays import SUFFIXES, read_arrays
from edl.diagnostics.traces.trace import Trace, check_file, json_lines
from edl.ops import checks

KINDS = ["megatron", "router_replay", "vllm"]


def read_trace(
    path: str | os.PathLike[str],
    kind: str | None = None,
    documents: described.Documents | None = None,
    num_experts: int | None = None,
    micro_batch_size: int = 1,
) -> Record:
    """Reads choices that another program has recorded.

        record = read_trace("traces", documents="documents.jsonl")        # Megatron's folder
        record = read_trace("replay.pt", num_experts=128)                 # a list of [T, K] per layer
        record = read_trace("responses.jsonl")                            # vLLM's answers

    Traces hold numbers of experts and little else. What they do not say comes beside them as JSON lines, a line a
    document in the order of the trace's tokens: {"token_ids": [5, 8, 2], "domain": "code"}, or {"length": 3, "domain":
    "code"} where token ids are not known. Without them each request or sequence is a document, and "all" is the domain;
    token ids that nobody knows are negative and all different, so that no measure takes two tokens for the same.

    Args:
        path: of the trace. Megatron's: a folder with `router_trace_rank*.jsonl`, or one of them. Router replay's: an
            array [T, K] per layer in `.npz`, `.safetensors` or `.pt`, or one [L, T, K] in `.npy` or `.pt`; -1 is no
            choice. vLLM's: responses as `.json` or `.jsonl`, or an array [tokens, layers, K] a request.
        kind (str, optional): "megatron", "router_replay" or "vllm". Default: what the file looks like; a single array
            of three dimensions does not tell.
        documents (path or iterable of mappings, optional): as above.
        num_experts (int, optional): E of all layers. Default: the highest expert in the trace + 1, which misses experts
            at the end that nobody chose.
        micro_batch_size (int): sequences whose tokens alternate in Megatron's micro-batches, position 0 of each, then
            position 1. Default: 1.

    Returns:
        Record.

    Raises:
        ImportError: no numpy, or no safetensors.
        ValueError: a broken or foreign file, or what does not fit together.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ValueError(f"edl::read_trace: path must be a path (got {path!r})")
    micro_batch_size = checks.as_integer("read_trace", "micro_batch_size", micro_batch_size, lowest=1)
    path = pathlib.Path(path)
    kind = _kind_of(path) if kind is None else kind
    checks.check_choice("read_trace", "kind", kind, KINDS)
    if kind == "vllm" and micro_batch_size > 1:
        raise ValueError(f"edl::read_trace: micro_batch_size must be 1 for vLLM (got {micro_batch_size})")
    if kind == "vllm":
        trace = vllm.read(path)
    else:
        trace = (megatron if kind == "megatron" else router_replay).read(path, micro_batch_size)
    parts = _parts(trace, documents, path)
    facts = {"trace": path.name, "format": kind, **trace.facts}
    layers = _layers(trace, num_experts, path)
    if num_experts is None:
        facts["experts"] = "the highest one that was chosen, and those before it"
    return _record(trace, parts, layers, facts)


def _kind_of(path: pathlib.Path) -> str:
    """What a file looks like."""
    if os.path.isdir(path):
        return "megatron"
    check_file(path)
    if path.suffix == ".json":
        return "vllm"
    if path.suffix == ".jsonl":
        first = next((row for _, row in json_lines(path)), {})
        return "megatron" if "top_indices" in first else "vllm"
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"edl::read_trace: {path} must be a folder, or one of .json, .jsonl, {', '.join(SUFFIXES)} (got "
            f"{path.suffix!r})"
        )
    arrays = read_arrays(path)
    dimensions = {array.ndim for array in arrays.values()}
    if dimensions == {2}:
        return "router_replay"
    if dimensions == {3} and list(arrays) != [""]:
        return "vllm"
    raise ValueError(
        f"edl::read_trace: kind must be given for {path}, which may be [layers, tokens, K] or [tokens, layers, K] (got "
        f"arrays of {sorted(dimensions)} dimensions)"
    )


def _parts(trace: Trace, documents: described.Documents | None, path: pathlib.Path) -> described.Parts:
    """The documents of a trace, as the user says or as it has them."""
    total = sum(trace.lengths)
    if not trace.layers or not total:
        raise ValueError(f"edl::read_trace: {path} must hold choices (got none)")
    if documents is None:
        return described.Parts(list(trace.lengths), [0] * len(trace.lengths), ["all"], trace.token_ids)
    parts = described.read(documents)
    if sum(parts.lengths) != total:
        raise ValueError(
            f"edl::read_trace: documents must have as many tokens as {path}, {total} (got {sum(parts.lengths)})"
        )
    if trace.token_ids is None or parts.token_ids is None:
        known = trace.token_ids if parts.token_ids is None else parts.token_ids
        return parts._replace(token_ids=known)
    if (parts.token_ids != trace.token_ids).any():
        raise ValueError(f"edl::read_trace: token_ids of documents must be those of {path} (got others)")
    return parts


def _layers(trace: Trace, num_experts: int | None, path: pathlib.Path) -> list[LayerFacts]:
    highest = max(int(experts.max()) for experts in trace.layers.values())
    if num_experts is None:
        num_experts = max(highest + 1, 1)
    num_experts = checks.as_integer("read_trace", "num_experts", num_experts, lowest=1)
    if not highest < num_experts <= MOST_EXPERTS:
        raise ValueError(
            f"edl::read_trace: num_experts must be above the highest choice in {path}, {highest}, and at most "
            f"{MOST_EXPERTS} (got {num_experts})"
        )
    return [LayerFacts(number, "", num_experts, experts.shape[1]) for number, experts in trace.layers.items()]


def _record(trace: Trace, parts: described.Parts, layers: list[LayerFacts], facts: dict[str, Any]) -> Record:
    np = require("numpy", "read_trace")
    offsets = np.concatenate([[0], np.cumsum(parts.lengths)])
    token_ids = parts.token_ids if parts.token_ids is not None else -1 - np.arange(offsets[-1])
    return Record(layers, parts.domains, token_ids, offsets, parts.labels, list(trace.layers.values()), facts=facts)

"""What vLLM returns with `--enable-return-routed-experts`: choices [tokens, layers, K] of each request."""

import base64
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.traces.arrays import SUFFIXES, array_of, read_arrays
from edl.diagnostics.traces.trace import Trace, broken_in_a_sentence, check_file, choices_of, json_lines, token_ids_of

# A JSON document is parsed whole; lines of JSON may be as many as there are.
_LARGEST_DOCUMENT = 2**30


def read(path: pathlib.Path) -> Trace:
    """Reads the responses to requests, of which the prompt counts.

    Either JSON lines, or one JSON of a response or a list of them: `prompt_routed_experts`, or `routed_experts` (of the
    response or its first choice) as far as `prompt_token_ids` go; as lists or as the `.npy` in base64 that the server
    sends. Or arrays [prompt_len, L, K]: one in `.npy`, one a request in `.npz`, `.safetensors` or `.pt`.

    A row with one and the same expert K > 1 times is a filler (of a dense layer, or a token without a pass), and no
    choice; a layer without any is left out. Layers are numbered as they lie in the arrays.

    Args:
        path: of the file.

    Raises:
        ImportError: a missing package.
        ValueError: a broken or foreign file, requests of different layers or K.
    """
    np = require("numpy", "read_trace")
    requests: list[Any] = []
    token_ids: list[Any] = []
    for name, experts, ids in _requests(path):
        experts = choices_of(experts, path, name, "tokens", "layers", "experts a token")
        if ids is not None:
            ids = token_ids_of(ids, path, f"prompt_token_ids of {name}")
            if len(experts) < len(ids):
                raise ValueError(
                    f"edl::read_trace: {name} in {path} must have choices for its {len(ids)} prompt_token_ids (got "
                    f"{len(experts)})"
                )
            experts = experts[: len(ids)]
        requests.append(experts)
        token_ids.append(ids)
    shapes = {experts.shape[1:] for experts in requests}
    if len(shapes) != 1:
        raise ValueError(
            f"edl::read_trace: requests in {path} must have the same layers and experts a token (got "
            f"{sorted(shapes)[:8]})"
        )
    if any(ids is None for ids in token_ids) and any(ids is not None for ids in token_ids):
        raise ValueError(f"edl::read_trace: requests in {path} must all have prompt_token_ids, or none (got some)")
    layers = {}
    for number in range(requests[0].shape[1]):
        experts = _without_fillers(np.concatenate([request[:, number] for request in requests]))
        if (experts >= 0).any():
            layers[number] = experts
    known = np.concatenate(token_ids) if token_ids[0] is not None else None
    return Trace(layers, [len(request) for request in requests], known)


def _without_fillers(experts: Any) -> Any:
    np = require("numpy", "read_trace")
    if experts.shape[1] == 1:
        return experts
    is_filler = (experts == experts[:, :1]).all(1)
    return np.where(is_filler[:, None], -1, experts).astype(experts.dtype, copy=False)


def _requests(path: pathlib.Path) -> Iterator[tuple[str, Any, Any]]:
    """The name of each request, for sentences, its choices and its token ids, where they are known."""
    if path.suffix in SUFFIXES:
        for name, array in read_arrays(path).items():
            yield name or "the array", array, None
        return
    for name, row in json_lines(path) if path.suffix == ".jsonl" else _document(path):
        choice = row.get("choices")
        choice = choice[0] if isinstance(choice, list) and choice and isinstance(choice[0], dict) else {}
        found = [row.get("prompt_routed_experts"), row.get("routed_experts"), choice.get("routed_experts")]
        experts = next((each for each in found if each is not None), None)
        if experts is None:
            raise ValueError(
                f"edl::read_trace: {name} of {path} must have prompt_routed_experts or routed_experts (got "
                f"{sorted(row)[:8]})"
            )
        ids = row.get("prompt_token_ids")
        ids = choice.get("prompt_token_ids") if ids is None else ids
        yield name, _decoded(experts, path), ids


def _document(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    check_file(path)
    if path.stat().st_size > _LARGEST_DOCUMENT:
        raise ValueError(
            f"edl::read_trace: {path} must be smaller than 1 GiB, JSON lines may be larger (got {path.stat().st_size} "
            "bytes)"
        )
    with broken_in_a_sentence(path):
        content = json.loads(path.read_bytes())
    rows = content if isinstance(content, list) else [content]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"edl::read_trace: {path} must be a response or a list of them (got something else)")
    yield from ((f"response {number}", row) for number, row in enumerate(rows))


def _decoded(experts: Any, path: pathlib.Path) -> Any:
    """Choices as they are, or from the `.npy` in base64."""
    if not isinstance(experts, str):
        return experts
    with broken_in_a_sentence(path):
        content = base64.b64decode(experts, validate=True)
        return array_of(io.BytesIO(content), len(content), path)

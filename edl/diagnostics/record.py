"""The record of a routing: which experts the tokens of sampled documents chose, token by token."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edl.diagnostics import files
from edl.diagnostics.extras import require
from edl.diagnostics.layers import LayerFacts

KIND = "routing_record"
VERSION = 1
# A choice is written in two bytes, and the highest number is none.
MOST_EXPERTS = 2**16 - 1


class Record:
    """The choices of N documents, of which each has a window of tokens, T together.

        record = Record.load("routing/record.safetensors")
        record.experts(0)        # [T, K], of the first layer
        record.counts(0)         # [N, E], choices by document

    Args:
        layers (sequence of LayerFacts): L, in the order of the model.
        domains (sequence of str): names, D.
        token_ids (array[T]): of integers, window after window; where they are not known, negative and all different.
        offsets (array[N + 1]): of integers, where windows begin in it; T at the end.
        labels (array[N]): the domain of each document, in [0, D).
        experts (sequence of array[T, K], or callable): of each layer, or what gives them by the layer's place; what is
            outside of [0, E) is none.
        weights (sequence of array[T, K], or callable, optional): of the choices.
        keys (array[N], optional): int64, by which two records know that a document is the same; default 0, 1, …
        groups (array[N], optional): int64; documents of one source share one, as they are no independent observations.
            Default: each has its own.
        facts (mapping, optional): of model, text and sample, for people to read; JSON.
        token_texts (mapping, optional): the text of token ids, where there is a tokenizer.

    Raises:
        ImportError: no numpy.
        ValueError: what does not fit together.
    """

    def __init__(
        self,
        layers: Sequence[LayerFacts],
        domains: Sequence[str],
        token_ids: Any,
        offsets: Any,
        labels: Any,
        experts: Sequence[Any] | Callable[[int], Any],
        weights: Sequence[Any] | Callable[[int], Any] | None = None,
        keys: Any = None,
        groups: Any = None,
        facts: Mapping[str, Any] | None = None,
        token_texts: Mapping[int, str] | None = None,
    ) -> None:
        np = require("numpy", "Record")
        self.layers, self.domains = tuple(layers), tuple(domains)
        largest = max((layer.num_experts for layer in self.layers), default=0)
        if largest > MOST_EXPERTS:
            raise ValueError(f"edl::Record: a layer must have at most {MOST_EXPERTS} experts (got {largest})")
        for name, given in {"experts": experts, "weights": weights}.items():
            if given is not None and not callable(given) and len(given) != len(self.layers):
                raise ValueError(f"edl::Record: {name} must be of each of {len(self.layers)} layers (got {len(given)})")
        self.token_ids = _integers("token_ids", token_ids, np.int32)
        self.offsets = _integers("offsets", offsets, np.int64)
        self.labels = _integers("labels", labels, np.int32)
        number = len(self.labels)
        own = np.arange(number, dtype=np.int64)
        self.keys = own if keys is None else _integers("keys", keys, np.int64)
        self.groups = own if groups is None else _integers("groups", groups, np.int64)
        self.facts, self.token_texts = dict(facts or {}), dict(token_texts or {})
        self._experts = experts if callable(experts) else list(experts).__getitem__
        self._last: tuple[int, Any] | None = None  # the layer that was asked for last, and will be again
        self._weights = weights if weights is None or callable(weights) else list(weights).__getitem__
        shapes = {"offsets": (number + 1,), "keys": (number,), "groups": (number,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"edl::Record: {name} must have the shape {list(shape)}, as there are {number} labels (got "
                    f"{list(getattr(self, name).shape)})"
                )
        is_growing = self.offsets[0] == 0 and (np.diff(self.offsets) >= 0).all()
        if not is_growing or self.offsets[-1] != len(self.token_ids):
            raise ValueError(
                f"edl::Record: offsets must grow from 0 to the number of token_ids, {self.token_ids.size} (got others)"
            )
        if number and not (self.labels.min() >= 0 and self.labels.max() < len(self.domains)):
            raise ValueError(
                f"edl::Record: labels must be in [0, {len(self.domains)}) (got {self.labels.min()} to "
                f"{self.labels.max()})"
            )

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def documents(self) -> Any:
        """The document of each token, array[T] of int64."""
        np = require("numpy", "Record")
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def experts(self, place: int) -> Any:
        """The choices of the place-th layer, array[T, K] of int64 in [0, E], E for none; not to be written into.

        Raises:
            ValueError: they are not T rows of integers.
        """
        if self._last is None or self._last[0] != place:
            self._last = (place, self._read_experts(place))
        return self._last[1]

    def _read_experts(self, place: int) -> Any:
        np = require("numpy", "Record")
        chosen = np.asarray(self._experts(place))
        if chosen.ndim != 2 or len(chosen) != self.num_tokens or chosen.dtype.kind not in "iu":
            raise ValueError(
                f"edl::Record: experts of a layer must be integers [{self.num_tokens}, K] (got {chosen.dtype} "
                f"{list(chosen.shape)})"
            )
        chosen = chosen.astype(np.int64)
        num_experts = self.layers[place].num_experts
        return np.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen)

    def weights(self, place: int) -> Any:
        """The weights of the choices, array[T, K] of float32; None where they were not kept.

        Raises:
            ValueError: they are not numbers in the shape of the choices.
        """
        np = require("numpy", "Record")
        if self._weights is None:
            return None
        weights, shape = np.asarray(self._weights(place)), self.experts(place).shape
        if weights.shape != shape or weights.dtype.kind not in "fiu":
            raise ValueError(
                f"edl::Record: weights of a layer must be numbers {list(shape)}, as the choices are (got "
                f"{weights.dtype} {list(weights.shape)})"
            )
        return weights.astype(np.float32)

    def counts(self, place: int) -> Any:
        """How often each document chose each expert of the place-th layer, array[N, E] of float64."""
        np = require("numpy", "Record")
        num_experts = self.layers[place].num_experts
        cells = self.documents[:, None] * (num_experts + 1) + self.experts(place)
        counts = np.bincount(cells.ravel(), minlength=len(self) * (num_experts + 1))
        return counts.reshape(len(self), num_experts + 1)[:, :num_experts].astype(np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record; the file is whole or as before.

        Raises:
            ImportError: no safetensors.
            OSError: it cannot be written.
        """
        np = require("numpy", "Record")
        arrays = {name: getattr(self, name) for name in ("token_ids", "offsets", "labels", "keys", "groups")}
        for place, layer in enumerate(self.layers):
            kind = np.uint8 if layer.num_experts < 2**8 else np.uint16
            arrays[f"experts.{place}"] = self.experts(place).astype(kind)
            if self._weights is not None:
                arrays[f"weights.{place}"] = self.weights(place).astype(np.float16)
        header = {
            "layers": files.layers_to_json(self.layers),
            "domains": list(self.domains),
            "facts": self.facts,
            "token_texts": {str(number): text for number, text in self.token_texts.items()},
        }
        files.save(path, KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Record":
        """Opens a record; the choices of a layer are read when they are asked for.

        Raises:
            ImportError: no safetensors.
            ValueError: no such file, or a broken or foreign one.
        """
        arrays = files.Arrays(path, KIND, VERSION)
        header = arrays.header
        layers, domains = files.layers_of(header, path, KIND), files.names_of(header, path, KIND)
        vectors = {name: arrays.checked(name, (None,), "iu") for name in ("token_ids", "offsets", "labels")}
        vectors |= {name: arrays.checked(name, (len(vectors["labels"]),), "iu") for name in ("keys", "groups")}
        texts, facts = header.get("token_texts", {}), header.get("facts", {})
        is_right = isinstance(texts, dict) and isinstance(facts, dict)
        are_ids = is_right and all(re.fullmatch("[0-9]{1,10}", name) for name in texts)
        if not are_ids or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"edl::{KIND}: {path} must have facts, and texts by token id (got others)")
        of_tokens = (len(vectors["token_ids"]), None)

        def experts(place: int) -> Any:
            return arrays.checked(f"experts.{place}", of_tokens, "iu")

        def weights(place: int) -> Any:
            return arrays.checked(f"weights.{place}", of_tokens, "f")

        token_texts = {int(name): text for name, text in texts.items()}
        has_weights = "weights.0" in arrays.names
        return cls(
            layers,
            domains,
            experts=experts,
            weights=weights if has_weights else None,
            facts=facts,
            token_texts=token_texts,
            **vectors,
        )


def _integers(name: str, given: Any, kind: Any) -> Any:
    """A vector of integers, as this type of NumPy.

    Raises:
        ValueError: something else, or numbers that the type cannot hold.
    """
    np = require("numpy", "Record")
    array = np.asarray(given)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"edl::Record: {name} must be integers in one row (got {array.dtype} {list(array.shape)})")
    limits = np.iinfo(kind)
    if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise ValueError(
            f"edl::Record: {name} must be from {limits.min} to {limits.max} (got {array.min()} to {array.max()})"
        )
    return array.astype(kind, copy=False)


def joined(parts: Sequence[Record], order: Sequence[int], facts: dict[str, Any], token_texts: dict[int, str]) -> Record:
    """The documents of several records as one, in another order.

    Args:
        parts: of the same layers and domains.
        order: which document comes where.
        facts: of the whole.
        token_texts: likewise.
    """
    np = require("numpy", "Record")
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    begins = np.cumsum(lengths) - lengths
    places = np.concatenate([np.arange(begins[document], begins[document] + lengths[document]) for document in order])
    of_tokens = np.concatenate([part.token_ids for part in parts])[places]
    of_documents = {
        name: np.concatenate([getattr(part, name) for part in parts])[list(order)]
        for name in ("labels", "keys", "groups")
    }

    def experts(place: int) -> Any:
        return np.concatenate([part.experts(place) for part in parts])[places]

    def weights(place: int) -> Any:
        return np.concatenate([part.weights(place) for part in parts])[places]

    return Record(
        parts[0].layers,
        parts[0].domains,
        of_tokens,
        np.concatenate([[0], np.cumsum(lengths[list(order)])]),
        experts=experts,
        weights=None if parts[0].weights(0) is None else weights,
        facts=facts,
        token_texts=token_texts,
        **of_documents,
    )

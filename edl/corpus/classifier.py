"""A linear model over hashed n-grams: which domain a document is of. Two arrays and a page of JSON, no pickle."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from edl.corpus.extras import require
from edl.corpus.features import Features

VERSION = 1
MODEL = "model.json"
WEIGHTS = "model.safetensors"
MOST_DOMAINS = 2**15  # what labels of 16 bits can tell apart
_MADE_BY = "a model must be a folder that edl label train or edl label cluster made"


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Probabilities softmax(weightsᵀ x + bias) of the features x of a document.

    Of `train`, a row of the model is a domain; of `cluster`, a cluster: its nearest centre c is that of the highest
    2 c·x - |c|², which is linear too. Rows of one name are one domain, whose probability is the sum of theirs.

    Args:
        rows: of each row, "name" and what is known of it.
        weights: array [buckets, rows] in float32.
        bias: array [rows] in float32.
        features: what x is.
        measured: how good it is, as training found.
        hash: SHA-256 of the file that has the names and the hash of the weights; None before it is saved.
    """

    rows: tuple[dict[str, Any], ...]
    weights: Any
    bias: Any
    features: Features
    measured: dict[str, Any]
    hash: str | None = None

    @property
    def domains(self) -> list[str]:
        """Names of domains; ids are places in it."""
        return list(dict.fromkeys(row["name"] for row in self.rows))

    def probabilities(self, texts: Sequence[str]) -> Any:
        """Array [N, D] in float32; a text's row has the same bits whatever other texts it comes with."""
        return self.probabilities_of(self.features.of(texts))

    def probabilities_of(self, vectors: Any) -> Any:
        """The same of vectors, sparse [N, buckets]."""
        np = require("numpy")
        scores = (vectors @ self.weights + self.bias).astype(np.float64)
        odds = np.exp(scores - scores.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        place = {name: domain for domain, name in enumerate(self.domains)}
        result = np.zeros((len(odds), len(place)), np.float64)
        for row, facts in enumerate(self.rows):
            result[:, place[facts["name"]]] += odds[:, row]
        return result.astype(np.float32)

    def predict(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """The most probable domain of each text.

        Returns:
            (ids int16 [N], their probabilities float32 [N]).
        """
        probabilities = self.probabilities(texts)
        ids = probabilities.argmax(1)
        return ids.astype("int16"), probabilities.max(1, initial=0.0)

    def save(self, folder: str | os.PathLike[str]) -> "Classifier":
        """Writes `model.safetensors` and `model.json` and returns the classifier with its hash.

        Raises:
            ValueError: the folder has a model, which may have names that somebody gave.
        """
        folder = pathlib.Path(folder)
        if (folder / MODEL).exists():
            raise ValueError(f"edl::label: a model is never written over, choose another folder (got {folder})")
        arrays = require("safetensors.numpy").save({"weights": self.weights, "bias": self.bias})
        page = {
            "version": VERSION,
            "domains": list(self.rows),
            "features": dataclasses.asdict(self.features),
            "measured": self.measured,
            "weights": hashlib.sha256(arrays).hexdigest(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / WEIGHTS, arrays)
            _write(
                folder / MODEL, (json.dumps(page, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
            )
        except OSError as error:
            raise ValueError(f"edl::label: a model's folder must be writable (got {error})") from error
        return Classifier.load(folder)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Classifier":
        """Reads what `save` wrote; names may have been changed meanwhile.

        Raises:
            ValueError: a file is missing, damaged or of another version.
        """
        folder = pathlib.Path(folder)
        try:
            written, arrays = _read(folder / MODEL), _read(folder / WEIGHTS)
            page = _page(written)
            if hashlib.sha256(arrays).hexdigest() != page["weights"]:
                raise ValueError(f"{WEIGHTS} is not the one that {MODEL} was written with")
            features = Features(**page["features"])
            tensors = require("safetensors.numpy").load(arrays)
            rows, weights, bias = tuple(page["domains"]), tensors["weights"], tensors["bias"]
            _check(weights, (features.buckets, len(rows)))
            _check(bias, (len(rows),))
        except KeyError as error:
            raise ValueError(f"edl::label: {_MADE_BY} (got {folder}: no {error})") from error
        except (OSError, ValueError, TypeError, RecursionError, require("safetensors").SafetensorError) as error:
            raise ValueError(f"edl::label: {_MADE_BY} (got {folder}: {error})") from error
        return Classifier(rows, weights, bias, features, page["measured"], hashlib.sha256(written).hexdigest())


def _page(written: bytes) -> dict[str, Any]:
    page = json.loads(written)
    if not isinstance(page, dict) or page.get("version") != VERSION:
        raise ValueError(f"{MODEL} is not of version {VERSION}")
    rows = page["domains"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_DOMAINS:
        raise ValueError("domains are not a list")
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"a domain has no name but {name!r}")
    if not isinstance(page["features"], dict) or not isinstance(page["measured"], dict):
        raise ValueError("features and what was measured are not objects")
    return page


def _check(array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != "float32" or not require("numpy").isfinite(array).all():
        raise ValueError(f"an array is not finite float32 of {shape}")


def _read(path: pathlib.Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no file {path.name}")
    return path.read_bytes()


def _write(path: pathlib.Path, content: bytes) -> None:
    """The whole file or none."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

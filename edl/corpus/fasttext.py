"""A fastText model of the user's own, looked through before the library, which hangs on a damaged one, loads it."""

import dataclasses
import hashlib
import mmap
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

from edl.corpus.classifier import MOST_DOMAINS
from edl.corpus.extras import require

_MAGIC, _NEWEST_VERSION = 793712314, 12
_SUPERVISED = 3
_PREFIX = "__label__"


@dataclasses.dataclass(frozen=True, eq=False)
class FastText:
    """The labels of a supervised model, without their `__label__`, for the beginnings of documents.

    Args:
        model: as the package loads it.
        labels: the model's, in its order.
        hash: SHA-256 of the file.
        max_characters (int): of a document, how many are read. Default: 2000.
    """

    model: Any
    labels: list[str]
    hash: str
    max_characters: int = 2000

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "FastText":
        """Reads a file `.bin` or `.ftz`.

        Raises:
            ValueError: no file, no supervised model, damaged, or cut off.
            ImportError: no package for it; fasttext-predict, fasttext-predict-v2 and fasttext itself do.
        """
        library = require("fasttext", extra="fasttext")
        path = pathlib.Path(path)
        try:
            if not path.is_file():
                raise ValueError("no file")
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                labels = _Content(content).labels()
                digest = hashlib.sha256(content).hexdigest()
            return FastText(library.load_model(str(path)), labels, digest)
        except (OSError, ValueError, MemoryError) as error:
            rule = "a fastText model must be a whole file of a supervised model"
            raise ValueError(f"edl::label: {rule} (got {path}: {error})") from error

    @property
    def domains(self) -> list[str]:
        return [label.removeprefix(_PREFIX) for label in self.labels]

    def predict(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """The most probable domain of each text.

        Returns:
            (ids int16 [N], their probabilities float32 [N]); -1 and 0 for a text of which the model knows no word.
        """
        np = require("numpy")
        ids, probabilities = np.full(len(texts), -1, np.int16), np.zeros(len(texts), np.float32)
        place_of = {label: domain for domain, label in enumerate(self.labels)}
        for place, text in enumerate(texts):
            line = text[: self.max_characters].replace("\n", " ").encode("utf-8", "replace").decode()
            labels, found = self.model.predict(line)
            if labels:
                ids[place] = place_of[labels[0]]
                probabilities[place] = min(float(found[0]), 1.0)  # fastText adds 1e-5
        return ids, probabilities


class _Content:
    """What a file of a model says of its sizes; the rules of fastText's `loadModel`, which checks none of them."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def labels(self) -> list[str]:
        """Names of the labels, after a walk through the whole file."""
        magic, version = self._take("ii")
        if magic != _MAGIC or version > _NEWEST_VERSION:
            raise ValueError("no fastText model")
        width, _, _, _, _, word_n_grams, loss, model, buckets, _, longest, _, _ = self._take("12id")
        if model != _SUPERVISED or not 1 <= loss <= 4:
            raise ValueError("not supervised")
        has_buckets = word_n_grams > 1 or (longest != 0 and version != 11)  # whose remainder is taken
        if width < 1 or buckets < has_buckets:
            raise ValueError("sizes that are not positive")
        num_words, labels, num_pruned = self._dictionary()
        num_rows = num_words + (buckets if num_pruned < 0 else num_pruned)
        is_quantised = self._matrix(num_rows, width, may_be_quantised=True)
        self._matrix(len(labels), width, may_be_quantised=is_quantised)
        if self.place != len(self.content):
            raise ValueError("more bytes than a model")
        return labels

    def _dictionary(self) -> tuple[int, list[str], int]:
        """(number of words, labels, number of pruned n-grams or -1)."""
        size, num_words, num_labels, _, num_pruned = self._take("3i2q")
        if num_words < 0 or size != num_words + num_labels or not 1 <= num_labels <= MOST_DOMAINS:
            raise ValueError(f"{num_labels} labels")
        labels = []
        for entry in range(size):
            end = self.content.find(b"\0", self.place)
            if end < 0:
                raise ValueError("cut off")
            name, self.place = self.content[self.place : end], end + 1
            count, kind = self._take("qb")
            if kind != (entry >= num_words) or not 0 <= count < 10**15:
                raise ValueError("words that are no words")
            if kind:
                labels.append(name.decode())
        if len(set(labels)) != num_labels:
            raise ValueError("labels of one name")
        for _ in range(num_pruned):
            place, row = self._take("ii")
            if not 0 <= row < num_pruned:
                raise ValueError(f"a row that is not there for {place}")
        return num_words, labels, num_pruned

    def _matrix(self, num_rows: int, width: int, may_be_quantised: bool) -> bool:
        """Passes a matrix and returns whether it is quantised."""
        [is_quantised] = self._take("?")
        is_quantised = is_quantised and may_be_quantised
        [has_norms] = self._take("?") if is_quantised else [False]
        if self._take("2q") != (num_rows, width):
            raise ValueError("a matrix of another size")
        if not is_quantised:
            self._skip(4 * num_rows * width)
            return False
        [num_codes] = self._take("i")
        if num_codes % max(num_rows, 1):
            raise ValueError("codes of another size")
        self._skip(num_codes)
        self._quantiser(width, num_codes // max(num_rows, 1))
        if has_norms:
            self._skip(num_rows)
            self._quantiser(1, 1)
        return True

    def _quantiser(self, width: int, parts: int) -> None:
        found, found_parts, part, last = self._take("4i")
        if (found, found_parts) != (width, parts) or part < 1 or (parts - 1) * part + last != width or last > part:
            raise ValueError("a quantiser of another size")
        self._skip(4 * 256 * width)

    def _take(self, layout: str) -> tuple[Any, ...]:
        begin = self.place
        self._skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.content, begin)

    def _skip(self, size: int) -> None:
        self.place += size
        if size < 0 or self.place > len(self.content):
            raise ValueError("cut off")

"""Hashed n-grams of characters: what a document looks like to a linear model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from edl.corpus.extras import require

_BATCH = 64  # documents whose n-grams are in memory at once
_MULTIPLIER = 0x9E3779B1  # 2^32 over the golden ratio, an odd number


@dataclasses.dataclass(frozen=True)
class Features:
    """log(1 + count) of each n-gram of characters in the beginning of a document, as a vector of length 1.

    n-grams are those of lower-cased words with a blank on either side (scikit-learn's `char_wb`); a script without
    blanks makes long words. An n-gram is known by its hash alone, so there is no vocabulary to keep or to overflow. All
    n-grams of a batch are hashed at once, by arrays, and the same on every machine: h ← (h + c) · 0x9E3779B1 mod 2^32
    for each character c, of which the highest bits count.

    Args:
        max_characters (int): of a document, how many are read. Default: 2000.
        shortest (int): characters of the shortest n-gram. Default: 1, which tells scripts without blanks apart.
        longest (int): characters of the longest, up to 8. Default: 4.
        hash_bits (int): there are 2^hash_bits buckets, 4 to 24. Default: 16.

    Raises:
        ValueError: an option outside its range.
    """

    max_characters: int = 2000
    shortest: int = 1
    longest: int = 4
    hash_bits: int = 16

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int:
                raise ValueError(f"edl::label: {name} must be an integer (got {value!r})")
        if self.max_characters < 1:
            raise ValueError(f"edl::label: max_characters must be at least 1 (got {self.max_characters})")
        if not 1 <= self.shortest <= self.longest <= 8:
            lengths = f"{self.shortest} to {self.longest}"
            raise ValueError(f"edl::label: n-grams must be of 1 to 8 characters, the shortest first (got {lengths})")
        if not 4 <= self.hash_bits <= 24:
            raise ValueError(f"edl::label: hash_bits must be from 4 to 24 (got {self.hash_bits})")

    @property
    def buckets(self) -> int:
        return 1 << self.hash_bits

    def of(self, texts: Sequence[str]) -> Any:
        """The vectors of N texts, a scipy.sparse.csr_array [N, buckets] in float32; of a text without words, zeros.

        A text's vector has the same bits whatever other texts it comes with.
        """
        batches = [self._of_batch(texts[begin : begin + _BATCH]) for begin in range(0, len(texts), _BATCH)]
        return require("scipy.sparse").vstack(batches, format="csr") if batches else self._of_batch([])

    def _of_batch(self, texts: Sequence[str]) -> Any:
        np = require("numpy")
        keys, counts = np.unique(self._keys([self._prepared(text) for text in texts]), return_counts=True)
        owners = keys >> self.hash_bits
        values = np.log1p(counts.astype(np.float64))
        # bincount adds one by one: sums do not depend on where in the batch a text stands.
        values /= np.sqrt(np.bincount(owners, values * values, len(texts)))[owners]
        starts = np.searchsorted(owners, np.arange(len(texts) + 1))
        entries = (values.astype(np.float32), keys & (self.buckets - 1), starts.astype(keys.dtype))
        return require("scipy.sparse").csr_array(entries, shape=(len(texts), self.buckets))

    def _prepared(self, text: str) -> str:
        return f" {' '.join(text[: self.max_characters].lower().split())} "

    def _keys(self, texts: list[str]) -> Any:
        """Of every n-gram of the batch: which text's it is, times the number of buckets, plus its bucket."""
        np = require("numpy")
        characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        owners = np.repeat(np.arange(len(texts), dtype=np.int32) << self.hash_bits, [len(text) for text in texts])
        is_blank = characters == ord(" ")
        is_inner = np.ones(characters.size, np.bool_)  # no blank but at the ends
        hashes = np.zeros(characters.size, np.uint32)
        keys = []
        for length in range(1, min(self.longest, characters.size) + 1):
            starts = slice(characters.size - length + 1)
            last = slice(length - 1, None)
            hashes = (hashes[starts] + characters[last]) * np.uint32(_MULTIPLIER)
            is_inner = is_inner[starts]
            if length > 2:
                is_inner = is_inner & ~is_blank[length - 2 : -1]
            if length >= self.shortest:
                # Two blanks are the border between two texts, and one is no n-gram.
                is_word = is_inner if length > 2 else ~(is_blank[starts] & is_blank[last])
                buckets = (hashes[is_word] >> np.uint32(32 - self.hash_bits)).astype(np.int32)
                keys.append(owners[starts][is_word] + buckets)
        return np.concatenate(keys) if keys else np.empty(0, np.int32)

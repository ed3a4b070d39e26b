"""Which documents of a corpus a model is watched on, and the tokens of each."""

import bisect
import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from edl.corpus.documents import NO_LABEL, Document, Shard
from edl.diagnostics.extras import require

# What a document of so many tokens may have in characters; the rest of it is not tokenised.
_CHARACTERS_PER_TOKEN = 32
SHORT = "shorter than a window"
TWICE = "the same as another"
# More are no domains, and would leave a handful of documents to each.
MOST_DOMAINS = 1024


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a corpus is looked at.

    Attributes:
        windows (int): of each domain, at least; a document has one.
        tokens (int): of all windows together, at least, as far as there are documents.
        window (int): W, tokens that the record keeps of a document.
        length (int): tokens of a document that the model reads, at most.
    """

    windows: int = 64
    tokens: int = 200_000
    window: int = 512
    length: int = 2048

    def documents(self, num_domains: int) -> int:
        """Of each domain, where there are so many domains."""
        return max(self.windows, math.ceil(self.tokens / (self.window * max(num_domains, 1))))


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What a model reads of a document.

    Attributes:
        ids (array[n]): int32.
        is_counted (array[n]): bool; the first token and special ones are read and not counted.
    """

    ids: Any
    is_counted: Any


@dataclasses.dataclass(frozen=True, eq=False)
class SampledDocument:
    """A document that was chosen.

    Attributes:
        rank (int): by which it was chosen, a keyed hash; low ones are.
        key (int): hash of its domain and text, by which another sample knows that it is the same.
        group (int): hash of its source, or its own key.
        tokens (Tokens): what the model reads.
        window (array[W]): places in it that the record keeps, in their order.
    """

    rank: int
    key: int
    group: int
    tokens: Tokens
    window: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    """The documents that a model is watched on.

    Attributes:
        domains (tuple of str): names, sorted.
        documents (tuple of tuples): of each domain, by rank.
        seen (mapping): documents of the corpus by domain.
        left_out (mapping): documents by what was wrong with them; of short ones those that would have been chosen.
    """

    domains: tuple[str, ...]
    documents: tuple[tuple[SampledDocument, ...], ...]
    seen: Mapping[str, int]
    left_out: Mapping[str, int]


def sample_of(
    shards: Sequence[Shard],
    tokenize: Callable[[str], Tokens],
    size: Size,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sample:
    """Reads a corpus to its end and chooses documents: of each domain those whose texts have the lowest keyed hashes.

    So the sample is the same in whatever order the documents come, and a larger one holds a smaller one.

    Args:
        shards: of `edl.corpus.readers.shards_of`.
        tokenize: gives the tokens of a text, at most `size.length`.
        size: how many.
        seed: the key of the hash.
        progress: is told how many bytes were read since last time.

    Raises:
        ValueError: what the readers raise; no labels, too many of them, no document that is long enough.
    """
    chooser = _Chooser(tokenize, size, seed)
    for shard in shards:
        before = 0
        for document in shard.documents():
            chooser.offer(document)
            if progress:
                progress(shard.position - before)
                before = shard.position
    return chooser.sample()


class _Chooser:
    def __init__(self, tokenize: Callable[[str], Tokens], size: Size, seed: int) -> None:
        self.tokenize, self.size = tokenize, size
        self.secret = seed.to_bytes(8, "little", signed=True)
        self.chosen: dict[str, list[SampledDocument]] = {}
        self.seen = collections.Counter[str]()
        self.left_out = collections.Counter[str]()
        self.room = size.documents(1)

    def offer(self, document: Document) -> None:
        """Takes a document where its rank is among the lowest of its domain."""
        if document.problem or document.text is None or document.label is None:
            self.left_out[document.problem or NO_LABEL] += 1
            return
        label, text = document.label, document.text
        self.seen[label] += 1
        if label not in self.chosen:
            self._open(label)
        chosen = self.chosen[label]
        content = text.encode()
        rank = _hash(content, self.secret)
        if len(chosen) == self.room and rank >= chosen[-1].rank:
            return
        place = bisect.bisect_left(chosen, rank, key=lambda other: other.rank)
        if place < len(chosen) and chosen[place].rank == rank:
            self.left_out[TWICE] += 1
            return
        tokens = self.tokenize(text[: _CHARACTERS_PER_TOKEN * self.size.length])
        places = require("numpy", "observe").flatnonzero(tokens.is_counted)
        if len(places) < self.size.window:
            self.left_out[SHORT] += 1
            return
        begin = rank % (len(places) - self.size.window + 1)
        domain = label.encode("utf-8", "surrogatepass")  # a text may be in two domains
        key = _hash(domain + b"\0" + content)
        source = None if document.group is None else document.group.encode("utf-8", "surrogatepass")
        group = key if source is None else _hash(domain + b"/" + source)
        window = places[begin : begin + self.size.window]
        chosen.insert(place, SampledDocument(rank, key, group, tokens, window))
        del chosen[self.room :]

    def _open(self, label: str) -> None:
        """Makes room for a further domain, whose documents take some of the others'."""
        self.chosen[label] = []
        if len(self.chosen) > MOST_DOMAINS:
            raise ValueError(f"edl::observe: there must be at most {MOST_DOMAINS} domains (got more different labels)")
        self.room = self.size.documents(len(self.chosen))
        for chosen in self.chosen.values():
            del chosen[self.room :]

    def sample(self) -> Sample:
        domains = tuple(sorted(label for label, chosen in self.chosen.items() if chosen))
        if not domains:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(
                f"edl::observe: there must be a labelled document of at least {self.size.window} tokens beside the "
                f"first and special ones, --window makes it shorter (got {reasons or 'no document'})"
            )
        documents = tuple(tuple(self.chosen[domain]) for domain in domains)
        return Sample(domains, documents, dict(self.seen), dict(self.left_out))


def _hash(content: bytes, key: bytes = b"") -> int:
    """63 bits."""
    digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1


def bytes_of(length: int) -> Callable[[str], Tokens]:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def tokenize(text: str) -> Tokens:
        np = require("numpy", "observe")
        ids = np.frombuffer(text.encode()[:length], np.uint8).astype(np.int32)
        return Tokens(ids, np.arange(len(ids)) > 0)

    return tokenize


def tokens_of(tokenizer: Any, length: int) -> Callable[[str], Tokens]:
    """A tokenizer of transformers.

    Args:
        tokenizer: of transformers.
        length: tokens of a document, at most.
    """
    special = frozenset(tokenizer.all_special_ids)

    def tokenize(text: str) -> Tokens:
        np = require("numpy", "observe")
        ids = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
        if ids and not 0 <= min(ids) <= max(ids) < 2**31:
            raise ValueError(f"edl::observe: token ids must be in [0, 2³¹) (got {min(ids)} to {max(ids)})")
        is_counted = np.array([place > 0 and number not in special for place, number in enumerate(ids)], bool)
        return Tokens(np.asarray(ids, np.int32), is_counted)

    return tokenize


def texts_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token id that has one; a byte by itself where there is no tokenizer."""
    if tokenizer is None:
        return {number: _byte(number) for number in ids}
    texts = {}
    for number in ids:
        try:
            text = tokenizer.decode([number])
        except Exception:  # whatever a tokenizer does; all but this text is known by now
            continue
        if isinstance(text, str):
            texts[number] = text
    return texts


def _byte(number: int) -> str:
    letter = chr(number)
    return letter if number < 128 and letter.isprintable() else f"\\x{number:02x}"

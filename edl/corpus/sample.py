"""A random sample of a corpus that is read once, in memory that does not grow with it."""

import collections
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edl.corpus.classifier import MOST_DOMAINS
from edl.corpus.documents import NO_LABEL, Document, Shard
from edl.corpus.extras import require


class Sample(NamedTuple):
    """Documents of a corpus.

    Attributes:
        texts: their beginnings, each once.
        labels: what they came with, None where labels were not asked for.
        left_out: how many documents were passed over, by reason.
    """

    texts: list[str]
    labels: list[str | None]
    left_out: dict[str, int]


class _Reservoir:
    """Each of the texts that were added is among those kept with the same probability (Vitter's algorithm R)."""

    def __init__(self, size: int, seed: str) -> None:
        self.size, self.texts, self.number = size, list[str](), 0
        self.random = random.Random(seed)

    def add(self, text: str) -> None:
        self.number += 1
        if len(self.texts) < self.size:
            self.texts.append(text)
        elif (place := self.random.randrange(self.number)) < self.size:
            self.texts[place] = text


def sample_of(
    shards: Sequence[Shard], size: int, max_characters: int, by_label: bool, seed: int = 0, quiet: bool = True
) -> Sample:
    """Reads a corpus to its end.

    Args:
        shards: of `edl.corpus.readers.shards_of`.
        size: how many documents to keep at most, of each label or of all.
        max_characters: of a document, how many are kept.
        by_label: whether to keep as many of each label; documents without one are left out then.
        seed: of the sample.
        quiet: no progress bar.

    Raises:
        ValueError: more labels than labels of 16 bits can tell apart.
    """
    left_out = collections.Counter[str]()
    reservoirs: dict[str | None, _Reservoir] = {}
    for document in _documents(shards, quiet):
        label = document.label if by_label else None
        if document.problem or document.text is None or (by_label and label is None):
            left_out[document.problem or NO_LABEL] += 1
            continue
        if label not in reservoirs:
            if len(reservoirs) == MOST_DOMAINS:
                raise ValueError(f"edl::label: there must be at most {MOST_DOMAINS} domains (got more labels)")
            reservoirs[label] = _Reservoir(size, f"{seed} {label}")
        reservoirs[label].add(document.text[:max_characters])
    texts: dict[str, str | None] = {}
    for label in sorted(reservoirs, key=str):
        for text in reservoirs[label].texts:
            if text in texts:
                left_out["the same as another"] += 1
            else:
                texts[text] = label
    return Sample(list(texts), list(texts.values()), dict(left_out))


def _documents(shards: Sequence[Shard], quiet: bool) -> Iterator[Document]:
    total = sum(shard.num_bytes for shard in shards)
    bar = require("tqdm").tqdm(total=total, unit="B", unit_scale=True, disable=True if quiet else None, leave=False)
    with bar:
        before = 0
        for shard in shards:
            for document in shard.documents():
                bar.update(before + shard.position - bar.n)
                yield document
            before += shard.num_bytes
            bar.update(before - bar.n)

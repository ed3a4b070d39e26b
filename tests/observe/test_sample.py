"""Which documents a model is watched on: the lowest keyed hashes of each domain, whatever the order."""

import collections
import dataclasses
import hashlib
import random

import numpy as np
import pytest

from edl.corpus.documents import EMPTY, Document
from edl.observe.sample import MOST_DOMAINS, SHORT, TWICE, Size, bytes_of, sample_of, texts_of, tokens_of

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@dataclasses.dataclass
class Listed:
    """A shard of documents in memory."""

    given: list
    position: int = 0

    def documents(self, start=0):
        for document in self.given[start:]:
            self.position += len(document.text or "")
            yield document


def documents_of(seed, numbers, words=(4, 30)):
    draw = random.Random(seed)
    return [
        Document(" ".join(draw.choices(WORDS, k=draw.randint(*words))) + f" {label} {place}", label, None)
        for label, number in numbers.items()
        for place in range(number)
    ]


def sample(documents, size, seed=0):
    return sample_of([Listed(documents)], bytes_of(size.length), size, seed)


def rank(text, seed):
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") >> 1


def chosen(sample):
    return {
        domain: [document.tokens.ids.tobytes() for document in documents]
        for domain, documents in zip(sample.domains, sample.documents)
    }


SIZE = Size(windows=5, tokens=0, window=20, length=64)


def test_it_has_the_lowest_ranks_among_the_long_ones():
    documents = documents_of(1, {"news": 40, "code": 30, "prose": 3})
    found = sample(documents, SIZE, seed=7)
    assert found.domains == ("code", "news", "prose")
    for domain, of_domain in zip(found.domains, found.documents):
        long = [document.text for document in documents if document.label == domain and len(document.text) > 20]
        expected = sorted(long, key=lambda text: rank(text, 7))[:5]
        assert [bytes(document.tokens.ids.astype(np.uint8)) for document in of_domain] == [
            text.encode()[:64] for text in expected
        ]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_corpus_does_not_matter(seed):
    documents = documents_of(seed, {"news": 40, "code": 30, "prose": 12})
    shuffled = random.Random(seed).sample(documents, len(documents))
    one, other = sample(documents, SIZE), sample(shuffled, SIZE)
    assert chosen(one) == chosen(other)
    assert [[each.window.tolist() for each in some] for some in one.documents] == [
        [each.window.tolist() for each in some] for some in other.documents
    ]


def test_a_larger_sample_holds_the_smaller_one_and_another_seed_is_another_sample():
    documents = documents_of(3, {"news": 60})
    small, large = chosen(sample(documents, SIZE)), chosen(sample(documents, dataclasses.replace(SIZE, windows=9)))
    assert large["news"][:5] == small["news"]
    assert chosen(sample(documents, SIZE, seed=1)) != small


def test_the_number_of_tokens_is_shared_by_the_domains():
    size = Size(windows=2, tokens=400, window=20, length=64)  # 20 windows of one domain, 10 of each of two
    assert [len(some) for some in sample(documents_of(4, {"a": 50}, (8, 30)), size).documents] == [20]
    assert [len(some) for some in sample(documents_of(4, {"a": 50, "b": 50}, (8, 30)), size).documents] == [10, 10]


def test_a_window_has_counted_tokens_alone_in_their_order():
    for document in sample(documents_of(5, {"a": 30}), SIZE).documents[0]:
        assert len(document.window) == 20 and (np.diff(document.window) == 1).all()
        assert document.window[0] >= 1 and document.window[-1] < len(document.tokens.ids)
        assert document.tokens.is_counted[document.window].all() and not document.tokens.is_counted[0]


def test_windows_begin_anywhere():
    begins = collections.Counter(
        int(document.window[0])
        for document in sample(documents_of(6, {"a": 400}, (30, 30)), dataclasses.replace(SIZE, windows=300)).documents[
            0
        ]
    )
    assert set(begins) == set(range(1, 64 - 20 + 1))


def test_what_is_left_out_is_counted():
    long = "x" * 40
    documents = [
        Document(long, "a", None),
        Document(long, "a", None),
        Document("short", "a", None),
        Document(long + "y", None, None),
        Document(None, "a", EMPTY),
    ]
    found = sample(documents, SIZE)
    assert found.left_out == {TWICE: 1, SHORT: 1, "no label": 1, EMPTY: 1} and found.seen == {"a": 3}


def test_documents_of_a_source_share_a_group_and_others_have_their_own():
    texts = [f"{place} " + "x" * 40 for place in range(4)]
    groups = ["site", "site", None, None]
    given = [Document(text, "a", None, group) for text, group in zip(texts, groups)]
    [documents] = sample(given, SIZE).documents
    by_text = {bytes(each.tokens.ids.astype(np.uint8))[:1].decode(): each for each in documents}
    assert by_text["0"].group == by_text["1"].group
    assert len({each.group for each in documents}) == 3 and by_text["2"].group == by_text["2"].key


def test_a_text_in_two_domains_is_a_document_of_each():
    given = [Document("x" * 40, label, None) for label in ("a", "b", "a", "\ud800")]
    found = sample(given, SIZE)
    assert [len(documents) for documents in found.documents] == [1, 1, 1] and found.left_out == {TWICE: 1}
    assert len({document.key for documents in found.documents for document in documents}) == 3


def test_names_with_half_a_character_are_sources_too():
    [documents] = sample(
        [Document(f"{place}" + "x" * 40, "\ud800", None, "\udfff") for place in (1, 2)], SIZE
    ).documents
    assert documents[0].group == documents[1].group


def test_a_domain_without_a_long_document_is_none():
    found = sample([*documents_of(8, {"a": 5}), Document("no", "b", None)], SIZE)
    assert found.domains == ("a",) and found.seen["b"] == 1


def test_nothing_long_enough_is_a_sentence():
    with pytest.raises(ValueError, match="edl::observe: there must be a labelled document of at least 20 tokens .*"):
        sample([Document("no", "b", None)], SIZE)


def test_more_labels_than_domains_is_a_sentence():
    documents = [Document("x" * 30, str(place), None) for place in range(MOST_DOMAINS + 1)]
    with pytest.raises(ValueError, match=f"at most {MOST_DOMAINS} domains"):
        sample(documents, SIZE)


class Tokenizer:
    """A stand-in for one of transformers: a word a token, a beginning and an end."""

    all_special_ids = (0, 1)

    def __call__(self, text, truncation, max_length, verbose):
        ids = [0, *(2 + WORDS.index(word) for word in text.split() if word in WORDS), 1]
        return {"input_ids": ids[:max_length]}

    def decode(self, ids):
        return WORDS[ids[0] - 2]


def test_special_tokens_are_read_and_not_counted():
    tokens = tokens_of(Tokenizer(), 10)("alpha beta gamma")
    assert tokens.ids.tolist() == [0, 2, 3, 4, 1] and tokens.is_counted.tolist() == [False, True, True, True, False]
    assert texts_of(Tokenizer(), [3]) == {3: "beta"}


@pytest.mark.parametrize("number", [2**31, -1])
def test_token_ids_that_a_record_cannot_hold_are_a_sentence(number):
    class Wide(Tokenizer):
        def __call__(self, *arguments, **options):
            return {"input_ids": [5, number]}

    with pytest.raises(ValueError, match="^edl::observe: token ids must be in "):
        tokens_of(Wide(), 10)("alpha")


def test_tokens_that_cannot_be_decoded_have_no_text():
    assert texts_of(Tokenizer(), [3, 99, 2]) == {3: "beta", 2: "alpha"}


def test_a_byte_has_a_text():
    assert texts_of(None, [65, 10, 200]) == {65: "A", 10: "\\x0a", 200: "\\xc8"}

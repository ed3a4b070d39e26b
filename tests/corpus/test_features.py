"""Hashed n-grams of characters, against scikit-learn's own n-grams and a hash written down once more."""

import collections
import math

import numpy as np
import pytest
from corpus_texts import documents
from sklearn.feature_extraction.text import CountVectorizer

from edl.corpus.features import Features

HOSTILE = [
    "",
    "   ",
    "\n",
    "a",
    "\0\0",
    "ǅ İ ﬁ",
    "\ud800 lone",
    "x" * 5000,
    "中文没有空格。" * 3,
    "a  b\tc\u3000d",
    "🙂" * 9,
]


def by_hand(features, text):
    """bucket → value, from scikit-learn's analyzer and integers of Python."""
    analyzer = CountVectorizer(analyzer="char_wb", ngram_range=(features.shortest, features.longest)).build_analyzer()
    counts = collections.Counter()
    for n_gram in analyzer(text[: features.max_characters]):
        if n_gram != " ":
            code = 0
            for character in n_gram:
                code = (code + ord(character)) * 0x9E3779B1 % 2**32
            counts[code >> (32 - features.hash_bits)] += 1
    values = {bucket: math.log1p(count) for bucket, count in counts.items()}
    length = math.sqrt(sum(value * value for value in values.values()))
    return {bucket: value / length for bucket, value in values.items()}


@pytest.mark.parametrize(
    "features", [Features(), Features(shortest=2, longest=3, hash_bits=10, max_characters=40), Features(hash_bits=24)]
)
def test_the_n_grams_are_those_of_scikit_learn(features):
    # A word that is shorter than the longest n-gram is counted once more by scikit-learn.
    texts = [text for text in documents(3)[0] if all(len(word) + 2 >= features.longest for word in text.split())]
    texts += ["some longer words standing here twice, longer words", "中文没有空格的一行字"]
    vectors = features.of(texts)
    for text, begin, end in zip(texts, vectors.indptr, vectors.indptr[1:]):
        expected = by_hand(features, text)
        got = dict(zip(vectors.indices[begin:end].tolist(), vectors.data[begin:end].tolist()))
        assert got.keys() == expected.keys()
        assert all(math.isclose(got[bucket], expected[bucket], rel_tol=1e-6) for bucket in expected)


def test_a_text_has_the_same_bits_in_any_company():
    features = Features()
    texts = HOSTILE + documents(30)[0]
    together = features.of(texts).toarray()
    alone = np.concatenate([features.of([text]).toarray() for text in texts])
    assert together.tobytes() == alone.tobytes()
    assert features.of([]).shape == (0, features.buckets)


def test_vectors_have_length_1_or_no_entry():
    lengths = np.linalg.norm(Features().of(HOSTILE).toarray().astype(np.float64), axis=1)
    is_empty = np.array([not text.split() for text in HOSTILE])
    np.testing.assert_allclose(lengths, ~is_empty, atol=1e-6)


def test_only_the_beginning_counts():
    features = Features(max_characters=10)
    assert (features.of(["0123456789 and more"]) != features.of(["0123456789"])).nnz == 0


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"max_characters": 0}, "max_characters must be at least 1 (got 0)"),
        ({"longest": 9}, "n-grams must be of 1 to 8 characters, the shortest first (got 1 to 9)"),
        ({"shortest": 5}, "n-grams must be of 1 to 8 characters, the shortest first (got 5 to 4)"),
        ({"hash_bits": 25}, "hash_bits must be from 4 to 24 (got 25)"),
        ({"hash_bits": "16"}, "hash_bits must be an integer (got '16')"),
        ({"hash_bits": True}, "hash_bits must be an integer (got True)"),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(ValueError) as error:
        Features(**options)
    assert str(error.value) == f"edl::label: {sentence}"

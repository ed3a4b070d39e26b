"""Domains without any labels: groups of documents whose n-grams are alike, for a person to name."""

import math
from collections.abc import Sequence
from typing import Any

from edl.corpus.classifier import MOST_DOMAINS, Classifier
from edl.corpus.extras import require
from edl.corpus.features import Features
from edl.corpus.telling import beginning, telling_words
from edl.corpus.training import one_thread, rarity, scaled

_RANK = 50
_STARTS = 10
_BATCH = 1024
_EXAMPLES = 3


def cluster(texts: Sequence[str], number: int, features: Features | None = None, seed: int = 0) -> Classifier:
    """Mini-batch k-means of n-grams that are weighted by how rare they are; cluster-0 is the largest.

    Each row has its number of "documents", its "telling" words, and the beginnings of the "examples" nearest to its
    centre. k-means has no probabilities; so that a threshold can leave out what lies between clusters, they are such
    that the odds of the nearest centre against the next are 9 to 1 for the median document, and grow with the
    difference of the squared distances. The same bits again, whatever the number of threads.

    Args:
        texts: N documents.
        number (int): of clusters, at least 2 and at most N.
        features: default: `Features()`.
        seed: of the first centres and the batches.

    Raises:
        ValueError: a number of clusters that is not so.
    """
    np = require("numpy")
    features = features or Features()
    if not 2 <= number <= min(len(texts), MOST_DOMAINS):
        most = min(len(texts), MOST_DOMAINS)
        raise ValueError(f"edl::label: clusters must be from 2 to {most}, of {len(texts)} documents (got {number})")
    vectors = features.of(texts)
    factors = rarity(vectors)
    with one_thread(), np.errstate(invalid="ignore", divide="ignore"):  # where all documents are the same
        weights, bias = _nearest(scaled(vectors, factors), number, seed)
        scores = vectors @ (weights * factors[:, None]) + bias
    best, second = -np.partition(-scores, 1, axis=1)[:, :2].T
    sharpness = math.log(9) / max(float(np.median(best - second)), 1e-6)
    order = np.argsort(-np.bincount(scores.argmax(1), minlength=number), kind="stable")
    rows = _rows(texts, scores[:, order], features.max_characters)
    weights = np.ascontiguousarray(sharpness * (weights * factors[:, None])[:, order], np.float32)
    return Classifier(rows, weights, (sharpness * bias[order]).astype(np.float32), features, {"documents": len(texts)})


def _nearest(vectors: Any, number: int, seed: int) -> tuple[Any, Any]:
    """(2 c [buckets, clusters], -|c|^2 [clusters]) of the centres c, float64.

    They are centres of projections on the first 50 singular vectors. The nearest in that space is linear in the vectors
    themselves. With three clusters of 2100 passages, as many of each of three domains, 99 % are in that of theirs,
    and half without the projection.
    """
    np = require("numpy")
    rank = min(_RANK, vectors.shape[0] - 1)
    projection = require("sklearn.decomposition").TruncatedSVD(rank, random_state=seed)
    points = projection.fit_transform(vectors)
    means = require("sklearn.cluster").MiniBatchKMeans(number, random_state=seed, n_init=_STARTS, batch_size=_BATCH)
    centres = means.fit(points).cluster_centers_.astype(np.float64)
    return 2 * projection.components_.T.astype(np.float64) @ centres.T, -(centres**2).sum(1)


def _rows(texts: Sequence[str], scores: Any, max_characters: int) -> tuple[dict[str, Any], ...]:
    np = require("numpy")
    groups, number = scores.argmax(1), scores.shape[1]
    telling = telling_words(texts, groups, number, max_characters)
    rows = []
    for group in range(number):
        members = np.flatnonzero(groups == group)
        nearest = members[np.argsort(-scores[members, group], kind="stable")[:_EXAMPLES]]
        rows.append(
            {
                "name": f"cluster-{group}",
                "documents": len(members),
                "telling": telling[group],
                "examples": [beginning(texts[place]) for place in nearest],
            }
        )
    return tuple(rows)

"""A classifier from a small labelled sample, and how good it is on documents that it has not seen."""

import collections
from collections.abc import Sequence
from typing import Any

from edl.corpus.classifier import MOST_DOMAINS, Classifier
from edl.corpus.extras import require
from edl.corpus.features import Features

FEWEST_EXAMPLES = 5
_FOLDS = 5
# Of 1, 10, 100, 1000 the best accuracy and the best probabilities from 20 examples a domain on; with 5 all are alike.
_INVERSE_PENALTY = 1000.0
_CURVE = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def train(
    texts: Sequence[str],
    labels: Sequence[str],
    features: Features | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Classifier:
    """Multinomial logistic regression on n-grams that are weighted by how rare they are.

    Domains count alike whatever their numbers of examples, which say little of a corpus. `measured` has what
    cross-validation finds: each document is predicted by a model of the other four fifths, in the last line of the
    curve with all of their examples. The same bits again, whatever the number of threads.

    Args:
        texts: N documents, each once.
        labels: name of the domain of each.
        features: default: `Features()`.
        seed: of what is held out together.
        quiet: no progress bar.

    Raises:
        ValueError: less than two domains, or less than five examples of one.
    """
    np = require("numpy")
    features = features or Features()
    counts = collections.Counter(labels)
    _check(counts)
    names = sorted(counts)
    place_of = {name: place for place, name in enumerate(names)}
    ids = np.array([place_of[label] for label in labels])
    rows = tuple({"name": name, "examples": counts[name]} for name in names)
    vectors = features.of(texts)
    weights, bias = _fit(vectors, ids, len(rows))
    return Classifier(rows, weights, bias, features, _measured(rows, vectors, ids, features, seed, quiet))


def _check(counts: collections.Counter[str]) -> None:
    if not 2 <= len(counts) <= MOST_DOMAINS:
        found = ", ".join(counts) if len(counts) < 2 else str(len(counts))
        raise ValueError(f"edl::label: examples must be of 2 to {MOST_DOMAINS} domains (got {found or 'none'})")
    name, count = min(counts.items(), key=lambda item: item[1])
    if count < FEWEST_EXAMPLES:
        raise ValueError(f"edl::label: a domain must have at least {FEWEST_EXAMPLES} examples (got {count} of {name})")


def one_thread() -> Any:
    """Inside of it scikit-learn has one thread: sums of several have other bits."""
    for module in ("sklearn.cluster", "sklearn.decomposition", "sklearn.linear_model"):
        require(module)  # with libraries that would not obey if they were loaded later
    return require("threadpoolctl").threadpool_limits(1)


def rarity(vectors: Any) -> Any:
    """1 + log((1 + N) / (1 + n)) of each bucket, n of N documents have it: float32 [buckets]."""
    np = require("numpy")
    having = np.bincount(vectors.indices, minlength=vectors.shape[1])
    return (1 + np.log((1 + vectors.shape[0]) / (1 + having))).astype(np.float32)


def scaled(vectors: Any, factors: Any) -> Any:
    """Each column times its factor."""
    result = vectors.copy()
    result.data = result.data * factors[result.indices]
    return result


def _fit(vectors: Any, ids: Any, num_domains: int) -> tuple[Any, Any]:
    """(weights float32 [buckets, D], bias float32 [D]) for vectors as they are."""
    np = require("numpy")
    factors = rarity(vectors)
    model = require("sklearn.linear_model").LogisticRegression(
        C=_INVERSE_PENALTY, class_weight="balanced", max_iter=1000
    )
    with one_thread():
        model.fit(scaled(vectors, factors), ids)
    weights, bias = model.coef_, model.intercept_
    if num_domains == 2:  # scikit-learn keeps the second's alone
        weights, bias = np.concatenate([0 * weights, weights]), np.concatenate([0 * bias, bias])
    return np.ascontiguousarray((weights * factors).T, np.float32), bias.astype(np.float32)


def _measured(
    rows: tuple[dict[str, Any], ...], vectors: Any, ids: Any, features: Features, seed: int, quiet: bool
) -> dict[str, Any]:
    """What cross-validation finds: counts and shares, for a file."""
    np = require("numpy")
    places = _places(ids, seed)
    most = max(row["examples"] for row in rows) * (_FOLDS - 1) // _FOLDS
    steps = [number for number in _CURVE if number < most] + [most]
    curve = []
    for examples in require("tqdm").tqdm(steps, unit="step", disable=True if quiet else None, leave=False):
        probabilities = _held_out(rows, vectors, ids, features, places, examples)
        curve.append({"examples": examples, **share(probabilities.argmax(1) == ids)})
    is_right, certainty = probabilities.argmax(1) == ids, probabilities.max(1)
    confusion = np.zeros((len(rows), len(rows)), np.int64)
    np.add.at(confusion, (ids, probabilities.argmax(1)), 1)
    thresholds = []
    for threshold in _THRESHOLDS:
        is_labelled = certainty >= threshold
        labelled = {"threshold": threshold, "labelled": float(is_labelled.mean())}
        thresholds.append({**labelled, **share(is_right[is_labelled])})
    return {"held_out": share(is_right), "confusion": confusion.tolist(), "curve": curve, "thresholds": thresholds}


def _places(ids: Any, seed: int) -> Any:
    """Of each document, its place among those of its domain, in a random order."""
    np = require("numpy")
    order = np.random.default_rng(seed).permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    counts = np.bincount(ids)
    places = np.empty(len(ids), np.int64)
    places[order] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _held_out(
    rows: tuple[dict[str, Any], ...], vectors: Any, ids: Any, features: Features, places: Any, examples: int
) -> Any:
    """Probabilities [N, D] of each document, of a model of at most so many examples a domain and none of its fifth."""
    np = require("numpy")
    probabilities = np.empty((len(ids), len(rows)), np.float32)
    for fold in range(_FOLDS):
        is_out = places % _FOLDS == fold
        # Its place among those that are not held out.
        kept = places - (places + _FOLDS - 1 - fold) // _FOLDS
        known = np.flatnonzero(~is_out & (kept < examples))
        weights, bias = _fit(vectors[known], ids[known], len(rows))
        classifier = Classifier(rows, weights, bias, features, {})
        probabilities[is_out] = classifier.probabilities_of(vectors[np.flatnonzero(is_out)])
    return probabilities


def share(is_right: Any) -> dict[str, Any]:
    """How many of how many, and the share with its 95 % interval (Wilson's)."""
    correct, total = int(is_right.sum()), len(is_right)
    if not total:
        return {"correct": 0, "documents": 0, "accuracy": None, "interval": [0.0, 1.0]}
    interval = require("scipy.stats").binomtest(correct, total).proportion_ci(method="wilson")
    return {
        "correct": correct,
        "documents": total,
        "accuracy": correct / total,
        "interval": [float(interval.low), float(interval.high)],
    }

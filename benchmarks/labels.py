"""How right the labels of `edl label train` and `edl label cluster` are, where the true ones are known.

`python examples/pretrain/save_text.py TEXT` and `python benchmarks/labels.py TEXT` make the table of docs/labels.md:
TEXT has a sub-folder for each domain. Documents as they are, and cut into passages, as many of each domain.
"""

import argparse
import os
import random
import resource
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.optimize import linear_sum_assignment

from edl.corpus import readers
from edl.corpus.clusters import cluster
from edl.corpus.training import share, train

PASSAGES = 1000  # of each domain


def texts_of(folder: str) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for shard in readers.shards_of([folder]):
        for document in shard.documents():
            if document.text and document.label:
                texts.setdefault(document.label, []).append(document.text)
    return texts


def cut(texts: dict[str, list[str]], length: int) -> dict[str, list[str]]:
    """Passages of one length, at most `PASSAGES` of each domain, in a random order."""
    generator, result = random.Random(0), {}
    for name, documents in texts.items():
        passages = [
            text[begin : begin + length] for text in documents for begin in range(0, len(text) - length + 1, length)
        ]
        result[name] = generator.sample(passages, min(PASSAGES, len(passages)))
    return result


def shown(is_right: np.ndarray) -> str:
    found = share(is_right)
    return f"{found['accuracy']:.1%} [{found['interval'][0]:.1%}, {found['interval'][1]:.1%}]"


def of_train(texts: dict[str, list[str]], examples: int) -> str:
    """Accuracy on what was not among the examples."""
    generator = random.Random(1)
    chosen, rest = [], []
    for name, documents in texts.items():
        order = generator.sample(documents, len(documents))
        chosen += [(text, name) for text in order[:examples]]
        rest += [(text, name) for text in order[examples:]]
    model = train(*zip(*chosen))
    ids, _ = model.predict([text for text, _ in rest])
    return shown(np.array([model.domains[place] == name for place, (_, name) in zip(ids, rest)]))


def of_clusters(texts: dict[str, list[str]], number: int) -> str:
    """Accuracy with each cluster named: with as many clusters as domains one to one, as well as can be; with more, each
    by the domain that it has most of."""
    together = [(text, place) for place, documents in enumerate(texts.values()) for text in documents]
    model = cluster([text for text, _ in together], number)
    ids, _ = model.predict([text for text, _ in together])
    truth = np.array([place for _, place in together])
    counts = np.zeros((len(texts), number))
    np.add.at(counts, (truth, ids), 1)
    names = counts.argmax(0)
    if number == len(texts):
        domains, clusters = linear_sum_assignment(-counts)
        names[clusters] = domains
    return shown(names[ids] == truth)


def speed(texts: dict[str, list[str]]) -> str:
    """Of a model's labels, one process."""
    documents = [text for each in texts.values() for text in each]
    model = train(
        [text for each in texts.values() for text in each[:50]], [n for n, each in texts.items() for _ in each[:50]]
    )
    begin = time.perf_counter()
    model.predict(documents)
    seconds = time.perf_counter() - begin
    whole, read = (sum(len(text[:end].encode()) for text in documents) / 1e6 for end in (None, 2000))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{whole / seconds:.1f} MB/s of documents, {read / seconds:.1f} MB/s of what is read of them, {memory:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="folder with a sub-folder for each domain")
    texts = texts_of(parser.parse_args().text)
    print("speed of one process:", speed(texts), flush=True)
    tables = {"documents": texts, **{f"passages of {length}": cut(texts, length) for length in (2000, 200)}}
    print("\n| text | train, 10 examples | train, 50 examples | cluster, one a domain | cluster, three a domain |")
    print("|---|---|---|---|---|")
    for name, each in tables.items():
        sizes = " + ".join(str(len(documents)) for documents in each.values())
        cells = [of_train(each, 10), of_train(each, 50), of_clusters(each, len(each)), of_clusters(each, 3 * len(each))]
        print(f"| {name} ({sizes}) | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Models as labellers: a classifier that edl has trained, or one of fastText."""

import dataclasses
import functools
import pathlib
from typing import Any

from edl.corpus.documents import Document
from edl.corpus.extras import require


@dataclasses.dataclass(frozen=True)
class Model:
    """Labels documents by their text; a process that gets it loads the model for itself.

    Args:
        path: folder of an `edl.corpus.classifier.Classifier`, or the `.bin` file of a fastText model.
        threshold: a document whose domain is less probable is labelled -1; None: no such thing.
    """

    path: pathlib.Path
    threshold: float | None = None

    @property
    def domains(self) -> list[str]:
        return list(_load(self.path).domains)

    @property
    def hash(self) -> str:
        return str(_load(self.path).hash)

    def label(self, documents: list[Document]) -> Any:
        """The domains, int16 [documents], -1 = below the threshold."""
        domains, probabilities = _load(self.path).predict([document.text for document in documents])
        if self.threshold is None:
            return domains
        return require("numpy").where(probabilities < self.threshold, -1, domains)


@functools.lru_cache(maxsize=1)
def _load(path: pathlib.Path) -> Any:
    if path.is_dir():
        from edl.corpus.classifier import Classifier

        return Classifier.load(path)
    from edl.corpus.fasttext import FastText

    return FastText.load(path)

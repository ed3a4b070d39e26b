"""Labels of a corpus: an int16 file per shard, and domains.json; the same bytes however often it was interrupted."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

from edl.corpus import workers
from edl.corpus.documents import IMPROBABLE, NO_LABEL, PROBLEMS, UNKNOWN_LABEL, Document, Shard
from edl.corpus.extras import require
from edl.corpus.parts import Part, lock
from edl.labels.files import INDEX, VERSION

# A batch ends with the document that reaches one of these: batches, too, are the same in every run.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 8 * 2**20
_MOST_DOMAINS = 2**15  # labels are int16
_CODES = {problem: -1 - number for number, problem in enumerate(PROBLEMS)}


class Labeller(Protocol):
    """What labels documents by their text; it is pickled where there are several processes.

    Attributes:
        domains: the names of the domains.
        hash: tells one model from another.
        threshold: a document whose domain is less probable has the label -1; None: no such thing.
    """

    @property
    def domains(self) -> list[str]: ...

    @property
    def hash(self) -> str: ...

    @property
    def threshold(self) -> float | None: ...

    def label(self, documents: list[Document]) -> Any:
        """The domains of documents that have a text: int16 [documents], -1 = none is probable enough."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the documents of a corpus were labelled.

    Attributes:
        domains: names, whose positions are the labels.
        counts: documents of each domain.
        unlabelled: documents labelled -1, by what is wrong with them.
    """

    domains: list[str]
    counts: dict[str, int]
    unlabelled: dict[str, int]


def apply(
    shards: Sequence[Shard],
    labeller: Labeller | None,
    output: str | os.PathLike[str],
    domains: Sequence[str] | None = None,
    processes: int = 1,
    quiet: bool = True,
) -> Summary:
    """Labels the documents of a corpus, as a stream.

    Writes OUTPUT/NAME.npy for each shard: int16 [documents], in their order, -1 = unlabelled; and last of all
    OUTPUT/domains.json. What a killed call has done lies in OUTPUT/NAME.part, and the next one like it goes on there.

    Args:
        shards: what to label, of `edl.corpus.readers.shards_of`.
        labeller: labels documents by their text. None: by the labels that they come with.
        output: folder; new, empty, or of a call like this one.
        domains: without a labeller, the names of the domains, whose positions are the labels; others are unknown. None:
            those that are met, sorted, numbers by size.
        processes: so many label at once, a shard each.
        quiet: without a progress bar.

    Returns:
        What is told in domains.json.

    Raises:
        ValueError: the input is broken, the output of another call or in use, or there are too many domains.
    """
    _check(shards, labeller, processes)
    fixed = _fixed_domains(labeller, domains)
    task = _Task(pathlib.Path(output), _run(shards, labeller, fixed), labeller, fixed)
    with _held(task.output):
        if (task.output / INDEX).exists():
            summary = _of_before(shards, task)
        else:
            _check_free(shards, task)
            workers.label_all(task.label, shards, processes, quiet)
            summary = _write(shards, task)
        for shard in shards:
            task.part(shard).unlink(missing_ok=True)
    return summary


def _check(shards: Sequence[Shard], labeller: Labeller | None, processes: int) -> None:
    if processes < 1:
        raise ValueError(f"edl::label: processes must be positive (got {processes})")
    without_text = [shard.source for shard in shards if not shard.has_text]
    if labeller and without_text:
        raise ValueError(
            "edl::label: documents without text, such as token ids, must be labelled by folder, column or list (got "
            f"a model for {without_text[0]})"
        )


def _fixed_domains(labeller: Labeller | None, domains: Sequence[str] | None) -> list[str] | None:
    names = list(labeller.domains) if labeller else list(domains or [])
    if len(set(names)) < len(names) or len(names) > _MOST_DOMAINS:
        raise ValueError(f"edl::label: domains must differ, at most {_MOST_DOMAINS} of them (got {len(names)})")
    return None if labeller is None and domains is None else names


def _run(shards: Sequence[Shard], labeller: Labeller | None, domains: list[str] | None) -> str:
    """A word that is another one for another input or other options."""
    model = (labeller.hash, labeller.threshold) if labeller else None
    facts = [VERSION, PROBLEMS, model, domains, [[type(shard).__name__, *shard.facts()] for shard in shards]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _check_free(shards: Sequence[Shard], task: "_Task") -> None:
    """Nothing that this run did not make is written over."""
    for shard in shards:
        if task.labels(shard).exists() and not task.part(shard).exists():
            raise ValueError(f"edl::label: output must have no files of the same names (got {task.labels(shard)})")


def _of_before(shards: Sequence[Shard], task: "_Task") -> Summary:
    """What an earlier run like this one has written."""
    path = task.output / INDEX
    try:
        index = json.loads(path.read_text())
        if index["run"] == task.run and path.stat().st_mtime_ns >= max(shard.changed for shard in shards):
            return Summary(index["domains"], index["counts"], index["unlabelled"])
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        "edl::label: output must be empty, or of a run with the same input and options (got "
        f"{path} of another one, or of an input that has changed: remove it, or name another folder)"
    )


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a process has to know to label a shard."""

    output: pathlib.Path
    run: str
    labeller: Labeller | None
    domains: list[str] | None

    def part(self, shard: Shard) -> pathlib.Path:
        return self.output / f"{shard.name}.part"

    def part_of(self, shard: Shard) -> Part:
        return Part(self.part(shard), f"{self.run} {shard.changed}")

    def labels(self, shard: Shard) -> pathlib.Path:
        return self.output / f"{shard.name}.npy"

    def label(self, shard: Shard, advance: Callable[[int], None]) -> None:
        """Brings the part of a shard to its end; `advance` is told how many bytes were read since last time."""
        done = 0
        with self.part_of(shard) as part:
            if not part.whole:
                for documents in _batches(shard.documents(part.num_documents)):
                    part.append(*self._codes(documents, part.names))
                    advance(shard.position - done)
                    done = shard.position
                part.finish()
        advance(shard.num_bytes - done)

    def _codes(self, documents: list[Document], names: dict[str, int]) -> tuple[list[str], bytes]:
        """(names that are new, codes of the documents as bytes)."""
        num_names = len(names)
        if self.labeller:
            codes = _codes_by_model(documents, self.labeller)
        elif self.domains is not None:
            fixed = {name: number for number, name in enumerate(self.domains)}
            codes = [_code_by_label(document, fixed, UNKNOWN_LABEL) for document in documents]
        else:
            codes = [_code_by_label(document, names, None) for document in documents]
        if len(names) > _MOST_DOMAINS:
            raise ValueError(f"edl::label: there must be at most {_MOST_DOMAINS} domains (got more different labels)")
        return list(names)[num_names:], require("numpy").asarray(codes, "<i2").tobytes()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _code_by_label(document: Document, names: dict[str, int], problem_of_others: str | None) -> int:
    """The code of the label that a document comes with; one that is new gets the next number, or is a problem."""
    if document.problem:
        return _CODES[document.problem]
    if document.label is None:
        return _CODES[NO_LABEL]
    if problem_of_others and document.label not in names:
        return _CODES[problem_of_others]
    return names.setdefault(document.label, len(names))


def _codes_by_model(documents: list[Document], labeller: Labeller) -> Any:
    numpy = require("numpy")
    codes = numpy.array([_CODES[document.problem] if document.problem else 0 for document in documents], "<i2")
    sound = [document for document in documents if not document.problem]
    if sound:
        labels = numpy.asarray(labeller.label(sound))
        if labels.shape != (len(sound),) or labels.min() < -1 or labels.max() >= len(labeller.domains):
            raise ValueError(f"edl::label: a model must give a label in [-1, {len(labeller.domains)}) to each document")
        codes[codes == 0] = numpy.where(labels < 0, _CODES[IMPROBABLE], labels)
    return codes


def _write(shards: Sequence[Shard], task: _Task) -> Summary:
    """Turns parts that are whole into labels."""
    numpy = require("numpy")
    domains = task.domains if task.domains is not None else _names(shards, task)
    position = {name: number for number, name in enumerate(domains)}
    counts, problems = numpy.zeros(len(domains), int), numpy.zeros(len(PROBLEMS), int)
    sizes = []
    for shard in shards:
        with task.part_of(shard) as part, _replacing(task.labels(shard)) as file:
            # A negative code counts from the end of the table.
            labels_of_names = [position[name] for name in part.names] or range(len(domains))
            table = numpy.array([*labels_of_names, *[-1] * len(PROBLEMS)], "<i2")
            header = {"descr": "<i2", "fortran_order": False, "shape": (part.num_documents,)}
            numpy.lib.format.write_array_header_1_0(file, header)
            for block in part.codes():
                codes = numpy.frombuffer(block, "<i2")
                labels = table[codes]
                file.write(labels.tobytes())
                counts += numpy.bincount(labels[labels >= 0], minlength=len(domains))
                problems += numpy.bincount(-1 - codes[codes < 0], minlength=len(PROBLEMS))
            sizes.append({"name": shard.name, "documents": part.num_documents})
    unlabelled = {problem: int(count) for problem, count in zip(PROBLEMS, problems) if count}
    summary = Summary(domains, dict(zip(domains, counts.tolist())), unlabelled)
    index = {
        "version": VERSION,
        **dataclasses.asdict(summary),
        "threshold": task.labeller.threshold if task.labeller else None,
        "model": task.labeller.hash if task.labeller else None,
        "run": task.run,
        "shards": sizes,
    }
    with _replacing(task.output / INDEX) as file:
        file.write(f"{json.dumps(index, indent=1)}\n".encode())
    return summary


def _names(shards: Sequence[Shard], task: _Task) -> list[str]:
    """The names that were met in any shard, sorted."""
    names: set[str] = set()
    for shard in shards:
        with task.part_of(shard) as part:
            names |= part.names.keys()
    if len(names) > _MOST_DOMAINS:
        raise ValueError(
            f"edl::label: there must be at most {_MOST_DOMAINS} domains (got {len(names)} different labels)"
        )
    are_numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file that is called `path` once it is whole and on the disk."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

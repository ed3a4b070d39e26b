"""Domains of text: where they come from, what is held out, and the order in which training sees them."""

import collections
import hashlib
import os
import pathlib
import re
from typing import NamedTuple

import debian
import environment
import text
import torch

VOCABULARY = 256  # bytes
# More text than this per domain changes nothing for so short a training, and costs memory.
DOMAIN_LIMIT = 32 * 2**20
# One file, be it a list of all primes, should not be most of a domain.
DOCUMENT_LIMIT = 2**20
SMALLEST_DOCUMENT = 200  # bytes; shorter ones are redirections and stubs
# Documents are what is independent, and a test of what experts do needs 30 of each domain: a tenth would be 14 of
# Debian's English and 10 of its mathematics. Training sees a tenth of the text, so holding out a third costs nothing.
HELD_OUT_SHARE = 1 / 3
LONGEST_NAME = 24  # letters of a domain's name
# A held-out line of at least this many bytes that also stands in the training text is removed.
REPEATED_LINE = 32


class DataError(Exception):
    """Text that cannot be trained on; the message is one sentence for the user."""


class Source(NamedTuple):
    """Where text came from: name, version (may be empty), bytes of the download or the files, licence."""

    name: str
    version: str
    size: int
    licence: str


class Domain(NamedTuple):
    """Text of one domain.

    Attributes:
        name: what tables and pictures call it.
        sources: list of Source.
        train: [bytes of the training text] uint8.
        held_out: list of the held-out documents, UTF-8 bytes.
        documents: (number of training documents, number of held-out documents).
        split: how the held-out text was chosen, in words.
        skipped: Counter of files that were left out, by reason.
    """

    name: str
    sources: list
    train: torch.Tensor
    held_out: list
    documents: tuple
    split: str
    skipped: collections.Counter


class Domains(list):
    """The domains that can be trained on.

    Attributes:
        left_out: a sentence about each that cannot.
    """

    def __init__(self, domains, left_out):
        super().__init__(domains)
        self.left_out = left_out


class Collection:
    """Documents of one domain on their way in: decoded, without exact duplicates, with a count of what was left out."""

    def __init__(self, name):
        self.name = name
        self.sources = []
        self.documents = {}  # name -> bytes of tidy text
        self.skipped = collections.Counter()
        self.size = 0
        self._seen = set()

    def add(self, name, content, chinese=0.0):
        """Adds a file unless it is unreadable, too short, a duplicate, in the wrong language or beyond the limit."""
        if self.size >= DOMAIN_LIMIT:
            self.skipped[f"beyond the first {DOMAIN_LIMIT >> 20} MB"] += 1
            return
        try:
            body, dropped = text.read_text(name, content, DOMAIN_LIMIT)
        except text.UnreadableText as reason:
            self.skipped[str(reason)] += 1
            return
        if dropped:
            self.skipped["undecodable bytes dropped"] += dropped
        encoded = body.encode()
        if len(encoded) > DOCUMENT_LIMIT:
            encoded = encoded[:DOCUMENT_LIMIT].decode(errors="ignore").encode()
            self.skipped[f"cut after {DOCUMENT_LIMIT >> 20} MB"] += 1
        fingerprint = hashlib.sha256(encoded).digest()
        if len(encoded) < SMALLEST_DOCUMENT:
            self.skipped["too short"] += 1
        elif fingerprint in self._seen:
            self.skipped["duplicate"] += 1
        elif chinese and text.chinese_share(body) < chinese:
            self.skipped["not in Chinese"] += 1
        else:
            self._seen.add(fingerprint)
            self.documents[name] = encoded
            self.size += len(encoded)


def load(data, cache, sequence_length):
    """Finds the text, splits it and says in a few lines what was found.

    Arguments:
        data: folder whose sub-folders are domains; `debian`; `python`; or an empty string, which means Debian's
            packages where Debian's tools are installed and the Python environment elsewhere.
        cache: folder for downloads.
        sequence_length: bytes per sequence, which decides how much text is too little.

    Returns:
        Domains, at least two.

    Raises:
        DataError: when fewer than two domains have enough text.
    """
    return _usable_domains(collect(data, cache), sequence_length)


def collect(data, cache):
    """Finds the documents of each domain; `data` and `cache` as for `load`.

    Returns:
        list of Collection.
    """
    if data == "python":
        return from_environment()
    if data in ("", "debian"):
        missing = debian.tools_missing()
        if missing and data:
            raise DataError(f"The packages of Debian need {' and '.join(missing)}, which is not installed here.")
        if missing:
            absent = " and no ".join(missing)
            print(f"No {absent} here: taking text from the Python environment instead of Debian's packages.")
        return from_environment() if missing else from_debian(pathlib.Path(cache))
    return from_folder(pathlib.Path(data))


def from_debian(cache):
    """Collects English, Chinese and mathematics from Debian's documentation packages.

    A package that cannot be had is skipped with a sentence as long as its domain has another one.
    """
    print(f"Text from Debian's documentation packages, kept in {cache}:", flush=True)
    packages = debian.Packages(cache)
    found, failures = {}, {}
    for package in debian.PACKAGES:
        collection = found.setdefault(package.domain, Collection(package.domain))
        try:
            archive, files = packages.read(package.name, package.files)
        except debian.DownloadError as error:
            print(f"  {package.name}: skipped ({error})", flush=True)
            failures.setdefault(package.domain, []).append(f"{package.name} ({error})")
            continue
        size = archive.stat().st_size
        collection.sources.append(Source(package.name, debian.version_of(archive), size, package.licence))
        for name, content in files:
            collection.add(name, content, package.chinese)
        print(f"  {package.name} {debian.version_of(archive)}: {size / 1e6:.1f} MB", flush=True)
    for collection in found.values():
        if not collection.sources:
            raise DataError(
                f"No text for {collection.name}: could not get {' and '.join(failures[collection.name])}. Try again "
                "(finished packages are kept), or use text of your own with DATA=folder, or of the Python environment "
                "with DATA=python."
            )
    return list(found.values())


def from_environment():
    """Collects English, Python and mathematics from the Python environment."""
    found = []
    for name, (origin, licence, documents) in environment.DOMAINS.items():
        collection = Collection(name)
        for document, content in documents():
            collection.add(document, content)
        collection.sources.append(Source(origin, "", collection.size, licence))
        found.append(collection)
    return found


def from_folder(folder):
    """Collects one domain per sub-folder; files may be plain text, HTML or gzipped."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    sub_folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(sub_folders) < 2:
        raise DataError(
            f"{folder} has {len(sub_folders) or 'no'} sub-folder{'' if len(sub_folders) == 1 else 's'} with text, and "
            "the demo compares domains: put the text of each domain into a sub-folder of its own, at least two."
        )
    found = []
    for sub_folder, title in zip(sub_folders, _titles([sub_folder.name for sub_folder in sub_folders])):
        collection = Collection(title)
        for path in _files(collection, sub_folder):
            _add_file(collection, path, str(path.relative_to(sub_folder)))
        collection.sources.append(Source("your text", "", collection.size, "yours"))
        found.append(collection)
    return found


def _titles(names):
    """Makes the names of folders printable, short enough for a table, and different from each other."""
    titles = []
    for name in map(text.printable, names):
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        alike = (
            short,
            *(f"{short[: LONGEST_NAME - 1 - len(str(place))]} {place}" for place in range(2, len(names) + 1)),
        )
        titles.append(next(title for title in alike if title not in titles))
    return titles


def _files(collection, folder):
    """Yields the paths below a folder in their order, hidden ones left out, and counts folders that cannot be read."""

    def count(error):
        collection.skipped["unreadable folder"] += 1

    for root, folders, names in os.walk(folder, onerror=count):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (pathlib.Path(root, name) for name in sorted(names) if not name.startswith("."))


def _add_file(collection, path, name):
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            return
        with open(path, "rb") as file:
            content = file.read(DOMAIN_LIMIT)
    except OSError:
        collection.skipped["unreadable"] += 1
    else:
        collection.add(name, content)


def split(collection):
    """Holds out a third of the documents where there are enough of them, or the end of each.

    Documents are taken in the order of a hash of their names, so the choice depends neither on the order of the file
    system nor on a random state. One whose size would carry the held-out part far beyond a third of the text is passed
    over. Where that finds too little (few or one-sided documents), the last third of every document is held out.

    Lines of the held-out text that also stand in the training text are removed: manuals repeat paragraphs.

    Returns:
        (training text as bytes, list of held-out documents as bytes, number of training documents, description).
    """
    documents = collection.documents
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
    wanted = HELD_OUT_SHARE * collection.size
    held_out_names, size = set(), 0
    for name in order:
        if len(held_out_names) < HELD_OUT_SHARE * len(order) and size + len(documents[name]) <= 1.5 * wanted:
            held_out_names.add(name)
            size += len(documents[name])
    if size >= wanted / 2:
        train = [documents[name] for name in order if name not in held_out_names]
        held_out = [documents[name] for name in order if name in held_out_names]
        description = "by document"
    else:
        cuts = {name: _beginning(documents[name], 1 - HELD_OUT_SHARE) for name in order}
        train = [documents[name][: cuts[name]] for name in order]
        held_out = [documents[name][cuts[name] :] for name in order]
        description = "the last third of every document"
    known = {line for document in train for line in document.split(b"\n") if len(line) >= REPEATED_LINE}
    held_out = [b"\n".join(line for line in document.split(b"\n") if line not in known) for document in held_out]
    held_out = [re.sub(rb"\n{3,}", b"\n\n", document) for document in held_out]
    return b"\n\n".join(train), held_out, len(train), description


def _beginning(document, share):
    """Returns how many bytes a share of a document is, in whole characters."""
    return len(document[: round(share * len(document))].decode(errors="ignore").encode())


def _usable_domains(collections_, sequence_length):
    """Splits every domain and drops those with too little text, each with a sentence."""
    domains, complaints = [], []
    needed = 8 * sequence_length
    for collection in collections_:
        train, held_out, number, description = split(collection)
        size = sum(map(len, held_out))
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(collection.skipped.items()))
        longest = max(map(len, held_out), default=0)
        if min(len(train), size) <= needed or longest < sequence_length:
            complaints.append(
                f"{collection.name} has {len(train)} bytes to train on and {size} held out in documents of at "
                f"most {longest}, and more than {needed} of each and {sequence_length} in a document are needed"
                + (f" (left out: {skipped})" if skipped else "")
            )
            continue
        domains.append(
            Domain(
                collection.name,
                collection.sources,
                torch.frombuffer(bytearray(train), dtype=torch.uint8),
                held_out,
                (number, len(held_out)),
                description,
                collection.skipped,
            )
        )
        print(
            f"  {collection.name}: {len(train) / 1e6:.2f} MB in {number} documents, held out {description}: "
            f"{size / 1e6:.2f} MB in {len(held_out)}" + (f" (left out: {skipped})" if skipped else ""),
            flush=True,
        )
    if len(domains) < 2:
        raise DataError(f"Fewer than two domains have enough text: {'; '.join(complaints)}.")
    for complaint in complaints:
        print(f"  Left out: {complaint}.", flush=True)
    return Domains(domains, complaints)


class Batches:
    """The order in which every arm sees the same sequences, and both kinds of labels for them.

    A step takes the same number of sequences from each domain, at least two, because the bias correction needs two to
    estimate a variance. With more domains than a batch can hold in pairs, each step draws some of them.

    Arguments:
        domains: list of Domain.
        steps: number of steps.
        batch_size: number of sequences to aim for.
        sequence_length: bytes per sequence.
        seed: seed of the order.

    Attributes:
        labels: [steps, B] int64, the true domain of each sequence.
        random_labels: [steps, B] int64, the true labels shuffled within each step: groups of the same sizes that say
            nothing about the domain, the control of the paper.
    """

    def __init__(self, domains, steps, batch_size, sequence_length, seed):
        self.domains = domains
        self.sequence_length = sequence_length
        per_step = min(len(domains), max(2, batch_size // 2))
        repeats = max(2, batch_size // per_step)
        order = torch.Generator().manual_seed(seed)
        drawn = torch.rand(steps, len(domains), generator=order).argsort(dim=1)[:, :per_step].sort(dim=1).values
        self.labels = drawn.repeat_interleave(repeats, dim=1)
        room = torch.tensor([domain.train.numel() - sequence_length for domain in domains])[self.labels]
        self.offsets = (torch.rand(self.labels.shape, generator=order, dtype=torch.float64) * room).long()
        # A generator of its own, so that the order of the text does not depend on the control.
        control = torch.Generator().manual_seed(seed + 1)
        shuffled = torch.rand(self.labels.shape, generator=control).argsort(dim=1)
        self.random_labels = self.labels.gather(1, shuffled)

    def __len__(self):
        return self.labels.shape[0]

    def sequences(self, step):
        """Returns the sequences of a step, [B, sequence_length + 1] int64: inputs and, one further, targets."""
        span = torch.arange(self.sequence_length + 1)
        places = zip(self.labels[step].tolist(), self.offsets[step].tolist())
        return torch.stack([self.domains[label].train[offset + span] for label, offset in places]).long()

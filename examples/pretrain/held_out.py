"""Held-out text in pieces: files for `edl observe`, and how well a model predicts them."""

import math

import torch
import torch.nn.functional as F

from edl.observe.sample import Size

FOLDER = "held-out"
# A piece has so many times the bytes that the model reads at once: a model that reads words reads about as many tokens.
SEQUENCES_PER_PIECE = 4
# Pieces per forward pass; only memory depends on it.
BATCH = 24


def size_of(sequence_length):
    """Returns what `edl observe` looks at by default, of a model that reads so many bytes."""
    return Size(window=sequence_length - 1, length=sequence_length)


def pieces_of(documents, sequence_length, number):
    """Cuts evenly spaced pieces from documents, at the boundaries of characters.

    Every document gives equally many, or as many as it has: long ones must not be most of what is looked at.

    Arguments:
        documents: list of UTF-8 bytes.
        sequence_length: bytes that the model reads; what is shorter is no piece.
        number: of pieces to have, at least, where the documents have as many.

    Returns:
        A list of pieces for each document, as bytes.
    """
    size = SEQUENCES_PER_PIECE * sequence_length
    most = [max(len(document) // size, int(len(document) >= sequence_length)) for document in documents]
    share = next(
        (share for share in range(1, max(most, default=0)) if sum(min(share, m) for m in most) >= number), None
    )
    found = []
    for document, room in zip(documents, most):
        count = room if share is None else min(share, room)
        step = (len(document) - size) / max(1, count - 1)
        cuts = [_cut(document, max(0, round(place * step)), size) for place in range(count)]
        found.append([cut for cut in cuts if len(cut) >= sequence_length])
    return found


def _cut(document, begin, size):
    """Returns about `size` bytes of a document, without the halves of characters at both ends."""
    return document[begin : begin + size].decode(errors="ignore").encode()


def write(pieces, folder):
    """Writes pieces as FOLDER/DOMAIN/DOCUMENT/PIECE.txt, and removes those of an earlier run.

    Pieces of one document are no independent observations: `edl observe` takes a folder below that of a domain as one
    source.

    Arguments:
        pieces: name of a domain -> list of a list of pieces for each document.
        folder: pathlib.Path.
    """
    for old in folder.glob("*/document-*/[0-9]*.txt"):
        old.unlink()
    for place in [*folder.glob("*/document-*"), *folder.glob("*")]:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    for domain, documents in pieces.items():
        for number, of_document in enumerate(documents):
            place = folder / domain / f"document-{number:04}"
            if of_document:
                place.mkdir(parents=True, exist_ok=True)
            for piece, content in enumerate(of_document):
                (place / f"{piece:04}.txt").write_bytes(content)


@torch.no_grad()
def bits_per_byte(model, documents):
    """Measures how well a model predicts pieces, each from its beginning as far as the model reads.

    Arguments:
        model: LanguageModel.
        documents: list of a list of pieces for each document.

    Returns:
        (bits per byte, standard error). The error is over documents, of which the pieces are no independent parts: what
        other text of the domain might have given. It says nothing about other seeds.
    """
    length = model.config.sequence_length
    pieces = [torch.frombuffer(bytearray(piece[:length]), dtype=torch.uint8) for each in documents for piece in each]
    losses = []
    for batch in torch.stack(pieces).long().split(BATCH):
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).mean(dim=1).double() / math.log(2))
    bits = torch.cat(losses)
    counts = [len(each) for each in documents if each]
    deviations = torch.stack([part.sum() for part in (bits - bits.mean()).split(counts)])
    number = len(counts)
    error = math.sqrt(deviations.square().sum() * number / (number - 1)) / len(bits) if number > 1 else math.nan
    return bits.mean().item(), error

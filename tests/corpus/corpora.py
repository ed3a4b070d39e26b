"""Small corpora in every form, and their labels worked out by hand."""

import json
import pathlib
import random

import numpy as np
import pytest

from edl import cli

ROWS = [
    {"text": "one", "source": "web", "meta": {"set": "b"}, "number": 10},
    {"text": "twö", "source": "books", "meta": {"set": "a"}, "number": 2},
    {"text": "", "source": "web", "meta": {"set": "a"}, "number": 2},
    {"text": None, "source": "web", "meta": {"set": "a"}, "number": 2},
    {"text": "five", "source": None, "meta": {"set": "a"}, "number": -1},
    {"text": "six", "source": "code", "meta": {"set": "a"}, "number": 0},
]
# The names that sound rows use, sorted, and the labels of all rows.
BY_COLUMN = {
    "source": (["books", "code", "web"], [2, 0, -1, -1, -1, 1]),
    "meta.set": (["a", "b"], [1, 0, -1, -1, 0, 0]),
    "number": (["0", "2", "10"], [2, 1, -1, -1, -1, 0]),
}


def write(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def random_rows(seed: int, count: int) -> list[dict]:
    chance = random.Random(seed)
    names = [f"domain {number}" for number in range(40)]
    return [{"text": "word " * chance.randrange(60), "source": chance.choice([*names, None])} for _ in range(count)]


def label(*arguments) -> None:
    cli.main(["label", "apply", *map(str, arguments), "--quiet"])


def refused(capsys, *arguments) -> str:
    """What `edl label apply` says to a user before it ends with status 2: a sentence."""
    with pytest.raises(SystemExit) as end:
        label(*arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out
    assert printed.err.startswith(("edl::label: ", "edl::corpus: ")) and printed.err.count("\n") == 1, printed.err
    return printed.err


def index_of(output: pathlib.Path) -> dict:
    return json.loads((output / "domains.json").read_text())


def labels_of(output: pathlib.Path) -> dict[str, list[int]]:
    """The labels of each shard; that nothing else lies in the folder is checked, and that counts are theirs."""
    index = index_of(output)
    arrays = {shard["name"]: np.load(output / f"{shard['name']}.npy") for shard in index["shards"]}
    assert {"domains.json", *(f"{name}.npy" for name in arrays)} == content(output).keys()
    assert all(array.dtype == np.dtype("<i2") for array in arrays.values())
    assert [len(array) for array in arrays.values()] == [shard["documents"] for shard in index["shards"]]
    together = np.concatenate([*arrays.values(), np.empty(0, int)])
    assert index["counts"] == {name: (together == place).sum() for place, name in enumerate(index["domains"])}
    assert sum(index["unlabelled"].values()) == (together == -1).sum()
    return {name: array.tolist() for name, array in arrays.items()}


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

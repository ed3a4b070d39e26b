"""Collating and packing in worker processes: forked after torch has used its threads, they must return."""

import subprocess
import sys

import pytest
from commands import ENVIRONMENT, ROOT

# What a worker gives back, compared with what this process makes of the same documents beforehand.
FORKED = """
import multiprocessing, sys
import torch
from edl.integrations.transformers import DomainCollator, pack_documents

LONG = 50_000  # more than torch does without threads

def examples():
    labels = {LONG: 1, LONG - 7: [2] * (LONG - 7)}
    return [{"input_ids": list(range(n)), "domain_ids": label} for n, label in labels.items()]

def flattened(examples):
    return {"input_ids": torch.tensor([[token for example in examples for token in example["input_ids"]]])}

def padded(examples):
    rows = [example["input_ids"] + [0] * (LONG - len(example["input_ids"])) for example in examples]
    masks = [[1] * len(example["input_ids"]) + [0] * (LONG - len(example["input_ids"])) for example in examples]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}

def soft():
    weights = [[float(domain == row % 64) for domain in range(64)] for row in range(1024)]
    collator = DomainCollator(lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})
    return collator([{"input_ids": [1], "domain_ids": label} for label in weights])["domain_ids"].tolist()

def packed(documents):
    columns = {name: [example[name] for example in documents] for name in ("input_ids", "domain_ids")}
    return pack_documents(columns, length=64)

WORK = {
    "packing": lambda: packed(examples()),
    "packing one document": lambda: packed([{"input_ids": list(range(2 * LONG)), "domain_ids": 1}]),
    "flattened": lambda: DomainCollator(flattened)(examples())["domain_ids"].tolist(),
    "padded": lambda: DomainCollator(padded)(examples())["domain_ids"].tolist(),
    "soft": soft,
}

def compare(kind, expected):
    sys.exit(WORK[kind]() != expected)

expected = {kind: work() for kind, work in WORK.items()}
torch.set_num_threads(2)
torch.ones(2**20).exp_()  # a parallel region: from here on a fork has a pool without its threads
for kind in WORK:
    worker = multiprocessing.get_context("fork").Process(target=compare, args=(kind, expected[kind]))
    worker.start()
    worker.join(60)
    if worker.is_alive():
        worker.kill()
        sys.exit(f"{kind}: the worker never returned")
    if worker.exitcode:
        sys.exit(f"{kind}: the worker made something else")
"""


def test_forked_workers_return_the_same():
    pytest.importorskip("transformers")
    result = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr

"""The example of docs/megatron.md, with the lines of its diff and without."""

import importlib.util
import os
import re
import sys

import pytest
from commands import ROOT, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")
EXAMPLE = ROOT / "examples" / "megatron" / "pretrain_gpt.py"
DIFF = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "megatron.md").read_text(), re.DOTALL)[1].splitlines()
ADDED = [line[1:] for line in DIFF if line.startswith("+")]
REMOVED = [line[1:] for line in DIFF if line.startswith("-")]
ON_CPU = (
    "import sys, runpy, megatron_on_cpu; megatron_on_cpu.enable(); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


def train(script, folder, *arguments) -> str:
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    assignments = [f"{name}={value}" for name, value in environment.items()]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "megatron")])
    return run(
        *("env", *assignments, f"PYTHONPATH={paths}", sys.executable, "-W", "ignore", "-c", ON_CPU, script),
        *("--train-iters", 15, *arguments),
        cwd=folder,
    )


def test_the_diff_is_what_the_example_marks():
    marked = [line.removesuffix("  # +") for line in EXAMPLE.read_text().splitlines() if line.endswith("# +")]
    assert marked == ADDED and len(ADDED) <= 5


def test_script_without_the_diff_runs(tmp_path):
    lines = EXAMPLE.read_text().splitlines()
    removed = iter(REMOVED)
    plain = [next(removed) if line.startswith("        ") else None for line in ADDED]
    for line, instead in zip(ADDED, plain, strict=True):
        place = lines.index(f"{line}  # +")
        lines[place : place + 1] = [] if instead is None else [instead]
    script = tmp_path / "plain.py"
    script.write_text("\n".join(lines))
    assert "edl_megatron" not in script.read_text()
    assert train(script, tmp_path).count("load_balancing_loss") == 15


def test_script_with_the_diff_drives_the_domains_apart(tmp_path):
    arguments = ["--expert-divergence-num-domains", 3, "--expert-divergence-coeff"]
    last = [
        float(train(EXAMPLE, tmp_path, *arguments, coeff).rsplit("expert_divergence_loss: ", 1)[1])
        for coeff in ("1e-12", "0.05")
    ]
    assert last[1] < last[0] - 0.2

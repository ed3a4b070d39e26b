"""The example of docs/megatron.md, with the lines of its diff and without."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from commands import ENVIRONMENT, ROOT, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")
EXAMPLE = ROOT / "examples" / "megatron" / "pretrain_gpt.py"
DOCUMENT = (ROOT / "docs" / "megatron.md").read_text()
DIFF = re.search(r"```diff\n(.*?)```", DOCUMENT, re.DOTALL)[1].splitlines()
ADDED = [line[1:] for line in DIFF if line.startswith("+")]
REMOVED = [line[1:] for line in DIFF if line.startswith("-")]
TORCHRUN = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def train(script, folder, *arguments, ranks=1) -> str:
    """What the script prints, started as its first lines say."""
    paths = os.pathsep.join([str(ROOT), str(EXAMPLE.parent)])
    return run(
        *("env", "OMP_NUM_THREADS=1", f"PYTHONPATH={paths}", *TORCHRUN, ranks, script),
        *("--cpu", "--train-iters", 15, *arguments),
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
        float(train(EXAMPLE, tmp_path, *arguments, coeff).rsplit("expert_divergence_loss: ", 1)[1].split(" |")[0])
        for coeff in ("1e-12", "0.05")
    ]
    assert last[1] < last[0] - 0.2


def test_script_with_a_file_of_objectives(tmp_path):
    file = tmp_path / "objectives.json"
    objectives = json.loads(re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[1])
    objectives["expert_divergence"] |= {"weight": 0.1, "warmup_steps": 5}
    file.write_text(json.dumps(objectives))
    printed = train(EXAMPLE, tmp_path, "--objectives", file)
    for name in ("expert_divergence_loss", "expert_divergence/pairs", "balance_loss", "router_z_loss"):
        assert printed.count(f" {name}: ") == 15
    first, *_, last = re.findall(r"expert_divergence_loss: (\S+)", printed)
    assert float(last) < float(first) - 0.2


def test_script_on_two_ranks(tmp_path):
    arguments = ["--expert-divergence-num-domains", 3, "--expert-divergence-coeff", 0.05]
    assert train(EXAMPLE, tmp_path, *arguments, ranks=2).count("expert_divergence_loss") >= 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_script_names_the_option(tmp_path):
    result = subprocess.run([*TORCHRUN, "1", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode != 0
    assert "torch finds none; with --cpu it runs on the CPU\n" in result.stderr

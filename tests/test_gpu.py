"""`make gpu` without a device: rehearsed, killed, out of time, and with cases that fail in every way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import cases
import gpu
import prebuilt
import pytest
import torch
from commands import ENVIRONMENT, ROOT, run

from edl import _extension

GPU = ROOT / "tools" / "gpu.py"
NAMES = ["build", "no-rows", "correctness", "races", "speed", "sanitizer", "graphs"]


def rehearse(output, *arguments):
    """The command of a rehearsal, and its environment."""
    return [sys.executable, str(GPU), "--rehearse", *arguments], ENVIRONMENT | {"OUT": str(output)}


def outcomes(output):
    stages = json.loads((output / "gpu-rehearsal.json").read_text())["stages"]
    return {name: stage["outcome"] for name, stage in stages.items()}


def test_the_whole_sequence(tmp_path, emulated_kernels):
    command, environment = rehearse(tmp_path, "--budget", "1500")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    assert outcomes(tmp_path) == dict.fromkeys(NAMES, "passed")
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines if re.match(r"== [\w-]+: about \d+ s, \d+ s at most", line)] == [
        f"{name}:" for name in NAMES
    ]
    files = sorted(path.name for path in tmp_path.iterdir())
    of_a_device = {f"gpu-rehearsal-{page}.md" for page in gpu.BENCHMARKS.values()}  # one alone is rehearsed
    assert len(of_a_device.union(files)) <= 8 and all(re.fullmatch(r"[\w.-]+", name) for name in files)
    for name, stages in {"correctness": ["No-rows", "Correctness"], "sanitizer": ["Races", "Sanitizer"]}.items():
        page = (tmp_path / f"gpu-rehearsal-{name}.md").read_text()
        found = re.findall(r"^# ([\w-]+), rehearsal\n\npassed: [1-9]\d* passed, 0 failed", page, re.MULTILINE)
        assert found == stages
    assert "Loss of probabilities" in (tmp_path / "gpu-rehearsal-loss.md").read_text()


def test_what_ran_is_on_disk_when_it_is_killed(tmp_path):
    command, environment = rehearse(tmp_path, "--stages", "build,correctness")
    page = tmp_path / "gpu-rehearsal-correctness.md"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (page.exists() and re.search(r"[1-9]\d* passed", page.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0].startswith("rehearsal: about build ")
    assert outcomes(tmp_path) == {"build": "passed", "correctness": "running"}
    assert re.search(r"^running: [1-9]\d* passed, 0 failed", page.read_text(), re.MULTILINE)
    assert page.read_text() == (time.sleep(3), page.read_text())[1]  # what it started ended with it


def test_a_stage_that_does_not_fit_is_left_out_and_says_so(tmp_path):
    command, environment = rehearse(tmp_path, "--stages", "speed,graphs", "--budget", "20")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    for name, estimate in (("speed", 100), ("graphs", 80)):
        assert outcomes(tmp_path)[name] == f"left out: takes about {estimate} s, 20 s are left"
        assert f"{name}: left out: takes about {estimate} s, 20 s are left" in result.stdout


def test_an_unknown_stage_and_a_missing_device_are_one_sentence(tmp_path):
    command, environment = rehearse(tmp_path, "--stages", "build,compilation")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert (
        "--stages takes build, no-rows, correctness, races, speed, sanitizer, graphs (got compilation)" in result.stderr
    )
    if not torch.cuda.is_available():
        result = subprocess.run([sys.executable, GPU], capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith("make gpu needs a CUDA device that torch can see")


def test_make_hands_stages_and_budget_on():
    target = ["gpu", "STAGES=build,speed", "BUDGET=400", "PYTHON=python3"]
    printed = run("make", "--no-print-directory", "--dry-run", *target, cwd=ROOT)
    assert printed == "python3 tools/gpu.py --stages build,speed --budget 400\n"


def test_every_file_with_cases_for_a_device_is_in_a_stage():
    listed = [ROOT / name for name in [*gpu.CORRECTNESS, *gpu.GRAPHS]]
    takes_a_device = re.compile(r"^def test_\w+\([^)]*\bdevice\b|mark\.cuda", re.MULTILINE)
    for path in (ROOT / "tests").rglob("test_*.py"):
        if takes_a_device.search(path.read_text()) and path.name != "test_gpu.py":
            assert path in listed or path.parent in listed, path


FAILING = """
import os, time, types, pytest, torch

class Sample(types.SimpleNamespace):
    def arguments(self):
        return (torch.zeros(self.size), "softmax")

SAMPLES = [Sample(op="route_tokens", size=size) for size in (70, 30, 50, 1)]

@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample.size))
def test_values(sample):
    assert sample.size == 1, f"wrong at {sample.size}"

def test_hangs():
    time.sleep(1000)

def test_crashes():
    os.abort()

def test_loses_the_device(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    raise RuntimeError("not the first thing that is noticed")

def test_passes_afterwards():
    pass
"""


def test_cases_that_fail_hang_crash_or_lose_the_device_keep_none_from_running(tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    target = gpu.Target("rehearsal", torch.device("cpu"), tmp_path)
    command = gpu.pytest_command("--rootdir", str(tmp_path), str(tmp_path / "test_failing.py"), seconds=10)
    assert gpu.run_cases(target, "correctness", [command], 200).startswith("failed: 6 of 8 cases")
    page = (tmp_path / "gpu-rehearsal-correctness.md").read_text()
    assert "2 passed, 6 failed, 0 skipped" in page
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    found = {row[0].split("::")[-1]: row[1:] for row in rows}
    assert found["route_tokens"] == ["3 of 4", "test_failing.py::test_values[30]", "30", "wrong at 30"]
    ended = "its process ended: it crashed, or took too long"
    for name in ("test_hangs", "test_crashes"):
        assert found[name] == ["1 of 1", f"test_failing.py::{name}", "?", ended]
    assert found["test_loses_the_device"][3] == (
        "not the first thing that is noticed "
        "(the device was lost: CUDA error: an illegal memory access was encountered)"
    )


@pytest.fixture
def time_is_over(monkeypatch):
    """Stops the clock of tools/gpu.py until a condition holds; then all time is over."""

    def at(condition):
        clock = types.SimpleNamespace(sleep=time.sleep, monotonic=lambda: 1e6 if condition() else 0.0)
        monkeypatch.setattr(gpu, "time", clock)

    return at


def test_cases_that_time_did_not_suffice_for_have_not_failed(tmp_path, time_is_over):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(1000)\n")
    target = gpu.Target("rehearsal", torch.device("cpu"), tmp_path)
    command = gpu.pytest_command("--rootdir", str(tmp_path), str(tmp_path / "test_slow.py"), seconds=1000)
    page = tmp_path / "gpu-rehearsal-correctness.md"
    time_is_over(lambda: page.exists() and "1 passed" in page.read_text())
    assert gpu.run_cases(target, "correctness", [command], 500) == "stopped after 500 s"
    assert "stopped after 500 s: 1 passed, 0 failed" in page.read_text()


def test_a_stage_that_is_cut_short_before_its_first_case_has_not_failed(tmp_path, time_is_over):
    begun = tmp_path / "begun"
    (tmp_path / "test_slow.py").write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(1000)\ndef test_one(): pass\n"
    )
    target = gpu.Target("rehearsal", torch.device("cpu"), tmp_path)
    command = gpu.pytest_command("--rootdir", str(tmp_path), str(tmp_path / "test_slow.py"), seconds=1000)
    time_is_over(begun.exists)
    assert gpu.run_cases(target, "sanitizer", [command], 500) == "stopped after 500 s"
    assert "stopped after 500 s: 0 passed" in (tmp_path / "gpu-rehearsal-sanitizer.md").read_text()
    time_is_over(lambda: False)
    (tmp_path / "test_none.py").write_text("")
    command = gpu.pytest_command("--rootdir", str(tmp_path), str(tmp_path / "test_none.py"))
    assert gpu.run_cases(target, "sanitizer", [command], 100).startswith("failed: 0 of 0 cases")


def test_a_report_that_was_cut_off_is_read_up_to_there(tmp_path):
    file = tmp_path / "cases"
    cases.write(file, {"test": "a", "operator": "a", "outcome": "passed"})
    with file.open("a") as report:
        report.write('{"test": "b", "oper')
    assert [case["test"] for case in cases.read(file)] == ["a"]
    assert cases.read(tmp_path / "none") == []


def test_a_prebuilt_library_is_taken_where_it_fits(tmp_path):
    assert prebuilt.problem(tmp_path, "9.0") == "there is none"
    prebuilt.keep(_extension.LIBRARY, tmp_path, ["8.0", "9.0"])
    assert prebuilt.problem(tmp_path, "9.0") is None
    assert prebuilt.problem(tmp_path, "10.0") == "it is for 8.0, 9.0, the device is 10.0"
    file = tmp_path / "facts.json"
    facts = json.loads(file.read_text())
    for name, other in (("torch", "2.10.0"), ("CUDA", "12.8"), ("system", "Linux aarch64"), ("sources", "0")):
        file.write_text(json.dumps(facts | {name: other}))
        assert prebuilt.problem(tmp_path, "9.0") == f"its {name} differ: {other}, here {facts[name]}"
    file.write_text(json.dumps(facts))
    os.remove(tmp_path / "libedl.so")
    assert prebuilt.problem(tmp_path, "9.0") == "there is none"

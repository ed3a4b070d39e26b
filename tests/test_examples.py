"""Every way of use, for real: the examples as a reader would run them, the C++ programs without Python."""

import itertools
import re
import subprocess
import sys

import pytest
from commands import ROOT, build_with_cmake, run

EXAMPLES = ROOT / "examples"
NUMBER = r"([\d.]+)"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the examples leave their files."""
    return tmp_path_factory.mktemp("examples")


def run_example(name, folder, *arguments):
    return run(sys.executable, EXAMPLES / name, *arguments, cwd=folder)


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_train_with_loss(folder):
    output = run_example("train_with_loss.py", folder)
    without, with_loss = map(float, re.search(f"{NUMBER} without, {NUMBER} with", output).groups())
    assert with_loss < without - 0.5
    language = numbers(f"language {NUMBER}", output)
    assert language[3] < language[0] / 2 and language[-1] < language[0] / 2


def test_train_with_labels(folder):
    """README's line on the text that is here without a network: saved, labelled by folder, trained with."""
    run_example("pretrain/save_text.py", folder, "my-text", "--data", "python")
    output = run(sys.executable, "-m", "edl", "label", "apply", "my-text", "--output", "labels", cwd=folder)
    assert {"English", "Python", "mathematics"} <= set(output.split())
    output = run_example("train_with_labels.py", folder, "my-text", "labels")
    without, with_loss = map(float, re.search(f"{NUMBER} without, {NUMBER} with", output).groups())
    assert with_loss < without - 0.5
    language = numbers(f"language {NUMBER}", output)
    assert language[2] < language[0] * 0.8


def test_moe_layer(folder):
    output = run_example("moe_layer.py", folder)
    language = numbers(f"language {NUMBER}", output)
    assert language[-1] < language[0] / 2
    assert "tokens per expert" in output


def test_distributed_train(folder):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run(*torchrun, EXAMPLES / "distributed" / "train.py", cwd=folder)
    over_all, per_rank = (
        float(re.search(f"loss {loss} +differs by ([\\de.+-]+)", output)[1]) for loss in ("over all ranks", "per rank")
    )
    assert over_all < 1e-4 and per_rank > 0.1
    losses = numbers(f"loss of rank 0 {NUMBER}", output)
    assert losses[-1] < losses[0]


def test_compile(folder):
    assert run_example("compile.py", folder).count("of eager") == 3


def test_export(folder):
    losses = numbers(f"loss {NUMBER}", run_example("export.py", folder, "--output", "program.pt2"))
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    assert (folder / "program.pt2").exists()


def test_aot_inductor(folder):
    assert run_example("aot_inductor.py", folder).count("of eager") == 2


def test_expert_parallel(folder):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run(*launcher, EXAMPLES / "distributed" / "expert_parallel.py", cwd=folder, timeout=300)
    difference, change = map(
        float, re.search(r"one process ([\d.e+-]+), largest change by training ([\d.e+-]+)", output).groups()
    )
    assert difference < change / 1000 and "each of 2 ranks holds 4 of 8 experts" in output


def test_torchtitan(folder):
    pytest.importorskip("torchtitan")
    output = run_example("torchtitan/train.py", folder)
    without, with_loss = map(float, re.search(f"{NUMBER} without, {NUMBER} with", output).groups())
    assert with_loss < without - 0.5
    language = numbers(f"language {NUMBER}", output)
    assert language[-1] < language[0] / 2


@pytest.fixture(scope="session")
def scripted_model(folder):
    run_example("torchscript.py", folder, "--output", "scripted.pt")
    return folder / "scripted.pt"


def test_torchscript(scripted_model):
    assert scripted_model.exists()


@pytest.fixture(scope="session")
def cpp_programs(installed, folder):
    """The programs of examples/libtorch, built on the wheel as it is installed in another environment."""
    build = ROOT / "build" / "examples-libtorch"
    prefix_path = run(installed, "-c", "import edl; print(edl.cmake_prefix_path)", cwd=folder).strip()
    assert prefix_path.startswith(str(installed.parents[1]))
    build_with_cmake(EXAMPLES / "libtorch", build, prefix_path)
    return build


def run_without_python(*command):
    """A process whose environment leads to no Python and no library."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={"OMP_NUM_THREADS": "2"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_scripted_model_trains_and_runs_in_cpp_without_python(cpp_programs, scripted_model):
    output = run_without_python(cpp_programs / "run_scripted_model", scripted_model)
    before, after = map(float, re.search(f"loss {NUMBER} before the step, {NUMBER} after", output).groups())
    assert after < before
    assert "predicted 12 x 64 tokens" in output


def test_cpp_program_says_what_it_needs(cpp_programs):
    result = subprocess.run([cpp_programs / "run_scripted_model"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "usage: run_scripted_model FILE, with a file that torchscript.py saved\n"


def test_router_trains_in_cpp_alone(cpp_programs):
    output = run_without_python(cpp_programs / "train_router")
    losses = numbers(f"loss {NUMBER}", output)
    assert len(losses) == 5 and all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert "experts gave 768 x 32" in output


@pytest.mark.parametrize("program", ["run_scripted_model", "train_router"])
def test_cpp_programs_link_no_python(cpp_programs, program):
    libraries = [line.split()[0] for line in run("ldd", cpp_programs / program).splitlines()]
    assert "libedl.so" in libraries
    assert not [name for name in libraries if "python" in name.rsplit("/", 1)[-1]]


def test_every_example_is_run_here():
    this = (ROOT / "tests" / "test_examples.py").read_text()
    names = [
        path.name
        for folder in (".", "distributed", "torchtitan")  # megatron's and the demo have tests of their own
        for path in EXAMPLES.glob(f"{folder}/*.py")
        if path.name != "small_model.py"
    ]
    assert [name for name in names if f'"{name}"' not in this] == []

"""What setup.py decides before anything is compiled."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import cuda_toolkit
import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from setuptools import Distribution
from torch.utils import cpp_extension

import edl

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = (2, 11), (2, 15)  # of torch


@pytest.fixture
def decisions(monkeypatch):
    """The functions of setup.py, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def build_cuda(decisions, monkeypatch, tmp_path):
    """Calls build_cuda() of setup.py on a machine described by the arguments."""

    def call(torch_cuda, has_nvcc, has_headers=True, wanted=None):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        for name, present in (("bin/nvcc", has_nvcc), ("include/cuda_runtime.h", has_headers)):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).unlink(missing_ok=True)
            if present:
                (tmp_path / name).touch()
        monkeypatch.delenv("EDL_BUILD_CUDA", raising=False)
        if wanted is not None:
            monkeypatch.setenv("EDL_BUILD_CUDA", wanted)
        return decisions["build_cuda"]()

    return call


def test_cuda_needs_a_torch_with_cuda_and_nvcc(build_cuda):
    assert build_cuda("13.0", has_nvcc=True)
    assert not build_cuda(None, has_nvcc=True)
    assert not build_cuda("13.0", has_nvcc=False)
    assert not build_cuda("13.0", has_nvcc=True, has_headers=False)


def test_the_toolkit_is_that_of_cuda_home_of_path_or_where_it_installs(monkeypatch, tmp_path):
    """A compiler without headers beside it, as a wrapper on PATH is, is a compiler and no toolkit."""
    for name in ("wrapper/bin/nvcc", "toolkit/bin/nvcc", "toolkit/include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    wrapper, toolkit = tmp_path / "wrapper", tmp_path / "toolkit"
    monkeypatch.setenv("PATH", f"{wrapper / 'bin'}")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert cuda_toolkit.find() == (toolkit, toolkit / "bin" / "nvcc", toolkit / "include")
    monkeypatch.setenv("CUDA_HOME", str(wrapper))
    assert cuda_toolkit.find() == (None, wrapper / "bin" / "nvcc", None)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(cuda_toolkit, "INSTALLED", toolkit)
    assert cuda_toolkit.find() == (toolkit, toolkit / "bin" / "nvcc", toolkit / "include")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}")
    monkeypatch.setattr(cuda_toolkit, "INSTALLED", tmp_path / "nothing")
    assert cuda_toolkit.find() == (toolkit, toolkit / "bin" / "nvcc", toolkit / "include")


@pytest.mark.parametrize(
    "known, wanted",
    [
        ("50 80 90", "8.0;9.0+PTX"),  # before CUDA 12.8
        ("75 80 86 90 100 103 120", "8.0;9.0;10.0+PTX"),
        ("90 100", "9.0;10.0+PTX"),
    ],
)
def test_kernels_are_compiled_for_what_the_compiler_knows(build_cuda, decisions, tmp_path, known, wanted):
    assert build_cuda("13.0", has_nvcc=True)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ "$*" = --list-gpu-arch ] && printf "compute_%s\\n" {known}\n')
    nvcc.chmod(0o755)
    assert decisions["default_architectures"]() == wanted


def test_a_compiler_for_none_of_our_devices_is_one_sentence(build_cuda, decisions, tmp_path):
    assert build_cuda("13.0", has_nvcc=True)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_120\n")
    nvcc.chmod(0o755)
    with pytest.raises(SystemExit) as error:
        decisions["default_architectures"]()
    assert str(error.value) == (
        "edl: nvcc must compile for one of compute capability 8.0, 9.0, 10.0, or TORCH_CUDA_ARCH_LIST name others "
        f"(got {nvcc}, which lists none of them)"
    )


@pytest.mark.parametrize("visible", [True, False])
def test_a_visible_gpu_decides_nothing(build_cuda, monkeypatch, visible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    assert build_cuda("13.0", has_nvcc=True)
    assert not build_cuda(None, has_nvcc=True)


def test_the_environment_overrides_the_choice(build_cuda):
    assert not build_cuda("13.0", has_nvcc=True, wanted="0")
    assert build_cuda("13.0", has_nvcc=True, wanted="1")
    with pytest.raises(SystemExit) as error:
        build_cuda(None, has_nvcc=True, wanted="1")
    assert str(error.value).startswith(
        "edl: EDL_BUILD_CUDA=1 needs a torch built with CUDA, and nvcc with cuda_runtime.h, below "
        "CUDA_HOME, around the nvcc of PATH or in /usr/local/cuda (got torch.version.cuda = None, toolkit = "
    )


def test_another_value_of_the_variable_is_one_sentence(build_cuda):
    with pytest.raises(SystemExit, match=r"^edl: EDL_BUILD_CUDA must be 0 or 1 \(got 'yes'\)$"):
        build_cuda("13.0", has_nvcc=True, wanted="yes")


def sentence_of_versions():
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return (
        f"edl is compiled against the PyTorch it will run with: install torch {oldest} to {newest} first, "
        "then run `pip install --no-build-isolation .`"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.14.0a0+git1234", "2.15.0+cpu"])
def test_supported_torch_versions(decisions, monkeypatch, capsys, version):
    monkeypatch.setattr(torch, "__version__", version)
    decisions["check_torch_version"]()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0"])
def test_older_torch_versions_are_one_sentence(decisions, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(SystemExit) as error:
        decisions["check_torch_version"]()
    assert str(error.value) == f"{sentence_of_versions()} (got torch {version})"


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0.dev20270101+cu132", "3.0.1"])
def test_newer_torch_versions_build_and_are_said_to_be_untested(decisions, monkeypatch, capsys, version):
    monkeypatch.setattr(torch, "__version__", version)
    decisions["check_torch_version"]()
    assert capsys.readouterr().err == (
        f"edl has been tested with torch up to 2.15, and not with torch {version}: run its tests (`make test`) before "
        "you rely on it\n"
    )


def test_bounds_of_torch_are_written_alike_everywhere(decisions):
    """setup.py has them; what people and CI read follows."""
    oldest, newest = decisions["OLDEST_TORCH"], decisions["NEWEST_TORCH"]
    assert (oldest, newest) == (OLDEST, NEWEST)
    all_of_them = ", ".join(f"2.{minor}" for minor in range(oldest[1], newest[1] + 1))
    written = f"2.{oldest[1]} to 2.{newest[1]}"
    readme = (ROOT / "README.md").read_text()
    assert f"torch ({written})" in readme and f"| torch | {all_of_them} (" in readme
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f'torch: ["2.{oldest[1]}", "2.{newest[1]}"]' in workflow and f"TORCH: torch==2.{newest[1]}.*" in workflow
    assert f"- torch {written}.\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0", "torch>=2.13,<2.14"),
        ("2.13.1+cu130", "torch>=2.13,<2.14"),
        ("2.15.0.post1", "torch>=2.15,<2.16"),
        ("2.14.0a0+git1234", "torch>=2.14.dev0,<2.15"),
        ("2.16.0.dev20270101", "torch>=2.16.dev0,<2.17"),
        (None, "torch>=2.11"),
    ],
)
def test_a_build_asks_for_the_torch_it_is_made_for_and_sources_for_any(decisions, version, requirement):
    assert decisions["torch_requirement"](version) == requirement
    if version is not None:
        assert Requirement(requirement).specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("use_ninja", [True, False])
def test_the_precompiled_header_is_cpp_with_and_without_ninja(decisions, tmp_path, use_ninja):
    command = decisions["Build"](Distribution(), use_ninja=use_ninja)
    command.precompile_torch_headers.__globals__["TORCH_HEADERS"] = ("functional",)
    extension = setuptools.Extension("edl.example", ["example.cpp"], extra_compile_args={"cxx": ["-std=c++20"]})
    command.distribution.ext_modules = command.extensions = [extension]
    command.build_temp, command.build_lib = str(tmp_path), str(tmp_path)
    made = []
    command.build_extension = lambda extension: made.append(command.precompile_torch_headers(extension))
    command.copy_headers = lambda package: None
    command.inplace, command.editable_mode, command.compiler = False, False, None
    command.run()
    assert (tmp_path / "torch_headers" / f"{made[0]}.gch").stat().st_size > 100_000


def run_setup(*arguments, before=""):
    code = f"import runpy, sys; {before}; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0"])
def test_an_old_setuptools_is_one_sentence(version):
    result = run_setup("dist_info", before=f"import setuptools; setuptools.__version__ = '{version}'")
    assert result.returncode == 1
    assert result.stderr == (
        "edl is built with setuptools 77 or newer: run `pip install --upgrade setuptools` first "
        f"(got setuptools {version})\n"
    )


def run_setup_without_torch(*arguments):
    return run_setup(*arguments, before="sys.modules['torch'] = None")


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
def test_without_torch_a_build_is_one_sentence(command):
    result = run_setup_without_torch(command)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(sentence_of_versions())


def test_without_torch_a_source_archive_can_be_made(tmp_path):
    result = run_setup_without_torch("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("*.tar.gz")] == [f"expert_divergence-{edl.__version__}.tar.gz"]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PYTHON": "no-such-python"}, "edl: Python 3.10 to 3.13 is needed"),
        ({"CXX": "no-such-compiler"}, "edl: a C++20 compiler is needed"),
    ],
)
def test_a_missing_tool_is_one_sentence(variables, sentence):
    result = subprocess.run(
        ["sh", ROOT / ".ci" / "preconditions"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert result.returncode == 1
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1


def test_the_preconditions_hold_here():
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(["sh", ROOT / ".ci" / "preconditions"], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")

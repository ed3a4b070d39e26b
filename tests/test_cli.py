"""`edl info`, `edl --version` and `python -m edl`."""

import os
import re
import subprocess
import sys

import pytest
import torch

import edl
from edl import _build, _extension, cli


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def facts_of(text):
    return dict(line.split("  ", 1) for line in text.splitlines())


def test_module_and_function_print_the_same(capsys):
    cli.main(["info"])
    printed = capsys.readouterr().out
    assert run(sys.executable, "-m", "edl", "info").stdout == printed
    facts = {name: value.strip() for name, value in facts_of(printed).items()}
    assert facts["edl"].startswith(edl.__version__)
    assert facts["torch"] == f"{torch.__version__} (edl was built for {_build.torch_version})"
    assert facts["library"] == str(_extension.LIBRARY)
    assert facts["CMake"] == edl.cmake_prefix_path


def test_version():
    result = run(sys.executable, "-m", "edl", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"edl {edl.__version__}\n", "")


def test_info_names_the_compiler():
    described = re.fullmatch(rf"{re.escape(edl.__version__)} \(built with (.*)\)", cli.build_facts()["edl"])[1]
    assert re.match(r"(GCC|.*[Cc]lang) \d+\.\d+", described)


@pytest.mark.parametrize("capability", _build.instruction_sets)
def test_info_names_the_instruction_set_in_use(capability):
    result = run(sys.executable, "-m", "edl", "info", EDL_CPU_CAPABILITY=capability)
    if "must name an instruction set that this processor" in result.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert f"instruction set  {capability} of {', '.join(_build.instruction_sets)}" in result.stdout


def test_info_says_that_the_system_refuses_amx(monkeypatch):
    monkeypatch.setattr(torch.ops.edl, "_is_amx_refused", lambda: True)
    assert cli.build_facts()["instruction set"].endswith(" (the system refuses this process AMX)")


def test_no_command_is_an_error_that_names_the_commands():
    result = run(sys.executable, "-m", "edl")
    assert result.returncode == 2
    assert "info" in result.stderr
    assert "info" in run(sys.executable, "-m", "edl", "--help").stdout


def test_cuda_line(monkeypatch):
    class Facts:
        cuda_version = "13.0"

    monkeypatch.setattr(cli, "_build", Facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli._cuda() == "built for 13.0, no device found"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert cli._cuda() == "built for 13.0, devices: H200"
    Facts.cuda_version = ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cli._cuda() == "edl was built without it (torch has CUDA 13.0)"

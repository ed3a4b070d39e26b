"""edlConfig.cmake: what find_package(edl) gives a C++ project, and the sentence where something is missing."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT

import edl

SHARE = Path(edl.__file__).parent / "share" / "cmake"
PROPERTIES = """
foreach(property IMPORTED_LOCATION INTERFACE_INCLUDE_DIRECTORIES INTERFACE_LINK_LIBRARIES INTERFACE_COMPILE_FEATURES)
  get_target_property(value edl::edl ${property})
  message(STATUS "${property}: ${value}")
endforeach()
"""


@pytest.fixture
def configure(tmp_path):
    """Configures a project without a language; returns exit status and output, line breaks removed."""

    def call(body, prefix_path):
        (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.22)\nproject(user NONE)\n{body}\n")
        command = [shutil.which("cmake", path=ENVIRONMENT["PATH"]), "-S", tmp_path, "-B", tmp_path / "build"]
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "CMAKE_PREFIX_PATH"}
        result = subprocess.run(
            [*command, f"-DCMAKE_PREFIX_PATH={prefix_path}"], capture_output=True, text=True, env=environment
        )
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    return call


def test_prefix_path_names_the_folders_of_edl_and_torch():
    assert edl.cmake_prefix_path.split(";") == [str(SHARE), torch.utils.cmake_prefix_path]


def test_target_has_library_headers_and_torch(configure):
    status, output = configure(f"find_package(edl REQUIRED)\n{PROPERTIES}", edl.cmake_prefix_path)
    assert status == 0, output
    package = Path(edl.__file__).parent
    assert f"IMPORTED_LOCATION: {package}/lib/libedl.so" in output
    assert f"INTERFACE_INCLUDE_DIRECTORIES: {package}/include;{Path(torch.__file__).parent}/include;" in output
    assert "lib/libtorch_cpu.so" in output and "lib/libc10.so" in output
    assert "INTERFACE_COMPILE_FEATURES: cxx_std_20" in output


def test_found_twice_is_found(configure):
    assert configure("find_package(edl REQUIRED)\nfind_package(edl REQUIRED)", edl.cmake_prefix_path)[0] == 0


def test_the_projects_own_torch_is_taken(configure):
    own = "add_library(torch INTERFACE IMPORTED)\nset(TORCH_LIBRARIES torch)\nset(TORCH_INCLUDE_DIRS /own/include)"
    status, output = configure(f"{own}\nfind_package(edl REQUIRED)\n{PROPERTIES}", SHARE)
    assert status == 0, output
    assert "INTERFACE_LINK_LIBRARIES: torch " in output
    assert "include;/own/include " in output


def test_missing_torch_is_one_sentence(configure, tmp_path):
    copy = tmp_path / "edl"
    shutil.copytree(SHARE.parents[1], copy, ignore=shutil.ignore_patterns("*.py", "include"))
    status, output = configure("find_package(edl REQUIRED)", copy / "share" / "cmake")
    assert status != 0
    assert f"edl needs torch: add torch.utils.cmake_prefix_path to CMAKE_PREFIX_PATH (got {copy}/share/cmake)" in output


def test_missing_library_is_one_sentence(configure, tmp_path):
    copy = tmp_path / "edl"
    shutil.copytree(SHARE, copy / "share" / "cmake")
    status, output = configure("find_package(edl REQUIRED)", copy / "share" / "cmake")
    assert status != 0
    assert f"edl is not built: run `pip install --no-build-isolation .` (looked for {copy}/lib/libedl.so)" in output

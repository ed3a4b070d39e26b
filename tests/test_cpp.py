"""The cases of tests/cpp, built once against the library that pip built, each a test of its own here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edl

SOURCES = Path(__file__).parent / "cpp"
BUILD = SOURCES.parents[1] / "build" / "cpp-tests"
NAMES = [name for path in sorted(SOURCES.glob("test_*.cpp")) for name in re.findall(r'CATCH_TEST_CASE\("(.+?)"', path.read_text())]


# The environment's cmake and ninja, whether or not it is activated.
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, "PATH": TOOLS})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def program():
    """The program with all cases."""
    cmake = shutil.which("cmake", path=TOOLS)
    assert cmake, "the C++ tests need cmake and ninja: run `pip install -r tests/requirements.txt`"
    run(cmake, "-G", "Ninja", "-S", SOURCES, "-B", BUILD, f"-DCMAKE_PREFIX_PATH={edl.cmake_prefix_path}")
    run(cmake, "--build", BUILD)
    return BUILD / "edl_cpp_tests"


@pytest.mark.parametrize("name", NAMES)
def test_case(program, name):
    pattern = re.sub(r"([\\,*~\[\]])", r"\\\1", name)
    assert re.search(r"All tests passed \(\d+ assertions? in 1 test case\)", run(program, pattern))


def test_every_case_of_the_program_is_a_test_here(program):
    assert f"in {len(NAMES)} test cases)" in run(program)

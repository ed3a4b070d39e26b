"""The cases of tests/cpp, built once against the library that pip built, each a test of its own here."""

import html
import re
import subprocess

import pytest
from commands import ENVIRONMENT, ROOT, build_with_cmake, run

import edl

SOURCES = ROOT / "tests" / "cpp"
BUILD = ROOT / "build" / "cpp-tests"
NAMES = [
    name
    for path in sorted(SOURCES.glob("test_*.cpp"))
    for name in re.findall(r'CATCH_TEST_CASE\("(.+?)"', path.read_text())
]


@pytest.fixture(scope="session")
def programs():
    """The folder of the program with all cases, and of that of the loops."""
    build_with_cmake(SOURCES, BUILD, edl.cmake_prefix_path)
    return BUILD


@pytest.fixture(scope="session")
def successes(programs):
    """Whether each case passed, of one run of all: loading torch takes longer than most of them."""
    command = [programs / "edl_cpp_tests", "--reporter", "xml", "--warn", "NoAssertions"]
    report = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT).stdout
    pattern = r'<TestCase name="([^"]*)"(?:(?!<TestCase ).)*?<OverallResult success="(\w+)"'
    return {html.unescape(name): success == "true" for name, success in re.findall(pattern, report, re.DOTALL)}


@pytest.mark.parametrize("name", NAMES)
def test_case(programs, successes, name):
    pattern = re.sub(r"([\\,*~\[\]])", r"\\\1", name)
    assert successes.get(name), run(programs / "edl_cpp_tests", pattern)  # alone, for what it says


def test_every_case_of_the_program_is_a_test_here(successes):
    assert set(successes) == set(NAMES)


def test_the_loops_of_expert_mlp_under_sanitizers(programs):
    """Every instruction set of this processor, in buffers of exactly the promised size."""
    assert "All tests passed" in run(programs / "loops" / "edl_loop_tests")

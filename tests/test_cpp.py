"""The cases of tests/cpp, built once against the library that pip built, each a test of its own here."""

import re

import pytest
from commands import ROOT, build_with_cmake, run

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


@pytest.fixture
def program(programs):
    return programs / "edl_cpp_tests"


@pytest.mark.parametrize("name", NAMES)
def test_case(program, name):
    pattern = re.sub(r"([\\,*~\[\]])", r"\\\1", name)
    assert re.search(r"All tests passed \(\d+ assertions? in 1 test case\)", run(program, pattern))


def test_every_case_of_the_program_is_a_test_here(program):
    assert f"in {len(NAMES)} test cases)" in run(program)


def test_the_loops_of_expert_mlp_under_sanitizers(programs):
    """Every instruction set of this processor, in buffers of exactly the promised size."""
    assert "All tests passed" in run(programs / "loops" / "edl_loop_tests")

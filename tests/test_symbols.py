"""tools/check_symbols.py: what it says of this build, and that it finds each offence in objects made for it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, run

TOOL = ROOT / "tools" / "check_symbols.py"
LIBRARY = runpy.run_path(str(TOOL))["OBJECTS"]

ONE_OF_EACH = """
namespace edl::FOLDER {
struct Base {
  virtual ~Base() {}
};
inline Base& only() {
  static Base base;
  return base;
}
template <typename Type>
Type twice(Type x) {
  return 2 * x;
}
namespace {
int hidden() {
  return 1;
}
}  // namespace
int number = twice(hidden());
void touch() { only().~Base(); }
}  // namespace edl::FOLDER
"""


def check(folder: Path) -> tuple[int, list[str], str]:
    """(exit status, offences, last line) for objects/ and csrc/ in a folder."""
    command = [sys.executable, TOOL, folder / "objects", "--sources", folder / "csrc"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr == ""
    *offences, last = result.stdout.splitlines()
    return result.returncode, offences, last


def compile_object(folder: Path, name: str, text: str, *flags: str) -> None:
    """objects/<name> from a text that is no file of csrc."""
    source, target = folder / "source.cpp", folder / "objects" / name
    source.write_text(text)
    target.parent.mkdir(parents=True, exist_ok=True)
    run("g++", "-std=c++20", f"-I{folder / 'csrc'}", "-c", source, "-o", target, *flags)


def write(folder: Path, name: str, text: str) -> None:
    path = folder / "csrc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("build", ["library", "emulated_kernels"])
def test_what_is_built_here(build, request):
    folder = LIBRARY if build == "library" else request.getfixturevalue(build)
    if not any(folder.rglob("*.o")):
        pytest.skip(f"needs objects in {folder.relative_to(ROOT)}, which an editable build leaves")
    assert re.fullmatch(r"[1-9]\d* symbols of [1-9]\d* objects, 0 offences\n", run(sys.executable, TOOL, folder))


def test_names_in_their_namespaces_and_inline_functions_of_shared_headers_pass(tmp_path):
    write(tmp_path, "common/shared.h", "namespace edl {\ninline int shared() { return 1; }\n}\n")
    for folder in ("cpu", "cuda"):
        text = f'#include "common/shared.h"\nint edl_{folder} = edl::shared();\n' + ONE_OF_EACH
        compile_object(tmp_path, f"csrc/{folder}/one.o", text.replace("FOLDER", folder))
    compile_object(tmp_path, "csrc/ops/one.o", "namespace edl { int of_ops; }")
    compile_object(tmp_path, "tests/one.o", "namespace edl { int of_nothing; }")
    status, offences, last = check(tmp_path)
    assert (status, offences) == (0, [])
    assert re.fullmatch(r"\d+ symbols of 3 objects, 0 offences", last)


@pytest.mark.parametrize(
    ("folder", "namespace"), [("cpu", "other"), ("cpu", "cuda"), ("cuda", "cpu"), ("ops", "cpu"), ("ops", "cuda")]
)
def test_names_in_another_namespace(tmp_path, folder, namespace):
    compile_object(tmp_path, f"csrc/{folder}/one.o", ONE_OF_EACH.replace("FOLDER", namespace))
    status, offences, _ = check(tmp_path)
    assert status == 1
    rule = "neither in edl::cpu nor in edl::cuda" if folder == "ops" else f"in edl::{folder} alone"
    sentence = f"csrc/{folder}/one.o: an object must define names {rule} (got "
    assert all(offence.startswith(sentence) for offence in offences)
    own = f"edl::{namespace}"
    assert {offence.removeprefix(sentence).removesuffix(")") for offence in offences} >= {
        f"{own}::number",
        f"{own}::touch()",
        f"{own}::only()",
        f"{own}::only()::base",
        f"guard variable for {own}::only()::base",
        f"int {own}::twice<int>(int)",
        f"{own}::(anonymous namespace)::hidden()",
        f"{own}::Base::~Base()",
        f"vtable for {own}::Base",
        f"typeinfo for {own}::Base",
        f"typeinfo name for {own}::Base",
    }


@pytest.mark.parametrize(
    "definition", ["int shared()", "inline int other()", "struct T {}; inline bool operator==(T, T)"]
)
def test_only_inline_functions_of_shared_headers_are_shared(tmp_path, definition):
    write(tmp_path, "common/shared.h", "namespace edl {\ninline int shared();\n} // not other()\n")
    compile_object(
        tmp_path, "csrc/cpu/one.o", f"namespace edl {{ {definition} {{ return 1; }} }}", "-fkeep-inline-functions"
    )
    status, offences, _ = check(tmp_path)
    assert (status, len(offences)) == (1, 1)
    assert offences[0].startswith("csrc/cpu/one.o: an object must define names in edl::cpu alone (got edl::")


def test_weak_functions_of_instruction_sets(tmp_path):
    text = "inline int twice(int x) { return 2 * x; }\nnamespace edl::cpu::EDL_ISA { int number = twice(1); }\n"
    for name in ("baseline", "avx2"):
        compile_object(tmp_path, f"{name}/csrc/cpu/isa/one.o", text, f"-DEDL_ISA={name}")
    rule = "an object of an instruction set must define no weak function (got twice(int))"
    assert check(tmp_path) == (
        1,
        [f"avx2/csrc/cpu/isa/one.o: {rule}", f"baseline/csrc/cpu/isa/one.o: {rule}"],
        "2 symbols of 2 objects, 2 offences",
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("struct Task { int rows; };", "struct Task"),
        ("namespace edl { struct Task {}; }", "namespace edl"),
        ("namespace edl::cuda::cpu { enum class Kind { one }; }", "namespace edl::cuda::cpu"),
        ("using Task = int;", "using Task = int"),
        ("namespace edl::cpu {\n}\ninline int f() { return '{'; }", "inline int f()"),
        ("#if 1 // {\nnamespace edl::cpuid {\n}\n#endif", "namespace edl::cpuid"),
    ],
)
def test_definitions_outside_of_the_namespace(tmp_path, text, got):
    write(tmp_path, "cpu/isa/task.h", text)
    compile_object(tmp_path, "csrc/ops/one.o", "")
    sentence = "csrc/cpu/isa/task.h: outside of namespace edl::cpu a file must hold TORCH_LIBRARY_IMPL alone"
    assert check(tmp_path) == (1, [f"{sentence} (got {got!r})"], "0 symbols of 1 objects, 1 offences")


def test_sources_that_keep_to_their_namespace_pass(tmp_path):
    text = """
#include "task.h" // {
#define OPEN \\
  namespace edl {
/* } */
namespace edl::cpu::EDL_ISA {
namespace {
constexpr const char* kText = "}"; // }
}
}
TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl({});
}
"""
    write(tmp_path, "cpu/task.cpp", text)
    compile_object(tmp_path, "csrc/ops/one.o", "")
    assert check(tmp_path) == (0, [], "0 symbols of 1 objects, 0 offences")


@pytest.mark.parametrize("flags", [["-flto"], ["-flto", "-ffat-lto-objects"]])
def test_link_time_optimisation(tmp_path, flags):
    compile_object(tmp_path, "csrc/ops/one.o", "int one;", *flags)
    rule = "csrc/ops/one.o: an object must be compiled without -flto (got code that the linker compiles)"
    assert check(tmp_path) == (1, [rule], "0 symbols of 1 objects, 1 offences")


def test_no_objects(tmp_path):
    sentence = f"edl: objects of csrc are needed: run `make venv` (got none below {tmp_path / 'objects'})"
    assert check(tmp_path) == (1, [], sentence)

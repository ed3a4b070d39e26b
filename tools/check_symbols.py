"""Proves that no two definitions share a name in libedl: `python tools/check_symbols.py [OBJECTS]`.

Of two inline functions of one name the linker keeps either, and says nothing. So

- an object of csrc/cpu defines names in edl::cpu alone, one of csrc/cuda in edl::cuda, any other in neither; inline
  functions of the headers of common/ and ops/, which have one definition, may stand in each;
- types leave no symbols: a file below csrc/cpu or csrc/cuda defines nothing outside of its namespace;
- an object of cpu/isa defines no weak function, which the linker could hand to a processor without its instructions;
- no object is compiled with -flto, which leaves code for the linker to compile; without such objects a linker's -flto
  does nothing.

Needs a build of edl, and nm and c++filt of binutils.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
# Where setup.py builds what pip installs as editable.
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
FOLDERS = ("cpu", "cuda")  # each with the namespace edl::<folder>

# A mangled name in edl, of what belongs to it too (tables of a class, guards, thunks), and the name that follows.
NAME_IN_EDL = re.compile(r"_Z(?:Z|G[VR]|T[A-Z]|T[hv]n?\d+_(?:n?\d+_)?)*N[VKRO]*3edl(?P<rest>.*)")


def symbols_of(path: Path) -> list[tuple[str, str]]:
    """(kind as nm tells it, mangled name) of all that an object defines."""
    output = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in output.splitlines()]


def readable(name: str) -> str:
    return subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()


def first_name(mangled: str) -> str:
    """`Task` of 4Task3runEv; empty for an operator."""
    length = re.match(r"L?(\d*)", mangled)
    return mangled[length.end() :][: int(length[1] or 0)] if length else ""


def check_symbols(symbols: list[tuple[str, str]], place: str, shared: set[str]) -> Iterator[str]:
    """What is wrong with the symbols of one object."""
    folder = place.split("/", maxsplit=1)[0]
    own = folder if folder in FOLDERS else ""
    rule = f"in edl::{own} alone" if own else "neither in edl::cpu nor in edl::cuda"
    for kind, name in symbols:
        if place.startswith("cpu/isa/") and kind == "W":
            yield f"an object of an instruction set must define no weak function (got {readable(name)})"
        if match := NAME_IN_EDL.match(name):
            first = first_name(match["rest"])
            found = first if first in FOLDERS else ""
            is_shared = first in shared and (kind in "WV" or kind.islower())
            if found != own and (found or not is_shared):
                yield f"an object must define names {rule} (got {readable(name)})"


def check_objects(folder: Path, sources: Path = SOURCES) -> tuple[int, int, list[str]]:
    """The number of objects of csrc below a folder, that of their symbols of edl, and what is wrong with them."""
    headers = [path.read_text() for shared in ("common", "ops") for path in sources.glob(f"{shared}/*.h")]
    shared_words = {word for text in headers for word in re.findall(r"\w+", re.sub(r"//.*", "", text))}
    objects, count, offences = 0, 0, []
    for path in sorted(folder.rglob("*.o")):
        name = path.relative_to(folder).as_posix()
        _, is_of_csrc, place = f"/{name}".rpartition("/csrc/")
        if not is_of_csrc:
            continue
        objects += 1
        content = path.read_bytes()
        # Objects of clang -flto are of another format; those of g++ have sections of these names.
        if not content.startswith(b"\x7fELF") or b".gnu.lto_" in content:
            offences.append(f"{name}: an object must be compiled without -flto (got code that the linker compiles)")
            continue
        symbols = symbols_of(path)
        count += sum(NAME_IN_EDL.match(symbol) is not None for _, symbol in symbols)
        offences += [f"{name}: {offence}" for offence in check_symbols(symbols, place, shared_words)]
    return objects, count, offences


def outermost(text: str) -> list[str]:
    """What a source says outside of all braces, without directives."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^\\])'", " ", text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*#(?:.*\\\n)*.*", "", text, flags=re.MULTILINE)
    while (shorter := re.sub(r"\{[^{}]*\}", ";", text)) != text:
        text = shorter
    return [" ".join(statement.split()) for statement in text.split(";") if statement.strip()]


def check_sources(sources: Path) -> list[str]:
    """What files below csrc/cpu and csrc/cuda define outside of their namespace."""
    offences = []
    for folder in FOLDERS:
        allowed = re.compile(rf"namespace edl::{folder}(::\w+)*|TORCH_LIBRARY_IMPL\(edl, \w+, m\)")
        rule = f"outside of namespace edl::{folder} a file must hold TORCH_LIBRARY_IMPL alone"
        for path in sorted(sources.glob(f"{folder}/**/*.[ch]*")):
            name = path.relative_to(sources.parent).as_posix()
            found = [statement for statement in outermost(path.read_text()) if not allowed.fullmatch(statement)]
            offences += [f"{name}: {rule} (got {statement!r})" for statement in found]
    return offences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("objects", nargs="?", type=Path, default=OBJECTS, help=f"folder (default: {OBJECTS})")
    parser.add_argument("--sources", type=Path, default=SOURCES, help=f"folder (default: {SOURCES})")
    arguments = parser.parse_args()
    if not shutil.which("nm") or not shutil.which("c++filt"):
        print("edl: nm and c++filt are needed: install binutils (none found)")
        return 1
    objects, count, offences = check_objects(arguments.objects, arguments.sources)
    if not objects:
        print(f"edl: objects of csrc are needed: run `make venv` (got none below {arguments.objects})")
        return 1
    offences += check_sources(arguments.sources)
    print(*offences, f"{count} symbols of {objects} objects, {len(offences)} offences", sep="\n")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())

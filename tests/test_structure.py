"""The rooms of the package: imports point one way, and no arrow runs back up."""

import ast
import sys
from pathlib import Path

import edl

PACKAGE = Path(edl.__file__).parent
# Each room may import those of the lines above, and its own.
FLOORS = [
    {"_build"},
    {"_extension", "command_line", "extras", "machine"},
    {"ops", "reference", "flops"},
    {"routing", "labels"},
    {"reduction"},
    {"moe", "objectives"},
    {"training", "diagnostics"},
    {"report", "integrations", "corpus"},
    {"observe"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `from_transformers` and `to_transformers` import the integration when they are called.
CALLED = {("moe", "integrations")}


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"edl.{each.name}" for each in node.names] if node.module == "edl" else [node.module]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("edl.")}
    return {room for room in rooms if room in FLOOR_OF or (PACKAGE / room).exists()}


def test_imports_point_one_way():
    arrows = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in FLOOR_OF, f"{path} is in no room"
        for other in rooms_imported(path) - {room}:
            arrows[room, other] = path
    upward = {(room, other): str(path) for (room, other), path in arrows.items() if FLOOR_OF[room] <= FLOOR_OF[other]}
    assert set(upward) == CALLED, upward


def test_every_room_says_what_is_in_it():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__main__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_packages_of_extras_are_imported_where_they_are_used():
    """The command runs, and says what is missing, where torch is all there is."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "integrations":
            continue
        names = []
        for node in ast.parse(path.read_text()).body:  # of the module, not of a function
            if isinstance(node, ast.ImportFrom):
                names.append(node.module)
            elif isinstance(node, ast.Import):
                names += [each.name for each in node.names]
        others = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"edl", "torch"}
        assert not others, f"{path} imports {others}"

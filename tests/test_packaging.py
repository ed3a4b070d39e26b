"""From the source archive to an installation in a new environment, as a newcomer makes it."""

import importlib.metadata
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, ROOT, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import edl

FOLDERS = ("benchmarks", "csrc", "docs", "edl", "examples", "tests", "tools")
BUILT = ("build/", "edl/include/", "dist/", ".venv/")


def test_source_archive_is_the_checkout_without_build_products(source_archive):
    """All of it, the tests and what they run too: `make test` works from there."""
    with tarfile.open(source_archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    here = {
        str(path.relative_to(ROOT))
        for pattern in ("*.*", "Makefile", "LICENSE", ".ci/*", *(f"{folder}/**/*" for folder in FOLDERS))
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix not in (".so", ".o", ".pyc") and not path.is_relative_to(ROOT / "edl/include")
    }
    assert here - names <= {".gitignore", ".coverage"}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith(BUILT)]


def test_wheel_has_library_headers_and_cmake_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lib/libedl.so", "include/edl/edl.h", "include/edl/aggregate_routing.h", "py.typed", "cli.py"):
        assert f"edl/{name}" in names
    assert "edl/share/cmake/edl/edlConfig.cmake" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "examples", "build"))]


def torch_requirement(metadata):
    [line] = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    return SpecifierSet(line.removeprefix("Requires-Dist: torch"))


def test_wheel_names_the_torch_it_was_built_with_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as files:
        folder = next(name.split("/")[0] for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = files.read(f"{folder}/METADATA").decode()
        assert "edl = edl.cli:main" in files.read(f"{folder}/entry_points.txt").decode()
    assert folder == f"expert_divergence-{edl.__version__}.dist-info"
    major, minor = map(int, torch.__version__.split(".")[:2])
    allowed = torch_requirement(metadata)
    assert torch.__version__.split("+")[0] in allowed
    assert not list(allowed.filter([f"{major}.{minor - 1}.9", f"{major}.{minor + 1}.0", f"{major + 1}.0"]))
    assert "License-Expression: Apache-2.0" in metadata


def test_source_archive_asks_for_any_torch_that_may_be_tried(source_archive):
    with tarfile.open(source_archive) as files:
        name = source_archive.name.removesuffix(".tar.gz")
        metadata = files.extractfile(f"{name}/PKG-INFO").read().decode()
    assert name == f"expert_divergence-{edl.__version__}"
    assert torch_requirement(metadata) == SpecifierSet(">=2.11")
    assert "dynamic: requires-dist\n" in metadata.lower()


def test_wheel_requires_torch_alone_and_more_for_each_extra_only(wheel):
    (built,) = importlib.metadata.distributions(path=[str(wheel)])
    requirements = [Requirement(line) for line in built.requires]

    def names(extra: str) -> set[str]:
        return {each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})}

    assert names("") == {"torch"}
    assert {extra: names(extra) for extra in built.metadata.get_all("Provides-Extra")} == {
        "transformers": {"torch", "transformers", "accelerate", "datasets"},
        "megatron": {"torch", "megatron-core"},
        "dirichlet": {"torch", "scipy"},
        "label": {"torch", "numpy", "pyarrow", "safetensors", "scikit-learn", "tqdm"},
        "fasttext": {"torch", "fasttext-predict"},
        "report": {"torch", "jinja2", "matplotlib", "numpy", "pyarrow", "safetensors", "scipy", "tqdm"},
    }


def test_installed_wheel_runs_away_from_the_sources(installed, tmp_path):
    facts = run(installed.parent / "edl", "info", cwd=tmp_path)
    assert f"{installed.parents[1]}/lib" in facts
    step = """
import torch, edl
logits = torch.randn(8, 4, requires_grad=True)
sums, counts = torch.ops.edl.aggregate_routing(logits, torch.arange(8) // 4, 2, "softmax")
sums.square().sum().backward()
assert counts.tolist() == [4, 4] and logits.grad.abs().sum() > 0
print(edl.__file__)
"""
    assert run(installed, "-c", step, cwd=tmp_path).startswith(str(installed.parents[1]))


def test_library_needs_no_python():
    library = Path(edl.__file__).parent / "lib" / "libedl.so"
    assert "python" not in " ".join(line.split()[0] for line in run("ldd", library).splitlines())


@pytest.mark.network
def test_pip_install_without_torch_is_one_sentence_and_fetches_no_torch(tmp_path):
    """`pip install .` in a new environment: build isolation, and no torch in sight."""
    venv.create(tmp_path / "venv", with_pip=True)
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "install torch 2.11 to 2.15 first, then run `pip install --no-build-isolation .`" in output
    assert "Collecting torch" not in output

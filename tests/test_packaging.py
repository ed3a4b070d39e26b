"""From the source archive to an installation in a new environment, as a newcomer makes it."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import edl

ROOT = Path(__file__).parents[1]
UNPACKED = ROOT / "build" / "source-archive"


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def source_archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=ROOT)
    return next(folder.glob("edl-*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(source_archive, tmp_path_factory):
    """The wheel that pip builds from the source archive, in a folder that stays, so that only changes are compiled again."""
    project = UNPACKED / source_archive.name.removesuffix(".tar.gz")
    if project.exists():
        for path in project.iterdir():
            if path.name != "build":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    with tarfile.open(source_archive) as files:
        files.extractall(UNPACKED, filter="data")
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--wheel-dir", folder, project),
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment that sees this torch, with the wheel installed."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site_packages / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    return python


def test_source_archive_has_all_sources_and_no_build_products(source_archive):
    with tarfile.open(source_archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    sources = [path for folder in ("csrc", "edl/share") for path in (ROOT / folder).rglob("*.*")]
    sources += [*ROOT.glob("edl/**/*.py"), ROOT / "edl/py.typed", ROOT / "setup.py", ROOT / "README.md", ROOT / "LICENSE"]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith(("build/", "edl/include/"))]


def test_wheel_has_library_headers_and_cmake_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lib/libedl.so", "include/edl/edl.h", "include/edl/ops/aggregate_routing.h", "py.typed", "cli.py"):
        assert f"edl/{name}" in names
    assert "edl/share/cmake/edl/edlConfig.cmake" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "examples", "build"))]


def test_wheel_names_its_torch_range_and_command(wheel):
    with zipfile.ZipFile(wheel) as files:
        folder = next(name.split("/")[0] for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = files.read(f"{folder}/METADATA").decode()
        assert "edl = edl.cli:main" in files.read(f"{folder}/entry_points.txt").decode()
    requirement = next(line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch"))
    assert sorted(requirement.removeprefix("Requires-Dist: torch").split(",")) == ["<2.14", ">=2.11"]
    assert "License-Expression: Apache-2.0" in metadata


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
    assert "python" not in run("ldd", library)


@pytest.mark.network
def test_pip_install_without_torch_is_one_sentence_and_fetches_no_torch(tmp_path):
    """`pip install .` in a new environment: build isolation, and no torch in sight."""
    venv.create(tmp_path / "venv", with_pip=True)
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "install torch 2.11 to 2.13 first, then run `pip install --no-build-isolation .`" in output
    assert "Collecting torch" not in output

"""A build that does not fit says so in one sentence, and never with an undefined symbol."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SAMPLES
from support import all_operators

import edl
from edl import _build, _extension


@pytest.fixture(autouse=True)
def installed_once(monkeypatch):
    """Where the tests run from a checkout beside an installed edl, it is not what these cases are about."""
    monkeypatch.setattr(_extension, "_hidden_installation", lambda: None)


def sentence(error):
    text = str(error)
    assert "\n" not in text
    assert "`pip install --no-build-isolation" in text
    return text


def test_the_running_build_is_accepted():
    _extension.check_build(_build.torch_version, _build.cuda_version, torch.__version__, torch.version.cuda)


@pytest.mark.parametrize("running", ["2.13.1+cpu", "2.13.0+cu130", "2.13.0"])
def test_patch_releases_of_torch_are_interchangeable(running):
    _extension.check_build("2.13.0+cpu", "", running, None)


@pytest.mark.parametrize("running", ["2.12.1", "2.14.0", "3.13.0"])
def test_another_torch_is_one_sentence(running):
    with pytest.raises(ImportError) as error:
        _extension.check_build("2.13.0+cpu", "", running, None)
    assert sentence(error.value).startswith(
        f"edl was built for torch 2.13.0+cpu but torch {running} is running: rebuild it"
    )


@pytest.mark.parametrize("running", [None, "12.8"])
def test_another_cuda_is_one_sentence(running):
    with pytest.raises(ImportError) as error:
        _extension.check_build("2.13.0", "13.0", "2.13.0", running)
    assert sentence(error.value).startswith(
        f"edl was built for CUDA 13.0 but the running torch 2.13.0 has CUDA {running}: rebuild it"
    )


def test_a_cpu_build_runs_with_a_torch_that_has_cuda():
    _extension.check_build("2.13.0", "", "2.13.0", "13.0")


def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "libedl.so")
    with pytest.raises(ImportError) as error:
        _extension.load()
    assert sentence(error.value).startswith("edl's library is missing: rebuild it")


def test_a_library_that_does_not_load_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "libedl.so").write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "libedl.so")
    with pytest.raises(ImportError) as error:
        _extension.load()
    assert sentence(error.value).startswith(f"edl's library, built for torch {_build.torch_version}, does not load")


def import_from(*folders, cwd=None):
    """What `import edl` says in a new process where `folders` hold the package, and an editable install is out of
    sight."""
    path = [*map(str, folders), str(Path(torch.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path}; import edl; print(edl.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=cwd or folders[0], env=environment
    )


def copy_without_build(folder):
    package = folder / "edl"
    package.mkdir()
    for source in _extension.LIBRARY.parents[1].glob("*.py"):
        (package / source.name).write_text(source.read_text())
    return package


def test_sources_that_were_never_built_are_one_sentence(tmp_path):
    copy_without_build(tmp_path)
    result = import_from(tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: edl has not been built for this Python: run `pip install --no-build-isolation .`"
    )


def test_a_build_for_another_python_is_one_sentence(tmp_path):
    package = copy_without_build(tmp_path)
    (package / "_build.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    (package / "lib").mkdir()
    (package / "lib" / "libedl.so").write_bytes(b"")
    result = import_from(tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: edl has not been built for this Python")


def install(folder, name, version, summary):
    """Metadata as pip leaves them."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    (metadata / "RECORD").write_text("")


@pytest.fixture
def site(tmp_path):
    """A folder with the whole package, as an installation is one."""
    folder = tmp_path / "site"
    shutil.copytree(_extension.LIBRARY.parents[1], folder / "edl", ignore=shutil.ignore_patterns("include", "*.pyc"))
    return folder


@pytest.mark.parametrize("leftover", ["nothing", "another torch", "another Python"])
def test_sources_that_hide_an_installation_are_told_apart_from_ones_that_were_never_built(tmp_path, site, leftover):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    package = copy_without_build(checkout)
    if leftover == "another Python":
        (package / "_build.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    if leftover == "another torch":
        facts = "version, torch_version, cuda_version, compiler, instruction_sets = '0', '1.0', '', '', ()\n"
        (package / "_build.py").write_text(facts)
    result = import_from("", site, cwd=checkout)
    assert result.returncode == 1
    assert (
        f": leave the folder {checkout}, or take it off the path, as it hides the edl that is installed in "
        f"{site / 'edl'}"
    ) in result.stderr.strip().splitlines()[-1]
    assert import_from("", site, cwd=tmp_path).stdout == f"{site / 'edl' / '__init__.py'}\n"


NAMESAKES = {
    "another project": ("0.1.11", "Parses edit decision lists", "is another project, whose package is called edl too"),
    "our former name": (
        "0.1.0",
        "Expert Divergence Learning for Mixture-of-Experts: loss, routing and expert operators for PyTorch",
        "is the former name of expert-divergence, and should go",
    ),
}


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A folder for metadata that nothing else is seen beside."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "expert-divergence", "0.1.0", "Expert Divergence Learning")
    return tmp_path


@pytest.mark.parametrize("name", NAMESAKES)
def test_a_distribution_of_the_same_name_is_one_sentence(alone, name):
    version, summary, is_what = NAMESAKES[name]
    install(alone, "edl", version, summary)
    with pytest.warns(UserWarning) as warnings:
        _extension.warn_of_namesakes()
    [warning] = warnings
    assert str(warning.message) == (
        f"edl: beside expert-divergence the distribution edl {version} is installed, which {is_what}: "
        "run `pip uninstall edl expert-divergence`, then install expert-divergence again"
    )


def test_the_import_says_so(site):
    install(site, "expert-divergence", "0.1.0", "Expert Divergence Learning")
    install(site, "edl", *NAMESAKES["another project"][:2])
    result = import_from(site)
    assert result.returncode == 0 and "UserWarning: edl: beside expert-divergence the distribution" in result.stderr


@pytest.mark.filterwarnings("error")
def test_one_distribution_and_what_a_build_leaves_in_the_sources_are_nothing_to_warn_of(alone):
    (alone / "edl.egg-info").mkdir()
    (alone / "edl.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: edl\nVersion: 0.1.0\n")
    _extension.warn_of_namesakes()
    (alone / "expert_divergence-0.1.0.dist-info" / "RECORD").unlink()
    install(alone, "edl", "0.1.11", "Parses edit decision lists")  # alone, beside sources that are not installed
    _extension.warn_of_namesakes()


def test_a_cpu_capability_that_does_not_exist_is_one_sentence():
    result = subprocess.run(
        [sys.executable, "-m", "edl", "info"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "EDL_CPU_CAPABILITY": "avx3"},
        cwd=_extension.LIBRARY.parents[2],
    )
    assert result.returncode == 1
    assert "EDL_CPU_CAPABILITY must be 'baseline', 'avx2', 'avx512' or 'avx512_amx' (got 'avx3')" in result.stderr


def test_version_is_that_of_the_library():
    assert edl.__version__ == _build.version


@pytest.mark.skipif(bool(_build.cuda_version), reason="this edl is built with CUDA")
def test_without_cuda_every_operator_tells_what_is_missing():
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in all_operators():
        operator = getattr(torch.ops.edl, name).default
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU"):
            continue
        with pytest.raises(
            ValueError, match=f"^edl::{name}: edl was built without CUDA, rebuild it with .* \\(got a CUDA tensor\\)$"
        ):
            operator.redispatch(on_cuda, *next(sample for sample in SAMPLES if sample.op == name).arguments())

"""What all tests share: poisoned memory, devices, seeds, and the packages that a user would install."""

import atexit
import os
import shutil
import sys
import tempfile
import venv
from pathlib import Path

import cuda_toolkit
import pytest
import torch
from commands import ROOT, build_with_cmake, run
from filelock import FileLock

from edl import _build

# Children that torch.compile and AOTInductor start should not compete with the tests for two cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# A graph cached by another build of edl may call an operator by an older schema. The processes of one run share theirs.
CACHE_PREFIX = "edl-inductor-"
if not Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")).name.startswith(CACHE_PREFIX):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix=CACHE_PREFIX)
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


# They take minutes and come first, so that no process is left alone with one at the end; what is compiled for several
# comes before all.
LONGEST_FILES = [
    "test_packaging.py",
    "test_gpu.py",
    "test_examples.py",
    "test_cpp.py",
    "test_transformers_trainer.py",
    "test_statistics_transformers.py",
    "test_page.py",
    "test_parallel.py",
    "test_cuda_emulation.py",
    "test_transformers_capture.py",
    "test_observe.py",
    "test_router_statistics.py",
    "test_threads.py",
    "test_transformers_blocks.py",
]


# What they run of edl others run too, or it is compilers that they run: measuring coverage would slow them by a half.
UNMEASURED_FILES = {
    "test_aoti.py",
    "test_compile.py",
    "test_compiled_autograd.py",
    "test_cpp.py",
    "test_cuda_emulation.py",
    "test_examples.py",
    "test_export.py",
    "test_gpu.py",
    "test_opcheck.py",
    "test_packaging.py",
    "test_threads.py",
    "test_transformers_experts.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in UNMEASURED_FILES:
            item.add_marker(pytest.mark.no_cover)
    items.sort(key=lambda item: [*LONGEST_FILES, item.path.name].index(item.path.name))
    if torch.cuda.is_available() and _build.cuda_version:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and an edl built with CUDA")
    for item in items:
        if item.get_closest_marker("cuda"):  # keywords hold folder names too
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device that edl has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    """The same random inputs on every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unmeasured_children(request, monkeypatch):
    """Processes that unmeasured tests start are not measured either."""
    if request.path.name in UNMEASURED_FILES:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills fresh memory with NaN (integers: the largest value), so that a result that reads or skips any of it
    shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forgets what was compiled: a function that many tests compile would exceed torch's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:  # slow to import
        torch._dynamo.reset()


@pytest.fixture
def group_of_one():
    """This process as the only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture
def as_dtensor(group_of_one):
    """Makes a tensor one shard of one."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    return lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)])


@pytest.fixture(scope="session")
def emulated_kernels():
    """The folder of the two programs of tests/cuda_emulation: all CUDA kernels under sanitizers, and with every access
    of memory checked for races."""
    headers = cuda_toolkit.find().include
    if headers is None:
        pytest.skip("needs the headers of the CUDA toolkit (cuda_runtime.h): set CUDA_HOME")
    build = ROOT / "build" / "cuda-emulation"
    build_with_cmake(ROOT / "tests" / "cuda_emulation", build, "", f"-DCUDA_INCLUDE={headers}")
    return build


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Calls a function that makes a file or folder, in one of the processes that run tests side by side; all get it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(make):
        note = shared / make.__name__
        with FileLock(f"{note}.lock"):
            if not note.exists():
                note.write_text(str(make()))
        return Path(note.read_text())

    return made


@pytest.fixture(scope="session")
def source_archive(once, tmp_path_factory):
    def make_source_archive():
        folder = tmp_path_factory.mktemp("sdist")
        code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
        run(sys.executable, "-c", code, cwd=ROOT)
        return next(folder.glob("*.tar.gz"))

    return once(make_source_archive)


@pytest.fixture(scope="session")
def wheel(once, tmp_path_factory):
    """The wheel that pip builds from the checkout, which the source archive is, file by file, and whose objects are
    compiled already."""

    def make_wheel():
        for former in [*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")]:
            shutil.rmtree(former)  # what was deleted since would still be in it
        folder = tmp_path_factory.mktemp("wheel")
        run(
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
            *("--wheel-dir", folder, ROOT),
            env=os.environ,  # another ninja than that of `make` would take no object as its own
        )
        return next(folder.glob("*.whl"))

    return once(make_wheel)


@pytest.fixture(scope="session")
def installed(once, wheel):
    """The Python of a new environment that sees this torch, with the wheel installed."""

    def make_environment():
        folder = ROOT / "build" / "installed"
        venv.create(folder, with_pip=False, symlinks=True, clear=True)
        python = folder / "bin" / "python"
        site_packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
        (site_packages / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
        return python

    return once(make_environment)
